//! A writer of initramfs archives: cpio's "newc" format, as the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst describes it.

use std::path::Path;

use crate::Result;

const FILE: u32 = 0o100_000;
const DIR: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const CHAR: u32 = 0o020_000;

/// An archive under construction, in memory. Parents have to be added before their children.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Starts an archive.
    pub fn new() -> Self {
        Self::default()
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, rdev: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("an initramfs file is below 4 GiB");
        let name_len = name.len() as u32 + 1;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, rdev.0, rdev.1, name_len, 0]
            .map(|v| format!("{v:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    /// Adds a directory.
    pub fn dir(&mut self, name: &str) {
        self.entry(name, DIR | 0o755, (0, 0), &[]);
    }

    /// Adds a file with permissions `mode`.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entry(name, FILE | mode, (0, 0), data);
    }

    /// Adds a copy of a file of this machine.
    pub fn copy(&mut self, name: &str, mode: u32, from: &Path) -> Result<()> {
        let data =
            std::fs::read(from).map_err(|e| format!("cannot read {}: {e}", from.display()))?;
        self.file(name, mode, &data);
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, to: &str) {
        self.entry(name, LINK | 0o777, (0, 0), to.as_bytes());
    }

    /// Adds a character device.
    pub fn char_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHAR | 0o600, (major, minor), &[]);
    }

    /// Ends the archive. Archives can be concatenated.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        while !self.bytes.len().is_multiple_of(512) {
            self.bytes.push(0);
        }
        self.bytes
    }
}
