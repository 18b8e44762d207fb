//! Direct kernel boot: bzImage by Linux's 64-bit boot protocol, ELF by PVH; initrd, command line,
//! memory map. Sources: Linux Documentation/arch/x86/boot.rst; Xen's PVH direct boot ABI.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use hv::BootEntry;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use mem::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::boot_file::BootFile;
use crate::{elf, layout};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const HDRS_MAGIC: u32 = 0x5372_6448;
const PVH_MAGIC: u32 = 0x336e_c578;
/// Where 64-bit code begins in a bzImage's protected-mode part (boot.rst, "64-bit boot protocol").
const ENTRY_64: u64 = 0x200;
/// `xloadflags` bit 0: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;

/// What can be wrong with what is to be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is nothing to boot: give -kernel FILE (firmware is not built in yet)")]
    Nothing,
    #[error("{what}{path}: cannot open it: {source}")]
    Open { what: &'static str, path: String, source: std::io::Error },
    #[error(
        "-kernel {path}: not a Linux kernel that Tern can start ({reason}); a bzImage or an ELF vmlinux with a PVH entry is needed"
    )]
    NoKernel { path: String, reason: String },
    #[error(
        "{what}{path} ({size} bytes) does not fit into the guest's memory; give it more with -m"
    )]
    TooLarge { what: &'static str, path: String, size: u64 },
    #[error("-append: the kernel command line has {len} bytes, at most {max} fit")]
    CommandLine { len: usize, max: usize },
    #[error("guest memory: {0}")]
    Memory(#[from] mem::Error),
    #[error(
        "-device loader,file={path}: it is {format}, which is not unpacked; force-raw=on loads its bytes as they are"
    )]
    Format { path: String, format: &'static str },
    #[error("-device loader,file={path}: {size} bytes at {addr:#x} are not all in the guest's RAM")]
    NotRam { path: String, addr: u64, size: u64 },
}

/// What a machine boots from, open as long as the machine is there.
pub struct Files {
    kernel: BootFile,
    initrd: Option<BootFile>,
    append: String,
    loads: Vec<Load>,
}

/// Bytes that are put into RAM as they are, at `addr`.
struct Load {
    file: BootFile,
    addr: u64,
    raw: bool,
}

impl Files {
    /// Opens what `spec` names.
    ///
    /// # Errors
    /// [`Error::Open`]; [`Error::Nothing`] without a kernel.
    pub fn open(spec: &spec::Machine) -> Result<Self, Error> {
        let boot = &spec.boot;
        let kernel = boot.kernel.as_deref().ok_or(Error::Nothing)?;
        let kernel = BootFile::open("-kernel ", kernel)?;
        let initrd = boot.initrd.as_deref().map(|path| BootFile::open("-initrd ", path));
        let load = |load: &spec::Load| {
            let file = BootFile::open("-device loader,file=", &load.file)?;
            Ok(Load { file, addr: load.addr, raw: load.raw })
        };
        let loads = spec.loads.iter().map(load).collect::<Result<_, Error>>()?;
        Ok(Self { kernel, initrd: initrd.transpose()?, append: boot.append.clone(), loads })
    }

    /// Loads kernel, initrd and command line into `mem` and says where vCPU 0 starts. `rsdp` is the
    /// guest address of the ACPI root pointer.
    pub fn load(&self, mem: &GuestMemory, rsdp: u64) -> Result<BootEntry, Error> {
        let mut file = self.kernel.reader()?;
        let cmdline = command_line(mem, &self.append)?;
        gdt(mem)?;
        if is_bzimage(&mut file) {
            bzimage(mem, self, file, cmdline, rsdp)
        } else if elf::is_elf(&mut file) {
            pvh(mem, self, file, rsdp)
        } else {
            let reason = "it is neither a bzImage nor an ELF file".into();
            Err(Error::NoKernel { path: self.kernel.path(), reason })
        }
    }

    /// Puts the bytes of the other files into `mem`, in the order in which they were given.
    pub fn load_bytes(&self, mem: &GuestMemory) -> Result<(), Error> {
        self.loads.iter().try_for_each(|load| load_bytes(mem, load))
    }
}

fn load_bytes(mem: &GuestMemory, load: &Load) -> Result<(), Error> {
    let path = load.file.path();
    let mut file = load.file.reader()?;
    let named = |source| load.file.error(source);
    let size = load.file.size()?;
    if !load.raw
        && let Some(format) = format(&mut file).map_err(named)?
    {
        return Err(Error::Format { path, format });
    }
    let (mut at, mut left) = (load.addr, size);
    while left > 0 {
        let outside = || Error::NotRam { path: path.clone(), addr: load.addr, size };
        let most = left.min(1 << 30) as usize;
        // Up to the end of a region: RAM may go on in the next.
        let len = mem.slice_up_to(at, most).map_err(|_| outside())?.len();
        mem.mmap()
            .read_exact_volatile_from(GuestAddress(at), &mut file, len)
            .map_err(|e| named(std::io::Error::other(e)))?;
        mem.mark_dirty(at, len as u64);
        left -= len as u64;
        at = at.checked_add(len as u64).ok_or_else(outside)?;
    }
    Ok(())
}

