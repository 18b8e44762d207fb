//! Memory that another process lends: lies about its size, and files that shrink in use.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mem::{DirtyAlias, DirtyLog, Error, ForeignMapping, ForeignRegion, GuestMemory, PAGE_SIZE};

fn memfd(size: u64) -> File {
    // SAFETY: a new descriptor, owned by the File.
    #[allow(unsafe_code)]
    let file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

fn lend(file: &File, gpa: u64, offset: u64, size: u64) -> ForeignRegion {
    let mapping = ForeignMapping::map(file.try_clone().unwrap(), offset, size).unwrap();
    ForeignRegion { gpa, mapping }
}

#[test]
fn a_file_that_shrinks_costs_its_mapping_and_nothing_else() {
    let (bad, good) = (memfd(0x40000), memfd(0x10000));
    let regions = [lend(&bad, 0x100000, 0x1000, 0x3f000), lend(&good, 0, 0, 0x10000)];
    let memory = GuestMemory::from_foreign(&regions, None).unwrap();
    memory.write(0x100000, &[7]).unwrap();
    memory.write(0x0, &[9]).unwrap();
    let before = mem::sigbus::broken_count();
    assert!(!memory.is_broken());

    // Readers and writers on several threads while the owner cuts the file off.
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..3)
        .map(|i| {
            let (memory, stop) = (memory.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut rounds = 0_u64;
                while !stop.load(Ordering::Relaxed) || rounds == 0 {
                    for page in 0..0x3f {
                        let gpa = 0x100000 + page * PAGE_SIZE + 8 * i;
                        memory.write_obj(gpa, &rounds).unwrap();
                        memory.read_obj::<u64>(gpa).unwrap();
                    }
                    rounds += 1;
                }
            })
        })
        .collect();
    bad.set_len(0).unwrap();
    memory.write(0x120000, &[1]).unwrap();
    assert_eq!(memory.read_obj::<u8>(0x120000).unwrap(), 1);
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());

    assert!(memory.is_broken() && regions[0].mapping.is_broken());
    assert!(!regions[1].mapping.is_broken());
    assert_eq!(mem::sigbus::broken_count(), before + 1);
    assert_eq!(memory.read_obj::<u8>(0).unwrap(), 9);
    // What is mapped afterwards, perhaps in the same slot, is whole.
    drop((memory, regions));
    let again = lend(&good, 0, 0, 0x10000);
    assert!(!again.mapping.is_broken());
    assert_eq!(GuestMemory::from_foreign(&[again], None).unwrap().read_obj::<u8>(0).unwrap(), 9);
}

/// A fault elsewhere still ends the process: nothing is hidden.
#[test]
fn a_fault_outside_lent_memory_is_still_fatal() {
    const CHILD: &str = "TERN_TEST_FAULT";
    if std::env::var_os(CHILD).is_some() {
        let file = memfd(0x2000);
        let _guarded = lend(&file, 0, 0, 0x1000);
        // SAFETY: a mapping of our own of a file that is then cut off: reading it is SIGBUS.
        #[allow(unsafe_code)]
        unsafe {
            use std::os::fd::AsRawFd;
            let null = std::ptr::null_mut();
            let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
            let p = libc::mmap(null, 0x1000, prot, flags, file.as_raw_fd(), 0x1000);
            assert_ne!(p, libc::MAP_FAILED);
            file.set_len(0x1000).unwrap();
            std::ptr::read_volatile(p.cast::<u8>());
        }
        std::process::exit(0);
    }
    let name = "a_fault_outside_lent_memory_is_still_fatal";
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(libc::SIGBUS), "{status:?}");
}

