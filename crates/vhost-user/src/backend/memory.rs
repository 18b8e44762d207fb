//! The guest's memory as a front end lends it: which regions there are, and how its own addresses
//! become guest addresses.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mem::{ForeignMapping, ForeignRegion};

use crate::message::{MemRegion, overlap};

/// Most regions at a time, with ADD_MEM_REG: what KVM has slots for.
pub const MAX_SLOTS: usize = 509;

/// Most bytes of one front end's memory: more than any machine has, and little enough that a few
/// front ends with sparse files of any size leave the others room.
pub const MAX_BYTES: u64 = 16 << 40;

/// Most bytes of a dirty log, and of in-flight tables: a log of all 2^52 bytes that machines of today can
/// address, or tables for 256 rings of 32,768 entries many times over.
pub const MAX_TABLES: u64 = 1 << 37;

/// Maps `size` bytes of `file` that are not guest memory, but `what`.
///
/// # Errors
/// A sentence: too many, or why they cannot be mapped.
pub fn map_table(
    what: &str,
    file: OwnedFd,
    offset: u64,
    size: u64,
) -> Result<Arc<ForeignMapping>, String> {
    if size > MAX_TABLES {
        return Err(format!("{what}: {size:#x} bytes; at most {MAX_TABLES:#x} are taken"));
    }
    ForeignMapping::map(file.into(), offset, size).map_err(|e| format!("{what}: {e}"))
}

/// The regions, by their user address.
#[derive(Debug, Default, Clone)]
pub struct MemoryTable(Vec<(MemRegion, Arc<ForeignMapping>)>);

impl MemoryTable {
    /// Maps a whole table; regions that `old` has already are taken from there.
    ///
    /// # Errors
    /// A sentence: which region cannot be mapped, and why.
    pub fn new(regions: &[MemRegion], fds: Vec<OwnedFd>, old: &Self) -> Result<Self, String> {
        let mut table = Self::default();
        for (region, fd) in regions.iter().zip(fds) {
            table.has_room(region)?;
            let mapping = match old.same(region, fd) {
                Ok(mapping) => mapping,
                Err(file) => map(region, file)?,
            };
            table.insert(*region, mapping)?;
        }
        Ok(table)
    }

    /// The mapping of the same region of the same file, or the file back.
    fn same(&self, region: &MemRegion, fd: OwnedFd) -> Result<Arc<ForeignMapping>, std::fs::File> {
        let file = std::fs::File::from(fd);
        let found = self
            .0
            .iter()
            .find(|(r, m)| r == region && m.is_same(&file, region.mmap_offset, region.size));
        found.map(|(_, m)| m.clone()).ok_or(file)
    }

    fn has_room(&self, region: &MemRegion) -> Result<(), String> {
        let sizes = self.0.iter().map(|(r, _)| r.size).chain([region.size]);
        match sizes.fold(0, u64::saturating_add) {
            0..=MAX_BYTES => Ok(()),
            sum => Err(format!("{sum:#x} bytes of memory; at most {MAX_BYTES:#x} are taken")),
        }
    }

    fn insert(&mut self, region: MemRegion, mapping: Arc<ForeignMapping>) -> Result<(), String> {
        self.0.iter().try_for_each(|(r, _)| overlap(r, &region))?;
        let whole = |n: u64| n.is_multiple_of(mem::PAGE_SIZE);
        if !whole(region.guest_addr) || !whole(region.size) {
            let (gpa, size) = (region.guest_addr, region.size);
            return Err(format!("region {gpa:#x}, {size:#x} bytes: must be whole 4 KiB pages"));
        }
        self.0.push((region, mapping));
        Ok(())
    }

    /// Maps one more region.
    ///
    /// # Errors
    /// A sentence: too many regions, an overlap, or why it cannot be mapped.
    pub fn add(&mut self, region: MemRegion, fd: OwnedFd) -> Result<(), String> {
        if self.0.len() >= MAX_SLOTS {
            return Err(format!("there are {MAX_SLOTS} regions already, the most there can be"));
        }
        self.0.iter().try_for_each(|(r, _)| overlap(r, &region))?;
        self.has_room(&region)?;
        let mapping = map(&region, fd.into())?;
        self.insert(region, mapping)
    }

    /// Forgets the region with these addresses and this size.
    ///
    /// # Errors
    /// A sentence if there is none.
    pub fn remove(&mut self, region: &MemRegion) -> Result<(), String> {
        let key = |r: &MemRegion| (r.guest_addr, r.user_addr, r.size);
        let at = self.0.iter().position(|(r, _)| key(r) == key(region));
        let at = at.ok_or_else(|| {
            let (gpa, user) = (region.guest_addr, region.user_addr);
            format!("there is no region at guest address {gpa:#x} and user address {user:#x}")
        })?;
        self.0.remove(at);
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn is_broken(&self) -> bool {
        self.0.iter().any(|(_, m)| m.is_broken())
    }

    /// The guest address of the front end's address `user`.
    pub fn translate(&self, user: u64) -> Option<u64> {
        self.0.iter().find_map(|(r, _)| r.translate(user, 1))
    }

    /// What guest memory is made of.
    pub fn regions(&self) -> Vec<ForeignRegion> {
        let region = |(r, m): &(MemRegion, Arc<ForeignMapping>)| ForeignRegion {
            gpa: r.guest_addr,
            mapping: m.clone(),
        };
        self.0.iter().map(region).collect()
    }

    /// The regions with our addresses instead of the front end's: what post-copy wants to know.
    pub fn with_own_addresses(&self) -> Vec<MemRegion> {
        let own = |(r, m): &(MemRegion, Arc<ForeignMapping>)| MemRegion {
            user_addr: m.as_ptr() as u64,
            ..*r
        };
        self.0.iter().map(own).collect()
    }
}

fn map(region: &MemRegion, file: std::fs::File) -> Result<Arc<ForeignMapping>, String> {
    ForeignMapping::map(file, region.mmap_offset, region.size)
        .map_err(|e| format!("region at guest address {:#x}: {e}", region.guest_addr))
}