/// What QEMU's loader would not take for plain bytes.
fn format(file: &mut File) -> std::io::Result<Option<&'static str>> {
    let mut magic = Vec::new();
    Read::by_ref(file).take(4).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(match magic[..] {
        [0x7f, b'E', b'L', b'F'] => Some("an ELF file"),
        [0x27, 0x05, 0x19, 0x56] => Some("a U-Boot image"),
        [b':', a, b, _] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => {
            Some("an Intel HEX file")
        }
        _ => None,
    })
}

fn is_bzimage(file: &mut File) -> bool {
    let mut magic = [0; 4];
    let read = file.seek(SeekFrom::Start(0x202)).and_then(|_| file.read_exact(&mut magic));
    read.is_ok() && u32::from_le_bytes(magic) == HDRS_MAGIC
}

fn command_line(mem: &GuestMemory, text: &str) -> Result<u32, Error> {
    if text.len() >= layout::COMMAND_LINE_MAX {
        return Err(Error::CommandLine { len: text.len(), max: layout::COMMAND_LINE_MAX - 1 });
    }
    mem.write(layout::COMMAND_LINE, text.as_bytes())?;
    mem.write(layout::COMMAND_LINE + text.len() as u64, &[0])?;
    Ok(layout::COMMAND_LINE as u32)
}

/// Flat 64-bit code, flat 32-bit code and data, as both entries want them.
fn gdt(mem: &GuestMemory) -> Result<(), Error> {
    let entries: [u64; 5] =
        [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
    for (i, e) in entries.iter().enumerate() {
        mem.write(layout::GDT + 8 * i as u64, &e.to_le_bytes())?;
    }
    Ok(())
}

/// Identity map of the first 4 GiB in 2 MiB pages: PML4, PDPT, 4 page directories.
fn page_tables(mem: &GuestMemory) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const HUGE: u64 = 0x80;
    let pdpt = layout::PAGE_TABLES + 0x1000;
    mem.write(layout::PAGE_TABLES, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4u64 {
        let pd = pdpt + 0x1000 * (gib + 1);
        mem.write(pdpt + 8 * gib, &(pd | PRESENT_WRITABLE).to_le_bytes())?;
        for i in 0..512u64 {
            let page = (gib << 30) + (i << 21);
            mem.write(pd + 8 * i, &(page | HUGE | PRESENT_WRITABLE).to_le_bytes())?;
        }
    }
    Ok(())
}

/// The guest's memory map: (start, bytes, E820 type).
fn memory_map(mem: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM_START - layout::LOW_RAM_END, E820_RESERVED),
    ];
    for r in mem.regions() {
        let start = r.gpa.max(layout::HIGH_RAM_START);
        if r.gpa + r.size > start {
            map.push((start, r.gpa + r.size - start, E820_RAM));
        }
    }
    map.push((layout::ECAM, layout::ECAM_SIZE, E820_RESERVED));
    map
}

/// Puts the initrd as high as it may lie below `limit`; returns (address, bytes).
fn initrd(
    mem: &GuestMemory,
    initrd: Option<&BootFile>,
    floor: u64,
    limit: u64,
) -> Result<(u64, u64), Error> {
    let Some(initrd) = initrd else { return Ok((0, 0)) };
    let mut file = initrd.reader()?;
    let named = |source| initrd.error(source);
    let size = initrd.size()?;
    let end = mem.regions().first().map_or(0, |r| r.size).min(limit);
    let too_large = || Error::TooLarge { what: initrd.what(), path: initrd.path(), size };
    let start = end.checked_sub(size).ok_or_else(too_large)? & !0xfff;
    if start < floor {
        return Err(too_large());
    }
    let mut at = start;
    let mut buf = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buf).map_err(named)?;
        if n == 0 {
            return Ok((start, at - start));
        }
        if at + n as u64 > start + size {
            return Err(too_large()); // the file grew
        }
        mem.write(at, &buf[..n])?;
        at += n as u64;
    }
}

