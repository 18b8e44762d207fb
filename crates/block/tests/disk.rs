//! Disks on real files: I/O through both engines and all cache modes, discards, and image locks
//! between two openers and against QEMU.

use std::io::{BufRead, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{
    Aio, Buffer, Cache, Completion, Disk, DiskOptions, Engine, Error, Locking, Op, Request,
};
use mem::{Backing, GuestMemory, RegionSpec};

fn file(len: u64) -> tempfile::NamedTempFile {
    // Not /tmp: it may be a tmpfs, which has no direct I/O.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let f = tempfile::NamedTempFile::new_in(dir).unwrap();
    f.as_file().set_len(len).unwrap();
    f
}

fn run(engine: &mut dyn Engine, op: Op, buffer: Buffer) -> Completion {
    engine.queue(Request { op, buffer, token: 7 });
    engine.submit().unwrap();
    let mut done = Vec::new();
    while done.is_empty() {
        engine.wait().unwrap();
        engine.reap(&mut done);
    }
    assert_eq!(engine.in_flight(), 0);
    done.pop().unwrap()
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + seed * 7 + i / 509) % 251) as u8).collect()
}

/// Opens with every cache mode and engine that the host can do.
fn all_modes(path: &Path, test: impl Fn(&Arc<Disk>, &mut dyn Engine, &str)) {
    for name in ["writeback", "none", "writethrough", "directsync", "unsafe"] {
        for aio in [Aio::IoUring, Aio::Threads] {
            let mut o = DiskOptions::new(path);
            o.cache = Cache::parse(name).unwrap();
            o.aio = aio;
            o.unmap = true;
            let disk = match Disk::open(&o) {
                Err(Error::Unsupported { .. }) if o.cache.direct => {
                    println!("skipped cache={name}: no direct I/O on this file system");
                    continue;
                }
                other => other.unwrap(),
            };
            let mut engine = disk.engine(16).unwrap();
            println!("cache={name} engine={}", engine.name());
            test(&disk, engine.as_mut(), name);
        }
    }
}

#[test]
fn what_is_written_is_read_in_every_mode() {
    let f = file(4 << 20);
    all_modes(f.path(), |disk, engine, mode| {
        let durable = !disk.cache().writeback;
        for (i, (offset, len)) in
            [(0, 512), (512, 1024), (4096, 65536), (3584, 4608), (1 << 20, 3 << 20)]
                .into_iter()
                .enumerate()
        {
            let data = pattern(len, i);
            let c = run(engine, Op::Write { offset, durable }, Buffer::bytes(&data));
            c.result.unwrap();
            assert_eq!(c.request.token, 7);
            run(engine, Op::Flush, Buffer::empty()).result.unwrap();
            let c = run(engine, Op::Read { offset }, Buffer::zeroes(len));
            c.result.unwrap();
            assert!(c.request.buffer.own_bytes().unwrap() == data, "{mode} {offset} {len}");
        }
    });
}

#[test]
fn unaligned_guest_buffers_work_with_direct_io() {
    let f = file(1 << 20);
    let mem =
        GuestMemory::new(&[RegionSpec { gpa: 0, size: 1 << 20 }], &Backing::default()).unwrap();
    let data = pattern(8192, 3);
    all_modes(f.path(), |_, engine, mode| {
        // An odd address in odd pieces.
        mem.write(0x1001, &data).unwrap();
        let pieces = [(0x1001, 100), (0x1001 + 100, 5000), (0x1001 + 5100, 3092)];
        let write = Buffer::guest(&mem, pieces).unwrap();
        run(engine, Op::Write { offset: 1024, durable: false }, write).result.unwrap();
        let read = Buffer::guest(&mem, [(0x8003, 8000), (0x20007, 192)]).unwrap();
        run(engine, Op::Read { offset: 1024 }, read).result.unwrap();
        let (mut a, mut b) = (vec![0; 8000], vec![0; 192]);
        mem.read(0x8003, &mut a).unwrap();
        mem.read(0x20007, &mut b).unwrap();
        assert!(a == data[..8000] && b == data[8000..], "{mode}");
    });
}

