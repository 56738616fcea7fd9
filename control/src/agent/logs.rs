//! What instances print, kept on disk: two files for each, the current one and
//! the one before it, so that the newest half of the limit is always there.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::model::InstanceId;

/// Bytes kept for one instance.
const LIMIT: u64 = 1 << 20;
/// Logs of instances that are gone.
const KEPT: usize = 100;
/// Of the last line that an error quotes.
const QUOTE: usize = 300;

#[derive(Clone)]
pub(super) struct Logs {
    dir: PathBuf,
}

impl Logs {
    pub(super) fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.join("logs");
        // What instances print is their account's: not for others on the machine, instances among them.
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
        Ok(Self { dir })
    }

    fn files(&self, instance: InstanceId) -> (PathBuf, PathBuf) {
        (
            self.dir.join(format!("{instance}.log.1")),
            self.dir.join(format!("{instance}.log")),
        )
    }

    /// The last `tail` lines.
    pub(super) fn read(&self, instance: InstanceId, tail: usize) -> Option<String> {
        let (older, newer) = self.files(instance);
        let newer = fs::read(newer);
        let mut bytes = match (fs::read(older), &newer) {
            (Ok(bytes), _) => bytes,
            (Err(_), Ok(_)) => Vec::new(),
            (Err(_), Err(_)) => return None,
        };
        bytes.extend(newer.unwrap_or_default());
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        Some(lines[lines.len().saturating_sub(tail)..].concat())
    }

    pub(super) fn writer(&self, instance: InstanceId) -> Writer {
        let (older, newer) = self.files(instance);
        Writer {
            older,
            newer,
            file: None,
            limit: LIMIT / 2,
            last: Arc::default(),
        }
    }

    /// Removes the oldest logs of instances that are gone.
    pub(super) fn prune(&self, alive: &HashSet<InstanceId>) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let mut gone: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let id: InstanceId = name.strip_suffix(".log")?.parse().ok()?;
                let modified = entry.metadata().ok()?.modified().ok()?;
                (!alive.contains(&id)).then_some((modified, id))
            })
            .collect();
        gone.sort_unstable();
        let surplus = gone.len().saturating_sub(KEPT);
        for (_, id) in gone.into_iter().take(surplus) {
            let (older, newer) = self.files(id);
            for path in [older, newer] {
                drop(fs::remove_file(path));
            }
        }
    }
}

/// Writes one instance's log, over all its starts.
#[derive(Clone)]
pub(super) struct LastLine(Arc<Mutex<Vec<u8>>>);

impl LastLine {
    /// The last line that says anything.
    pub(super) fn get(&self) -> Option<String> {
        let line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&line);
        let text = text.lines().rev().find(|l| !l.trim().is_empty())?.trim();
        Some(text.chars().take(QUOTE).collect())
    }

    pub(super) fn clear(&self) {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        line.clear();
    }
}

pub(super) struct Writer {
    older: PathBuf,
    newer: PathBuf,
    file: Option<(File, u64)>,
    limit: u64,
    /// The end of what was printed; the supervisor quotes it.
    last: Arc<Mutex<Vec<u8>>>,
}

impl Writer {
    pub(super) fn last(&self) -> LastLine {
        LastLine(Arc::clone(&self.last))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.extend_from_slice(bytes);
            let surplus = last.len().saturating_sub(2048);
            last.drain(..surplus);
        }
        let (mut file, mut written) = match self.file.take() {
            Some(open) => open,
            None => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(&self.newer)?;
                let written = file.metadata()?.len();
                (file, written)
            }
        };
        file.write_all(bytes)?;
        written += bytes.len() as u64;
        if written < self.limit {
            self.file = Some((file, written));
        } else {
            fs::rename(&self.newer, &self.older)?;
        }
        Ok(())
    }

    /// Takes what a process and its children print, until all have closed it.
    pub(super) async fn pump(&mut self, mut from: pipe::Receiver) {
        let mut buffer = vec![0; 32 << 10];
        loop {
            match from.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(n) => {
                    // A full disk must not stop the instance: what it prints is lost.
                    if let Err(error) = self.write(&buffer[..n]) {
                        tracing::warn!(%error, path = %self.newer.display(), "cannot write a log");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let id = InstanceId::random();
        assert_eq!(logs.read(id, 5), None);
        let mut writer = logs.writer(id);
        writer.limit = 1000;
        for n in 0..1000 {
            writer.write(format!("line {n}\n").as_bytes()).unwrap();
        }
        assert_eq!(logs.read(id, 2).unwrap(), "line 998\nline 999\n");
        assert!(logs.read(id, usize::MAX).unwrap().len() <= 2100);
        assert_eq!(writer.last().get().unwrap(), "line 999");
    }

    #[test]
    fn logs_are_nobody_elses_to_read() {
        let dir = tempfile::tempdir().unwrap();
        // One that an earlier version made.
        fs::create_dir(dir.path().join("logs")).unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let id = InstanceId::random();
        logs.writer(id).write(b"x\n").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&logs.dir), 0o700);
        assert_eq!(mode(&logs.files(id).1), 0o600);
    }

    #[test]
    fn old_logs_go_and_live_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let live = InstanceId::random();
        for id in std::iter::once(live).chain((0..KEPT + 5).map(|_| InstanceId::random())) {
            logs.writer(id).write(b"x\n").unwrap();
        }
        logs.prune(&HashSet::from([live]));
        assert_eq!(
            fs::read_dir(dir.path().join("logs")).unwrap().count(),
            KEPT + 1
        );
        assert!(logs.read(live, 1).is_some());
    }
}
