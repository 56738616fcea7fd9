//! Files that are nobody else's: not to read, nor to lock. Instances run on
//! the same machine, and often as another user.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

/// Makes a directory, and what leads to it, where it is missing. One that is there is somebody's choice.
///
/// # Errors
/// When it can't be made.
pub fn directory(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

/// Opens a file to read and write, making it where it is missing. One that an earlier version left open to all is
/// closed to them.
pub(crate) fn file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_made_is_nobody_elses_and_a_directory_that_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("a/b");
        directory(&made).unwrap();
        directory(&made).unwrap();
        assert_eq!(mode(&made), 0o700);
        let there = dir.path().join("a");
        fs::set_permissions(&there, Permissions::from_mode(0o755)).unwrap();
        directory(&there).unwrap();
        assert_eq!(mode(&there), 0o755);
        let path = made.join("file");
        file(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        file(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert!(directory(&path).is_err());
    }
}