#[test]
fn reads_past_the_end_are_zero_and_errors_come_back() {
    let f = file(1000);
    let disk = Disk::open(&DiskOptions::new(f.path())).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut engine = disk.image().engine(aio, 4).unwrap();
        let c = run(engine.as_mut(), Op::Read { offset: 512 }, Buffer::bytes(&[9; 1024]));
        c.result.unwrap();
        assert!(c.request.buffer.own_bytes().unwrap().iter().all(|b| *b == 0));
    }
    drop(disk);
    let mut o = DiskOptions::new(f.path());
    o.read_only = true;
    let disk = Disk::open(&o).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut engine = disk.image().engine(aio, 4).unwrap();
        let op = Op::Write { offset: 0, durable: false };
        assert!(run(engine.as_mut(), op, Buffer::zeroes(512)).result.is_err());
    }
}

#[test]
fn discards_and_zeroes() {
    let f = file(4 << 20);
    all_modes(f.path(), |disk, engine, mode| {
        let data = pattern(1 << 20, 1);
        let write = Op::Write { offset: 0, durable: true };
        run(engine, write, Buffer::bytes(&data)).result.unwrap();
        let before = disk.image().allocated().unwrap();
        run(engine, Op::Discard { offset: 0, len: 1 << 19 }, Buffer::empty()).result.unwrap();
        let after = disk.image().allocated().unwrap();
        assert!(after < before, "{mode}: {before} -> {after}");
        for unmap in [false, true] {
            let (offset, len) = ((1 << 19) + if unmap { 65536 } else { 0 }, 10 * 512);
            run(engine, Op::WriteZeroes { offset, len, unmap }, Buffer::empty()).result.unwrap();
            let c = run(engine, Op::Read { offset }, Buffer::zeroes(11 * 512));
            let bytes = c.request.buffer.own_bytes().unwrap();
            let at = offset as usize + len as usize;
            assert!(bytes[..len as usize].iter().all(|b| *b == 0));
            assert_eq!(bytes[len as usize..], data[at..at + 512]);
        }
    });
}

#[test]
fn many_requests_at_once_all_complete() {
    let f = file(8 << 20);
    all_modes(f.path(), |_, engine, _| {
        let mut done = Vec::new();
        for token in 0..200u64 {
            while engine.in_flight() >= engine.capacity() {
                engine.submit().unwrap();
                engine.wait().unwrap();
                engine.reap(&mut done);
            }
            let op = Op::Write { offset: token * 4096, durable: false };
            engine.queue(Request { op, buffer: Buffer::bytes(&[token as u8; 4096]), token });
        }
        engine.submit().unwrap();
        while engine.in_flight() > 0 {
            engine.wait().unwrap();
            engine.reap(&mut done);
        }
        let mut tokens: Vec<_> = done.iter().map(|c| c.request.token).collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..200) && done.iter().all(|c| c.result.is_ok()));
    });
    let mut byte = [0];
    let mut all = std::fs::File::open(f.path()).unwrap();
    all.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn dropping_an_engine_waits_for_what_is_in_flight() {
    let f = file(8 << 20);
    let disk = Disk::open(&DiskOptions::new(f.path())).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut engine = disk.image().engine(aio, 8).unwrap();
        for i in 0..8 {
            let op = Op::Write { offset: i << 20, durable: true };
            let buffer = Buffer::bytes(&vec![5; 1 << 20]);
            engine.queue(Request { op, buffer, token: i });
        }
        drop(engine);
    }
    // The last handle may go while nothing waits any more.
    drop(disk);
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let missing = Disk::open(&DiskOptions::new("/no/such/disk.img")).unwrap_err().to_string();
    assert!(missing.contains("'/no/such/disk.img'"), "{missing}");
    for path in ["/tmp", "/dev/null"] {
        let e = Disk::open(&DiskOptions::new(path)).unwrap_err().to_string();
        assert!(e.contains(path), "{e}");
    }
}