fn bzimage(
    mem: &GuestMemory,
    files: &Files,
    mut file: File,
    cmdline: u32,
    rsdp: u64,
) -> Result<BootEntry, Error> {
    let kernel = &files.kernel;
    let bad = |reason: String| Error::NoKernel { path: kernel.path(), reason };
    let size = kernel.size()?;
    let start = GuestAddress(layout::HIGH_RAM_START);
    let room = mem.regions().first().map_or(0, |r| r.size).saturating_sub(start.0);
    if size > room {
        return Err(Error::TooLarge { what: kernel.what(), path: kernel.path(), size });
    }
    // The real-mode part's sectors (0 is 4) after the boot sector: without them nothing follows.
    let mut sectors = [0];
    let read = file.seek(SeekFrom::Start(0x1f1)).and_then(|_| file.read_exact(&mut sectors));
    read.map_err(|e| bad(e.to_string()))?;
    let setup = (u64::from(if sectors[0] == 0 { 4 } else { sectors[0] }) + 1) * 512;
    if size <= setup {
        return Err(bad(format!("it is cut off: {size} bytes are fewer than its header says")));
    }
    let loaded = BzImage::load(mem.mmap(), Some(start), &mut file, Some(start))
        .map_err(|e| bad(plain(&e)))?;
    let mut header: setup_header =
        loaded.setup_header.ok_or_else(|| bad("it has no setup header".into()))?;
    // Both in boot.rst, "The Real-Mode Kernel Header"; the last paragraph may be cut short.
    let protected = u64::from(header.syssize).saturating_sub(1) * 16;
    if loaded.kernel_end - start.0 < protected {
        return Err(bad(format!("it is cut off: {size} bytes are fewer than its header says")));
    }
    let (len, max) = (files.append.len(), header.cmdline_size as usize);
    if len > max && max != 0 {
        return Err(Error::CommandLine { len, max });
    }
    if header.version < 0x020c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(bad("it has no 64-bit entry point (boot protocol 2.12)".into()));
    }
    // The kernel unpacks itself to pref_address, init_size bytes: nothing may lie there.
    let pref = header.pref_address;
    let unpacked = pref.max(start.0).saturating_add(header.init_size.into());
    let floor = unpacked.max(loaded.kernel_end);
    let low = mem.regions().first().map_or(0, |r| r.size);
    if floor > low {
        let what = "the unpacked kernel ";
        return Err(Error::TooLarge { what, path: kernel.path(), size: floor });
    }
    let limit = u64::from(header.initrd_addr_max).max(0x37ff_ffff) + 1;
    let (address, bytes) = initrd(mem, files.initrd.as_ref(), floor, limit)?;
    header.type_of_loader = 0xff;
    header.ramdisk_image = address as u32;
    header.ramdisk_size = bytes as u32;
    header.cmd_line_ptr = cmdline;
    header.cmdline_size = len as u32;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    for (i, (addr, size, type_)) in memory_map(mem).into_iter().enumerate() {
        params.e820_table[i] = boot_e820_entry { addr, size, r#type: type_ };
        params.e820_entries = i as u8 + 1;
    }
    let write = mem.mmap().write_obj(params, GuestAddress(layout::BOOT_PARAMS));
    write.map_err(|e| bad(e.to_string()))?;
    page_tables(mem)?;
    Ok(BootEntry::Long {
        rip: layout::HIGH_RAM_START + ENTRY_64,
        rsi: layout::BOOT_PARAMS,
        page_table: layout::PAGE_TABLES,
        gdt: layout::GDT,
    })
}

fn pvh(mem: &GuestMemory, files: &Files, mut file: File, rsdp: u64) -> Result<BootEntry, Error> {
    let bad = |reason: String| Error::NoKernel { path: files.kernel.path(), reason };
    file.rewind().map_err(|e| bad(e.to_string()))?;
    let start = Some(GuestAddress(layout::HIGH_RAM_START));
    let ram = |at: u64, len: u64| {
        let end = at.checked_add(len);
        at >= layout::HIGH_RAM_START
            && mem.regions().iter().any(|r| at >= r.gpa && end.is_some_and(|e| e <= r.gpa + r.size))
    };
    let segments = elf::segments(&mut file, ram).map_err(bad)?;
    let loaded = Elf::load(mem.mmap(), None, &mut file, start).map_err(|e| bad(plain(&e)))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(bad("the ELF file has no PVH entry note".into()));
    };
    if !segments.iter().any(|(at, len)| (*at..at + len).contains(&entry.0)) {
        return Err(bad(format!("its PVH entry {:#x} is in none of its segments", entry.0)));
    }
    let (address, bytes) = initrd(mem, files.initrd.as_ref(), loaded.kernel_end, 1 << 32)?;
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMMAP,
        ..Default::default()
    };
    if bytes > 0 {
        let module = hvm_modlist_entry { paddr: address, size: bytes, ..Default::default() };
        put(mem, layout::PVH_MODULES, module)?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    for (i, (addr, size, type_)) in memory_map(mem).into_iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        let at = layout::PVH_MEMMAP + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        put(mem, at, entry)?;
        info.memmap_entries = i as u32 + 1;
    }
    put(mem, layout::PVH_START_INFO, info)?;
    Ok(BootEntry::Pvh { rip: entry.0, start_info: layout::PVH_START_INFO, gdt: layout::GDT })
}

