//! The smallest kernel that boots: for tests of the VMM that need a guest and no Linux.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::Context;
use crate::vmm::Config;

/// A VMM `program` of 16 MiB with one CPU, that kernel and a disk of 64 KiB; its files are made in
/// `dir`.
///
/// # Errors
/// When they cannot be written.
pub fn config(program: &str, dir: &Path) -> Result<Config> {
    let file = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, bytes).context(|| format!("{}", path.display()))?;
        Ok(path)
    };
    Ok(Config {
        program: program.into(),
        name: "tiny".into(),
        kvm: true,
        memory_mib: 16,
        cpus: 1,
        kernel: file("kernel", &kernel())?,
        initrd: file("initrd", b"none")?,
        append: String::new(),
        disk: Some(file("disk", &[0; 1 << 16])?),
        incoming: None,
        extra: Vec::new(),
    })
}

/// Whether this host has a KVM, for tests that are skipped without; says so if not.
pub fn has_kvm() -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    opened.map_err(|e| eprintln!("skipped: /dev/kvm: {e}")).is_ok()
}

/// An ELF kernel with a PVH entry that is `jmp .`; Xen's public note format and the ELF
/// specification say what is where.
pub fn kernel() -> Vec<u8> {
    const AT: u64 = 0x10_0000;
    let mut elf = Vec::new();
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&AT.to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&[0; 12]);
    for half in [64u16, 56, 2, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, offset: u64, bytes: u64, align: u64| {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for word in [offset, AT, AT, bytes, bytes, align] {
            put(&word.to_le_bytes());
        }
    };
    let headers = 64 + 2 * 56;
    segment(1, 5, headers + 20, 2, 1);
    segment(4, 4, headers, 20, 4);
    // XEN_ELFNOTE_PHYS32_ENTRY of "Xen".
    for word in [4u32, 4, 18] {
        put(&word.to_le_bytes());
    }
    put(b"Xen\0");
    put(&(AT as u32).to_le_bytes());
    put(&[0xeb, 0xfe]);
    elf
}
