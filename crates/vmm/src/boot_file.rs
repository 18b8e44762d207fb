//! A file that is loaded at power-on and again at every reset.

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::boot::Error;

/// Opened once, when the machine is made: a daemon leaves the directory that a relative name is in,
/// and a file that is removed, or replaced by a package's upgrade, is still what the machine has.
pub struct BootFile {
    /// What stands before its name in errors: its option, as one writes it.
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl BootFile {
    /// Opens it for reading.
    ///
    /// # Errors
    /// [`Error::Open`]; also of what is no regular file.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        // Non-blocking: a FIFO is refused below instead of being waited for.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let named = |source| Error::Open { what, path: path.display().to_string(), source };
        let file = file.map_err(named)?;
        if !file.metadata().map_err(named)?.is_file() {
            return Err(named(std::io::Error::other("not a regular file")));
        }
        Ok(Self { what, path: path.to_owned(), file })
    }

    pub fn what(&self) -> &'static str {
        self.what
    }

    /// Its name, as it was given.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Bytes.
    pub fn size(&self) -> Result<u64, Error> {
        Ok(self.file.metadata().map_err(|e| self.error(e))?.len())
    }

    /// The file from its beginning. Readers share their position: one at a time.
    pub fn reader(&self) -> Result<File, Error> {
        let rewound = self.file.try_clone().and_then(|mut file| file.rewind().map(|()| file));
        rewound.map_err(|e| self.error(e))
    }

    /// What went wrong with it.
    pub fn error(&self, source: std::io::Error) -> Error {
        Error::Open { what: self.what, path: self.path(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_fifo_is_refused_at_once() {
        let path = std::env::temp_dir().join(format!("tern-fifo-{}", std::process::id()));
        let status = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(status.success());
        let error = BootFile::open("-kernel ", &path).map(drop).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("not a regular file"), "{error}");
    }

    #[test]
    fn a_file_that_is_replaced_stays_what_it_was() {
        let path = std::env::temp_dir().join(format!("tern-boot-file-{}", std::process::id()));
        std::fs::write(&path, "old").unwrap();
        let file = BootFile::open("-kernel ", &path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another").unwrap();
        for _ in 0..2 {
            let mut text = String::new();
            file.reader().unwrap().read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), file.size().unwrap()), ("old", 3));
        }
        std::fs::remove_file(&path).unwrap();
    }
}