/// What the loader says, without the names of its parts before it.
fn plain(error: &linux_loader::loader::Error) -> String {
    let text = error.to_string();
    text.rsplit("Kernel Loader: ").next().unwrap_or(&text).to_owned()
}

fn put<T: vm_memory::ByteValued>(mem: &GuestMemory, at: u64, value: T) -> Result<(), Error> {
    Ok(mem.write(at, value.as_slice())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::{Backing, PAGE_SIZE, RegionSpec};

    /// What is said of a kernel of these bytes, with 16 MiB of RAM.
    fn load_kernel(name: &str, bytes: &[u8], append: &str) -> Result<BootEntry, Error> {
        let mem = GuestMemory::new(&[RegionSpec { gpa: 0, size: 16 << 20 }], &Backing::default())
            .unwrap();
        let file = std::env::temp_dir().join(format!("tern-{name}-{}", std::process::id()));
        std::fs::write(&file, bytes).unwrap();
        let boot = spec::Boot { kernel: Some(file.clone()), append: append.into(), initrd: None };
        let files = Files::open(&spec::Machine { boot, ..spec::Machine::default() }).unwrap();
        let result = files.load(&mem, layout::ACPI_TABLES);
        std::fs::remove_file(&file).unwrap();
        result
    }

    /// A bzImage of 4 KiB that may be changed.
    fn tiny_bzimage(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut b = vec![0; 8192];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[7]); // 8 sectors of setup: half of the file
        put(0x1f4, &(4096u32 / 16).to_le_bytes());
        put(0x202, &HDRS_MAGIC.to_le_bytes());
        put(0x206, &0x020fu16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &0x10_0000u64.to_le_bytes());
        put(0x260, &0x10_0000u32.to_le_bytes());
        change(&mut b);
        b
    }

    #[test]
    fn bzimages_are_taken_whole_or_not_at_all() {
        let said = |name, bytes: &[u8], append: &str| {
            load_kernel(name, bytes, append).map(drop).map_err(|e| e.to_string())
        };
        said("bz", &tiny_bzimage(|_| {}), "console=ttyS0").unwrap();
        let cut = said("bz-cut", &tiny_bzimage(|b| b.truncate(6000)), "").unwrap_err();
        assert!(cut.contains("cut off"), "{cut}");
        let cut = said("bz-short", &tiny_bzimage(|b| b.truncate(3000)), "").unwrap_err();
        assert!(cut.contains("cut off"), "{cut}");
        let long = said("bz-cmd", &tiny_bzimage(|_| {}), &"x".repeat(2048)).unwrap_err();
        assert!(long.contains("at most 2047"), "{long}");
        let far = tiny_bzimage(|b| b[0x258..0x260].fill(0xff));
        assert!(said("bz-far", &far, "").unwrap_err().contains("does not fit"));
        let neither = said("text", b"hello", "").unwrap_err();
        assert!(neither.contains("neither a bzImage nor an ELF file"), "{neither}");
    }

    #[test]
    fn loads_bytes_over_the_gap_between_regions_or_says_what_is_wrong() {
        let page = PAGE_SIZE;
        let specs = [
            RegionSpec { gpa: 0, size: 2 * page },
            RegionSpec { gpa: 2 * page, size: page },
            RegionSpec { gpa: 8 * page, size: page },
        ];
        let mem = GuestMemory::new(&specs, &Backing::default()).unwrap();
        let file = std::env::temp_dir().join(format!("tern-load-{}", std::process::id()));
        let put = |bytes: &[u8]| std::fs::write(&file, bytes).unwrap();
        let load = |addr, raw| {
            let file = BootFile::open("-device loader,file=", &file)?;
            load_bytes(&mem, &Load { file, addr, raw })
        };
        let bytes: Vec<u8> = (0..page * 3 / 2).map(|i| (i * 7) as u8).collect();
        put(&bytes);
        load(page, false).unwrap();
        let mut back = vec![0; page as usize];
        mem.read(page, &mut back).unwrap();
        assert_eq!(back, bytes[..page as usize]);
        mem.read(2 * page, &mut back[..page as usize / 2]).unwrap();
        assert_eq!(back[..page as usize / 2], bytes[page as usize..]);
        for addr in [2 * page, 4 * page, u64::MAX - 1] {
            assert!(load(addr, false).unwrap_err().to_string().contains("RAM"), "{addr:#x}");
        }
        put(b"\x7fELF and more");
        assert!(load(0, false).unwrap_err().to_string().contains("force-raw"));
        load(0, true).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(load(0, true).unwrap_err().to_string().contains("cannot open"));
    }
}
