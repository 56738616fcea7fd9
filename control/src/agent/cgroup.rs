//! A control group for each instance, where the kernel has cgroup v2 and lets
//! the agent divide its own: whatever an instance starts stays in its group,
//! under another session and without its environment too, and dies with it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::model::InstanceId;

/// For SIGKILL to have its effect.
const BOUND: Duration = Duration::from_secs(2);

/// Where this process's group is, and the root of what is seen of the hierarchy.
struct Place {
    root: PathBuf,
    own: PathBuf,
}

impl Place {
    fn find() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        Self::of(&mounts, &groups)
    }

    fn of(mounts: &str, groups: &str) -> Option<Self> {
        let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        let (shown, root) = mounts.lines().find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let found = (fields.next()?, fields.next()?);
            kind.starts_with("cgroup2 ").then_some(found)
        })?;
        let below = Path::new(path).strip_prefix(shown).ok()?;
        // One that is outside of what is seen.
        let inside = below.components().all(|c| c.as_os_str() != "..");
        inside.then(|| Self {
            root: root.into(),
            own: Path::new(root).join(below),
        })
    }
}

/// The groups of one agent's instances.
pub(super) struct Groups(Arc<Owned>);

/// A group that this process made, and removes when it is empty.
struct Owned(PathBuf);

impl Drop for Owned {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.0));
    }
}

impl Groups {
    /// None where there is no such thing here, or it isn't this process's to divide.
    pub(super) fn open(agent: &str) -> Option<Self> {
        let dir = Place::find()?.own.join(name(agent));
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
            _ => (),
        }
        let owned = Owned(dir);
        // Kernels before 5.14 lack it.
        owned
            .0
            .join("cgroup.kill")
            .exists()
            .then(|| Self(Arc::new(owned)))
    }

    /// Makes the group of an instance that starts.
    pub(super) fn group(&self, instance: InstanceId) -> io::Result<Group> {
        let dir = self.0.0.join(instance.to_string());
        // An empty one above may have been tidied away.
        fs::create_dir_all(&dir)?;
        let members = OpenOptions::new()
            .write(true)
            .open(dir.join("cgroup.procs"))?;
        Ok(Group {
            members,
            dir: Owned(dir),
            _above: Arc::clone(&self.0),
        })
    }
}

/// One instance's.
pub(super) struct Group {
    members: File,
    dir: Owned,
    /// Goes after this.
    _above: Arc<Owned>,
}

impl Group {
    /// A process joins by writing `0` to this, between its fork and its exec.
    pub(super) fn door(&self) -> io::Result<File> {
        self.members.try_clone()
    }

    /// Puts a process in, where it could not join by itself.
    pub(super) fn put(&self, pid: i32) {
        // One that has ended meanwhile has left nothing, or it is found by its environment.
        drop((&self.members).write_all(pid.to_string().as_bytes()));
    }

    /// Kills all that is in it; says how many there were.
    pub(super) fn kill(&self) -> usize {
        kill(&self.dir.0)
    }
}

fn name(agent: &str) -> String {
    format!("weir-{agent}")
}

fn kill(group: &Path) -> usize {
    let members = || fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let began = Instant::now();
    let killed = members().lines().count();
    while !members().is_empty() && began.elapsed() < BOUND {
        drop(fs::write(group.join("cgroup.kill"), "1"));
        std::thread::sleep(Duration::from_millis(2));
    }
    killed
}

/// Kills what an earlier run of this agent left behind, in whichever group it ran.
pub(super) fn kill_orphans(agent: &str) -> usize {
    fn below(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let dirs = entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.map(|e| e.path()).collect()
    }
    let name = name(agent);
    let mut killed = 0;
    let mut left: Vec<PathBuf> = Place::find().map(|place| place.root).into_iter().collect();
    while let Some(dir) = left.pop() {
        if dir.file_name().is_some_and(|n| *n == *name) {
            for group in below(&dir) {
                killed += kill(&group);
                drop(fs::remove_dir(group));
            }
            drop(fs::remove_dir(dir));
        } else {
            left.extend(below(&dir));
        }
    }
    killed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_where_it_is_seen() {
        let line = |shown: &str| {
            format!(
                "30 23 0:26 / /proc rw - proc proc rw\n42 30 0:29 {shown} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
            )
        };
        let own = |shown: &str, groups: &str| {
            Place::of(&line(shown), groups).map(|p| p.own.to_str().unwrap().to_owned())
        };
        let deep = "1:cpu:/x\n0::/system.slice/weir.service\n";
        assert_eq!(
            own("/", deep).unwrap(),
            "/sys/fs/cgroup/system.slice/weir.service"
        );
        assert_eq!(
            own("/system.slice", deep).unwrap(),
            "/sys/fs/cgroup/weir.service"
        );
        assert_eq!(own("/other", deep), None);
        assert_eq!(own("/", "0::/../a\n"), None);
        assert_eq!(own("/", "1:cpu:/x\n"), None);
        assert!(Place::of("", deep).is_none());
    }
}
