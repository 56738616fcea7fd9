//! The files that a benchmark writes at its end.

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::Context;

/// Fails where the file could not be written: what a run of minutes found is
/// not to be lost for a wrong name. Leaves everything as it is.
pub(crate) fn writable(path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else {
        return Ok(());
    };
    let was_there = path.exists();
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("could not write {}", path.display()))?;
    if !was_there {
        // It will be made again; if not, it is empty.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("could not write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_written_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        writable(None).unwrap();
        writable(Some(&path)).unwrap();
        assert!(!path.exists());
        write(&path, "before").unwrap();
        writable(Some(&path)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before");
        assert!(writable(Some(directory.path())).is_err());
        assert!(writable(Some(&directory.path().join("no/file"))).is_err());
    }
}
