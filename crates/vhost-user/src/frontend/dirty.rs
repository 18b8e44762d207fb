//! The log of pages that a back end writes, drained by the VM.

use std::fs::File;
use std::sync::Arc;

use mem::{Bitmap, ForeignMapping, GuestMemory, PAGE_SIZE};

use crate::socket::memfd;
use crate::{Error, Result};

/// A page bitmap in memory that a back end shares: bit `n` is the 4 KiB page at guest address
/// `4096 n`.
#[derive(Debug)]
pub struct PageLog {
    mapping: Arc<ForeignMapping>,
    file: File,
}

impl PageLog {
    /// An empty log for all of `mem`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(mem: &GuestMemory) -> Result<Arc<Self>> {
        let end = mem.regions().iter().map(|r| r.gpa + r.size).max().unwrap_or(0);
        // In words, and in whole pages: some back ends map and set it so.
        let bytes = mem::foreign::log_size(end).next_multiple_of(PAGE_SIZE).max(PAGE_SIZE);
        let host = |source| Error::Host { what: "no memory for the dirty log", source };
        let file = memfd(c"vhost-log", bytes).map_err(host)?;
        let dup = file.try_clone().map_err(host)?;
        let mapping = ForeignMapping::map(dup, 0, bytes);
        let mapping = mapping.map_err(|e| host(std::io::Error::other(e.to_string())))?;
        Ok(Arc::new(Self { mapping, file }))
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.size()
    }

    /// What to send to the back end.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Takes what was logged of the `pages` pages from guest address `gpa` (both whole multiples of
    /// 4 KiB times 8 are fastest) and ORs it into `pending`, whose bit 0 is the page at `gpa`.
    /// Returns how many bits were newly set there.
    pub fn harvest(&self, gpa: u64, pages: u64, pending: &Bitmap) -> u64 {
        let first = gpa / PAGE_SIZE;
        let end = first.saturating_add(pages).min(self.bytes() * 8);
        let mut new = 0;
        let mut page = first;
        while page < end {
            let bit = page % 8;
            let n = (8 - bit).min(end - page);
            let mask = ((0xff_u16 >> (8 - n)) << bit) as u8;
            let mut taken = self.mapping.take_bits(page / 8, mask) >> bit;
            while taken != 0 {
                let i = u64::from(taken.trailing_zeros());
                let at = page - first + i;
                new += u64::from(!pending.test(at));
                pending.set(at);
                taken &= taken - 1;
            }
            page += n;
        }
        new
    }
}
