//! What `/proc` says: who belongs to an instance, who listens on a port, and
//! who is left of an earlier run. A process that goes meanwhile is simply not
//! there.

use std::{
    collections::HashSet,
    fs,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{self, Pid, Signal, WaitOptions};

use crate::model::InstanceId;

pub(super) const INSTANCE: &str = "WEIR_INSTANCE_ID";
pub(super) const AGENT: &str = "WEIR_AGENT";

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// What a line of `/proc/PID/stat` says.
#[derive(Clone, Copy)]
struct Stat {
    state: u8,
    parent: i32,
    /// 0: one of another PID namespace.
    group: i32,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything; what follows its last parenthesis does not.
    let after = text.iter().rposition(|&b| b == b')')?;
    let mut fields = std::str::from_utf8(text.get(after + 2..)?).ok()?.split(' ');
    Some(Stat {
        state: *fields.next()?.as_bytes().first()?,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
    })
}

fn runs(state: u8) -> bool {
    !matches!(state, b'Z' | b'X' | b'x')
}

fn environ_has(pid: i32, entries: &[&str]) -> bool {
    let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    entries.iter().all(|wanted| {
        environ
            .split(|&b| b == 0)
            .any(|e| e.starts_with(wanted.as_bytes()))
    })
}

fn signal_group(group: i32, signal: Signal) {
    if let Some(group) = Pid::from_raw(group).filter(|g| g.as_raw_nonzero().get() > 1) {
        // Gone already is as good.
        let _ = process::kill_process_group(group, signal);
    }
}

pub(super) fn terminate_group(group: i32) {
    signal_group(group, Signal::TERM);
}

pub(super) fn kill_group(group: i32) {
    signal_group(group, Signal::KILL);
}

/// Whether anything of the group still runs; zombies don't count.
pub(super) fn group_alive(group: i32) -> bool {
    let Some(pid) = Pid::from_raw(group) else {
        return false;
    };
    process::test_kill_process_group(pid).is_ok()
        && pids().any(|p| stat(p).is_some_and(|s| s.group == group && runs(s.state)))
}

/// Kills whatever has all of these in its environment, with its process
/// groups, until nothing is left or the bound is reached; says how many.
fn kill_marked(marks: &[&str], bound: Duration) -> usize {
    let own = process::getpid().as_raw_nonzero().get();
    let own_group = stat(own).map_or(0, |s| s.group);
    let mut killed = HashSet::new();
    let began = std::time::Instant::now();
    loop {
        let mut left = false;
        for pid in pids().filter(|&p| p != own && p > 1) {
            let Some(Stat { state, group, .. }) = stat(pid) else {
                continue;
            };
            if !runs(state) || !environ_has(pid, marks) {
                continue;
            }
            left = true;
            killed.insert(pid);
            if group != own_group {
                kill_group(group);
            }
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = process::kill_process(pid, Signal::KILL);
            }
        }
        if !left || began.elapsed() > bound {
            return killed.len();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What an earlier run of this agent left behind.
pub(super) fn kill_orphans(agent: &str) -> usize {
    kill_marked(
        &[&format!("{AGENT}={agent}"), &format!("{INSTANCE}=")],
        Duration::from_secs(5),
    )
}

/// What left the process group of an instance that has ended.
pub(super) fn kill_escaped(agent: &str, instance: InstanceId) -> usize {
    kill_marked(
        &[
            &format!("{AGENT}={agent}"),
            &format!("{INSTANCE}={instance}"),
        ],
        Duration::from_secs(2),
    )
}

/// The processes that this one started and waits for itself.
#[derive(Clone, Default)]
pub(super) struct Children(Arc<Mutex<HashSet<i32>>>);

impl Children {
    fn set(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until the answer is dropped, its exit status is somebody's to take. Must come before the next look at
    /// orphans, so on the same thread without an await after the start.
    pub(super) fn own(&self, pid: i32) -> OwnChild {
        self.set().insert(pid);
        OwnChild {
            children: self.clone(),
            pid,
        }
    }

    /// Takes the exit statuses of ended processes that became this one's children when their parents ended.
    pub(super) fn reap_orphans(&self) {
        let here = process::getpid().as_raw_nonzero().get();
        for pid in pids() {
            let ended = stat(pid).is_some_and(|s| s.parent == here && s.state == b'Z');
            if ended && !self.set().contains(&pid) {
                // Its status is nobody's.
                let _ = process::waitpid(Pid::from_raw(pid), WaitOptions::NOHANG);
            }
        }
    }
}

#[must_use]
pub(super) struct OwnChild {
    children: Children,
    pid: i32,
}

impl Drop for OwnChild {
    fn drop(&mut self) {
        self.children.set().remove(&self.pid);
    }
}

/// Whether the orphans of this process's PID namespace become its children.
pub(super) fn adopts_orphans() -> bool {
    process::getpid().is_init()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holder {
    Nobody,
    Instance,
    Stranger,
}

/// Who listens where a connection to 127.0.0.1:`port` ends up.
pub(super) fn holder(port: u16, group: i32, instance: InstanceId, uid: u32) -> Holder {
    let mut sockets = listeners("/proc/net/tcp", port);
    if sockets.is_empty() {
        sockets = listeners("/proc/net/tcp6", port);
    }
    if sockets.is_empty() {
        return Holder::Nobody;
    }
    let mut wanted: HashSet<u64> = sockets.iter().map(|s| s.inode).collect();
    let mut readable = take_sockets(group, &mut wanted);
    if wanted.is_empty() {
        return Holder::Instance;
    }
    let mark = format!("{INSTANCE}={instance}");
    for pid in pids().filter(|&p| p != group) {
        let grouped = stat(pid).is_some_and(|s| s.group == group);
        if grouped || environ_has(pid, &[&mark]) {
            readable |= take_sockets(pid, &mut wanted);
            if wanted.is_empty() {
                return Holder::Instance;
            }
        }
    }
    // Without the right to look into the instance's files (root in a container
    // that lacks CAP_SYS_PTRACE), the socket's user is the best there is.
    if !readable && sockets.iter().all(|s| s.uid == uid) {
        return Holder::Instance;
    }
    Holder::Stranger
}

/// Strikes out the sockets that a process has open; false if it may not be asked.
fn take_sockets(pid: i32, wanted: &mut HashSet<u64>) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let mut readable = false;
    for entry in entries.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        readable = true;
        let inode = target
            .to_str()
            .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        if let Some(inode) = inode {
            wanted.remove(&inode);
        }
    }
    readable
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Listener {
    inode: u64,
    uid: u32,
}

fn listeners(table: &str, port: u16) -> Vec<Listener> {
    let text = fs::read_to_string(table).unwrap_or_default();
    text.lines()
        .skip(1)
        .filter_map(|line| listener(line, port))
        .collect()
}

/// One line of the table, if it listens on the port for 127.0.0.1.
fn listener(line: &str, port: u16) -> Option<Listener> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (address, hex_port) = fields.get(1)?.split_once(':')?;
    if *fields.get(3)? != "0A" || u16::from_str_radix(hex_port, 16).ok()? != port {
        return None;
    }
    let word = |at: usize| -> Option<[u8; 4]> {
        let hex = address.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = if address.len() == 8 {
        IpAddr::from(word(0)?)
    } else {
        let mut bytes = [0; 16];
        for at in 0..4 {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
        }
        IpAddr::from(bytes).to_canonical()
    };
    let here = ip.is_unspecified() || ip == IpAddr::from([127, 0, 0, 1]);
    here.then_some(Listener {
        uid: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_listeners_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 65534        0 4711 1 0000 100 0 0 10 0";
        if cfg!(target_endian = "little") {
            assert_eq!(
                listener(line, 8080),
                Some(Listener {
                    inode: 4711,
                    uid: 65534
                })
            );
        }
        assert_eq!(listener(line, 8081), None);
        assert_eq!(listener(&line.replace(" 0A ", " 01 "), 8080), None);
        let any = "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0:0 00:0 0 7 0 12 1";
        assert_eq!(listener(any, 8080).map(|l| l.inode), Some(12));
    }

    #[test]
    fn a_listener_of_this_process_is_its_own() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = process::getpid().as_raw_nonzero().get();
        let id = InstanceId::random();
        assert_eq!(holder(port, own, id, 1), Holder::Instance);
        assert_eq!(holder(port, 1, id, u32::MAX), Holder::Stranger);
        drop(listener);
        assert_eq!(holder(port, own, id, 1), Holder::Nobody);
    }
}