#[test]
fn only_files_that_are_there_are_mapped() {
    let refuse = |file: File, offset, size, why: &str| {
        let e = ForeignMapping::map(file, offset, size).unwrap_err();
        assert!(matches!(e, Error::Layout(_)), "{e}");
        assert!(e.to_string().contains(why), "{e}");
    };
    refuse(memfd(0x1000), 0, 0x1001, "shorter");
    refuse(memfd(0x1000), 0x1000, 1, "shorter");
    refuse(memfd(0x1000), u64::MAX, 2, "not a range");
    refuse(memfd(0x1000), 0, 0, "not a range");
    refuse(File::open("/dev/zero").unwrap(), 0, 0x1000, "character device");
    refuse(File::open("/").unwrap(), 0, 0x1000, "directory");
    let pipe = std::io::pipe().unwrap().0;
    refuse(File::from(std::os::fd::OwnedFd::from(pipe)), 0, 0x1000, "pipe");
    // Not writable: the kernel says no.
    let read_only = File::open("/proc/self/exe").unwrap();
    assert!(ForeignMapping::map(read_only, 0, 0x1000).is_err());
}

#[test]
fn regions_come_and_go_while_others_stay() {
    let file = memfd(0x200000);
    let mut regions: Vec<_> =
        (0..20).map(|i| lend(&file, (19 - i) * 0x10000, i * 0x2000, 0x2000)).collect();
    let all = GuestMemory::from_foreign(&regions, None).unwrap();
    all.write(0x50ffe, &[1, 2, 3, 4]).unwrap();
    assert!(all.write(0x52000, &[1]).is_err() && all.write(0x51fff, &[1, 2]).is_err());
    assert!(all.write(20 * 0x10000, &[0]).is_err());
    regions.retain(|r| r.gpa != 0x30000);
    let fewer = GuestMemory::from_foreign(&regions, None).unwrap();
    drop(all);
    assert!(fewer.read_obj::<u32>(0x30000).is_err());
    assert_eq!(fewer.read_obj::<u32>(0x50ffe).unwrap(), 0x04030201);
    regions.push(lend(&file, 0x51000, 0, 0x1000));
    assert!(matches!(GuestMemory::from_foreign(&regions, None), Err(Error::Layout(_))));
    let none = GuestMemory::from_foreign(&[], None).unwrap();
    assert!(none.read_obj::<u8>(0).is_err());
}

#[test]
fn every_write_is_in_the_lenders_log() {
    let (ram, bits) = (memfd(0x40000), memfd(0x1000));
    let map = ForeignMapping::map(bits.try_clone().unwrap(), 0, 16).unwrap();
    let alias = DirtyAlias { gpa: 0x3000, len: 0x100, log: 0x7f000 };
    let log = DirtyLog::new(map.clone(), vec![alias]);
    let regions = [lend(&ram, 0x10000, 0, 0x10000), lend(&ram, 0, 0x10000, 0x10000)];
    let memory = GuestMemory::from_foreign(&regions, Some(log)).unwrap();
    assert!(memory.is_recording());
    let dirty = || -> Vec<u64> {
        let bit = |page: u64| map.take_bits(page / 8, 1 << (page % 8)) != 0;
        (0..16 * 8).filter(|p| bit(*p)).collect()
    };
    memory.write(0x1ffff, &[1]).unwrap();
    memory.write(0x0fff, &[0; 0x1002]).unwrap();
    assert_eq!(dirty(), [0, 1, 2, 0x1f]);
    memory.store_u16(0x30fe, 1, Ordering::Release).unwrap();
    memory.store_u16(0x3100, 1, Ordering::Release).unwrap();
    assert_eq!(dirty(), [3, 0x7f]);
    memory.mark_dirty(0x4000, 0x9000);
    assert_eq!(dirty(), (4..13).collect::<Vec<_>>());
    // Nothing beyond the end of a log that is too short.
    let short = DirtyLog::new(ForeignMapping::map(bits, 0, 1).unwrap(), Vec::new());
    let memory = GuestMemory::from_foreign(&regions, Some(short)).unwrap();
    memory.mark_dirty(0x7000, 0x3000);
    memory.mark_dirty(0x10000, 0x1000);
    assert_eq!(dirty(), [7]);
}
