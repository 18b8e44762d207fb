//! Guest RAM from the description: size, backend object, NUMA.

use mem::{Backing, BackingKind, GuestMemory};
use qapi::cmdline::value::bytes;
use spec::{MemoryBackend, MemoryKind};

use crate::layout;

/// Least RAM: what boot data and a kernel need.
const MIN_RAM: u64 = 2 << 20;

/// RAM that no other process needs: the kernel backs it with transparent huge pages, which it does
/// not do for memfds (as Debian sets it), and with them a guest boots, runs and moves much faster.
const PRIVATE: Backing = Backing { kind: BackingKind::Anonymous, share: false, prealloc: false };

/// Makes the machine's RAM.
///
/// # Errors
/// Sentences that name the option.
pub fn build(spec: &spec::Machine) -> Result<GuestMemory, String> {
    let size = spec.memory;
    if !(MIN_RAM..=layout::MAX_RAM).contains(&size) || !size.is_multiple_of(mem::PAGE_SIZE) {
        return Err(format!(
            "{} of RAM (-m, --memory of tern run, or an -object memory-backend-*): expected {} to {} in \
             whole 4 KiB pages",
            bytes(size),
            bytes(MIN_RAM),
            bytes(layout::MAX_RAM)
        ));
    }
    let object = backend(spec)?;
    if let Some(MemoryBackend { id, kind: MemoryKind::File { path }, prealloc: false, .. }) = object
        && let Some(room) = mem::lacks_room(path, size)
    {
        crate::tell!(
            "tern: warning: -object memory-backend-file,id={id}: the file system of {} has room for \
             {} of {}; the VM ends with SIGBUS when its guest gets so far (prealloc=on finds out at \
             the start)",
            path.display(),
            bytes(room),
            bytes(size)
        );
    }
    let made = GuestMemory::new(&layout::ram(size), &object.map_or(PRIVATE, backing));
    made.map_err(|e| match object {
        Some(MemoryBackend { id, kind: MemoryKind::Memfd { hugetlb: Some(page) }, .. }) => format!(
            "-object memory-backend-memfd,id={id}: {e}; it needs {} free huge pages of {}, see \
             /sys/kernel/mm/hugepages",
            size.div_ceil(*page),
            bytes(*page)
        ),
        Some(b) => format!("-object {},id={}: {e}", name(&b.kind), b.id),
        None => format!("-m: {e}"),
    })
}

fn name(kind: &MemoryKind) -> &'static str {
    match kind {
        MemoryKind::Ram => "memory-backend-ram",
        MemoryKind::Memfd { .. } => "memory-backend-memfd",
        MemoryKind::File { .. } => "memory-backend-file",
    }
}

fn find<'a>(spec: &'a spec::Machine, id: &str) -> Result<&'a MemoryBackend, String> {
    let found = spec.memory_backends.iter().find(|b| b.id == id);
    found.ok_or_else(|| {
        format!("memory backend '{id}' not found; add -object memory-backend-...,id={id}")
    })
}

/// The backend of all RAM: the machine's, or the NUMA nodes' (which must be of one kind).
fn backend(spec: &spec::Machine) -> Result<Option<&MemoryBackend>, String> {
    if let Some(id) = &spec.memory_backend {
        let b = find(spec, id)?;
        if b.size != spec.memory {
            return Err(format!(
                "-machine memory-backend={id}: it has {}, -m says {}",
                bytes(b.size),
                bytes(spec.memory)
            ));
        }
        return Ok(Some(b));
    }
    let nodes: Vec<_> = spec.numa.iter().filter_map(|n| n.memdev.as_deref()).collect();
    let backends = nodes.iter().map(|id| find(spec, id)).collect::<Result<Vec<_>, _>>()?;
    let Some(first) = backends.first() else { return Ok(None) };
    let alike = |b: &&MemoryBackend| {
        b.share == first.share && b.prealloc == first.prealloc && same_kind(&b.kind, &first.kind)
    };
    if !backends.iter().all(alike) {
        return Err("-numa: the nodes' memory backends must be of one kind and page size".into());
    }
    Ok(Some(first))
}

fn same_kind(a: &MemoryKind, b: &MemoryKind) -> bool {
    match (a, b) {
        (MemoryKind::File { path: a }, MemoryKind::File { path: b }) => a == b && a.is_dir(),
        _ => a == b,
    }
}

fn backing(b: &MemoryBackend) -> Backing {
    let (kind, share) = match &b.kind {
        // Shared RAM has to be a file of some kind for others to map it.
        MemoryKind::Ram if b.share => (BackingKind::Memfd { hugetlb: None }, true),
        MemoryKind::Ram => (BackingKind::Anonymous, false),
        // A memfd that is passed to nobody is as private as anonymous memory; mapped shared, its
        // holes say which pages were never touched.
        MemoryKind::Memfd { hugetlb } => (BackingKind::Memfd { hugetlb: *hugetlb }, true),
        MemoryKind::File { path } => (BackingKind::File { path: path.clone() }, b.share),
    };
    Backing { kind, share, prealloc: b.prealloc }
}
