//! What instances print, kept on disk: two files for each, the current one and
//! the one before it, so that the newest half of the limit is always there, and
//! beside them whose they are.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::{
    model::{AccountId, FunctionId, InstanceId, Version, VersionId},
    private,
};

/// Bytes kept for one instance.
const LIMIT: u64 = 1 << 20;
/// Logs of instances that are gone.
const KEPT: usize = 100;
/// Of the last line that an error quotes.
const QUOTE: usize = 300;

/// Whose an instance was, for as long as its log is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogOwner {
    pub account: AccountId,
    pub function: FunctionId,
    pub version: VersionId,
    /// An account of the same name that is younger is another one.
    pub since: Timestamp,
}

impl LogOwner {
    pub(super) fn of(version: &Version) -> Self {
        Self {
            account: version.account.clone(),
            function: version.function,
            version: version.id,
            since: Timestamp::now(),
        }
    }
}

#[derive(Clone)]
pub(super) struct Logs {
    dir: PathBuf,
}

impl Logs {
    pub(super) fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.join("logs");
        // What instances print is their account's: not for others on the machine, instances among them.
        private::directory(&dir)?;
        fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
        Ok(Self { dir })
    }

    fn files(&self, instance: InstanceId) -> (PathBuf, PathBuf) {
        (
            self.dir.join(format!("{instance}.log.1")),
            self.dir.join(format!("{instance}.log")),
        )
    }

    fn owner_file(&self, instance: InstanceId) -> PathBuf {
        self.dir.join(format!("{instance}.json"))
    }

    /// Whose log it is; none where none is kept.
    pub(super) fn owner(&self, instance: InstanceId) -> Option<LogOwner> {
        let text = fs::read(self.owner_file(instance)).ok()?;
        serde_json::from_slice(&text).ok()
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

    pub(super) fn writer(&self, instance: InstanceId, owner: LogOwner) -> Writer {
        let (older, newer) = self.files(instance);
        Writer {
            owner: Some((self.owner_file(instance), owner)),
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
        // An instance may have any of its files: its log was moved just when it ended, or it never printed more.
        let mut written = HashMap::<InstanceId, SystemTime>::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.split_once('.')?.0.parse().ok());
            let modified = entry.metadata().and_then(|data| data.modified());
            if let (Some(id), Ok(modified)) = (id, modified)
                && !alive.contains(&id)
            {
                let newest = written.entry(id).or_insert(modified);
                *newest = modified.max(*newest);
            }
        }
        let mut gone: Vec<_> = written.into_iter().map(|(id, at)| (at, id)).collect();
        gone.sort_unstable();
        let surplus = gone.len().saturating_sub(KEPT);
        for (_, id) in gone.into_iter().take(surplus) {
            let (older, newer) = self.files(id);
            for path in [older, newer, self.owner_file(id)] {
                drop(fs::remove_file(path));
            }
        }
    }
}

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

/// Writes one instance's log, over all its starts.
pub(super) struct Writer {
    /// Until it is written, with the log's first line.
    owner: Option<(PathBuf, LogOwner)>,
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
                if let Some((path, owner)) = &self.owner {
                    append(path)?.write_all(&serde_json::to_vec(owner)?)?;
                    self.owner = None;
                }
                let file = append(&self.newer)?;
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

/// Appends to a file that is nobody else's to read.
fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> LogOwner {
        LogOwner {
            account: AccountId::default_account(),
            function: FunctionId::random(),
            version: VersionId::random(),
            since: Timestamp::now(),
        }
    }

    #[test]
    fn whose_a_log_is_is_known_as_long_as_it_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (id, owner) = (InstanceId::random(), owner());
        let mut writer = Logs::open(dir.path()).unwrap().writer(id, owner.clone());
        // By the next process too.
        let logs = Logs::open(dir.path()).unwrap();
        assert_eq!(logs.owner(id), None, "nothing was printed");
        writer.limit = 4;
        for _ in 0..3 {
            writer.write(b"line\n").unwrap();
        }
        assert_eq!(logs.owner(id), Some(owner));
        assert!(!dir.path().join(format!("logs/{id}.log")).exists());
        assert!(logs.read(id, 1).is_some());
    }

    #[test]
    fn a_log_is_bounded_and_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let id = InstanceId::random();
        assert_eq!(logs.read(id, 5), None);
        let mut writer = logs.writer(id, owner());
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
        logs.writer(id, owner()).write(b"x\n").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&logs.dir), 0o700);
        assert_eq!(mode(&logs.files(id).1), 0o600);
        assert_eq!(mode(&logs.owner_file(id)), 0o600);
    }

    #[test]
    fn old_logs_go_and_live_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let live = InstanceId::random();
        for (n, id) in std::iter::once(live)
            .chain((0..KEPT + 5).map(|_| InstanceId::random()))
            .enumerate()
        {
            let mut writer = logs.writer(id, owner());
            // Every other one has nothing but what was moved away.
            writer.limit = [1000, 1][n % 2];
            writer.write(b"x\n").unwrap();
        }
        logs.prune(&HashSet::from([live]));
        let kept: Vec<_> = fs::read_dir(dir.path().join("logs"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let (owners, logs_kept) = kept.iter().partition::<Vec<_>, _>(|n| n.ends_with(".json"));
        assert_eq!((owners.len(), logs_kept.len()), (KEPT + 1, KEPT + 1));
        assert!(logs.read(live, 1).is_some() && logs.owner(live).is_some());
    }
}