#[test]
fn a_second_writer_is_refused_until_the_first_lets_go() {
    let f = file(4096);
    let first = Disk::open(&DiskOptions::new(f.path())).unwrap();
    let refused = Disk::open(&DiskOptions::new(f.path())).unwrap_err().to_string();
    let path = f.path().display();
    assert_eq!(
        refused,
        format!("Failed to get \"write\" lock\nIs another process using the image [{path}]?")
    );
    // A reader that does not stand writers is refused too, one that shares is let in only where
    // the writer shares as well.
    let mut reader = DiskOptions::new(f.path());
    reader.read_only = true;
    let refused = Disk::open(&reader).unwrap_err().to_string();
    assert!(refused.starts_with("Failed to get shared \"write\" lock"), "{refused}");

    // Hand-off: the destination opens without locks and takes them when the source let go.
    let mut incoming = DiskOptions::new(f.path());
    incoming.take_locks = false;
    let second = Disk::open(&incoming).unwrap();
    assert!(!second.image().has_locks());
    assert!(matches!(second.acquire_locks(), Err(Error::Locked { .. })));
    first.release_locks().unwrap();
    second.acquire_locks().unwrap();
    assert!(second.image().has_locks());
    assert!(matches!(first.acquire_locks(), Err(Error::Locked { .. })));
    second.release_locks().unwrap();
    first.acquire_locks().unwrap();
    first.acquire_locks().unwrap();
    drop(first);
    Disk::open(&DiskOptions::new(f.path())).unwrap();
}

#[test]
fn sharing_writers_and_no_locking() {
    let f = file(4096);
    let mut o = DiskOptions::new(f.path());
    o.share_rw = true;
    let _a = Disk::open(&o).unwrap();
    let _b = Disk::open(&o).unwrap();
    let exclusive = DiskOptions::new(f.path());
    assert!(matches!(Disk::open(&exclusive), Err(Error::Locked { .. })));
    let mut off = DiskOptions::new(f.path());
    off.locking = Locking::Off;
    Disk::open(&off).unwrap();
}

/// QEMU with the file as a disk, stopped before its first instruction; what it says.
fn qemu(path: &Path) -> std::process::Child {
    Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg", "-S", "-nodefaults", "-display", "none", "-m", "32"])
        .args(["-qmp", "stdio", "-device", "virtio-blk-pci,drive=d"])
        .arg("-drive")
        .arg(format!("if=none,id=d,format=raw,file={}", path.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn have_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-system-x86_64 is not installed");
    }
    found
}

#[test]
fn qemu_is_refused_while_we_write() {
    if !have_qemu() {
        return;
    }
    let f = file(1 << 20);
    let _disk = Disk::open(&DiskOptions::new(f.path())).unwrap();
    let out = qemu(f.path()).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("Failed to get \"write\" lock"), "{said}");
}

#[test]
fn we_are_refused_while_qemu_writes() {
    if !have_qemu() {
        return;
    }
    let f = file(1 << 20);
    let mut child = qemu(f.path());
    // Its main loop answers only when its disks are open.
    child.stdin.as_mut().unwrap().write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
    let mut said = std::io::BufReader::new(child.stdout.as_mut().unwrap());
    let mut line = String::new();
    while !line.contains("\"return\"") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "QEMU ended");
    }
    let e = Disk::open(&DiskOptions::new(f.path())).unwrap_err();
    assert!(e.to_string().starts_with("Failed to get \"write\" lock"), "{e}");
    child.stdin.as_mut().unwrap().write_all(b"{\"execute\":\"quit\"}").unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    while Disk::open(&DiskOptions::new(f.path())).is_err() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(20));
    }
}
