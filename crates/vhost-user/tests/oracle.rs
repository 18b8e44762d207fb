//! The `vhost` crate as the other side: its front end against our back end, and the reverse.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::{Driver, Eventfd, Server, TIMEOUT, features, memory, until};
use mem::{Bitmap, ForeignMapping, ForeignRegion, GuestMemory, PAGE_SIZE};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Frontend as TheirFrontend, GpuBackend, VhostUserBackendReqHandlerMut,
    VhostUserFrontend,
};
use vhost::{
    VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo,
    VringConfigData,
};
use vhost_user::{Frontend, protocol};
use virtio::{Chain, Queue, RingSetup};
use vmm_sys_util::eventfd::EventFd;

fn regions(mem: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let info = |r: &mem::Region| {
        let (file, offset) = r.file.as_ref().unwrap();
        VhostUserMemoryRegionInfo {
            guest_phys_addr: r.gpa,
            memory_size: r.size,
            userspace_addr: r.host as u64,
            mmap_offset: *offset,
            mmap_handle: file.as_raw_fd(),
        }
    };
    mem.regions().iter().map(info).collect()
}

fn ring_config(mem: &GuestMemory, driver: &Driver, log: bool) -> VringConfigData {
    let host = |gpa| mem.slice(gpa, 1).unwrap().as_ptr() as u64;
    VringConfigData {
        queue_max_size: driver.ring.size,
        queue_size: driver.ring.size,
        flags: log.into(),
        desc_table_addr: host(driver.ring.desc),
        used_ring_addr: host(driver.ring.used),
        avail_ring_addr: host(driver.ring.avail),
        log_addr: Some(driver.ring.used),
    }
}

/// Everything that their front end can say to ours, with a ring that carries data.
#[test]
fn their_front_end_and_our_back_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::spawn(ours);
    let mut front = TheirFrontend::from_stream(theirs, 4);
    let mem = memory();
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    assert_eq!(offered & features(false), features(false));
    let theirs = front.get_protocol_features().unwrap();
    front.set_protocol_features(theirs).unwrap();
    assert!(theirs.contains(VhostUserProtocolFeatures::LOG_SHMFD));
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front.get_queue_num().unwrap(), 2);
    let acked = features(false) | protocol::F_PROTOCOL_FEATURES;
    front.set_features(acked).unwrap();
    let table = regions(&mem);
    front.set_mem_table(&table).unwrap();
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    front.remove_mem_region(&table[1]).unwrap();
    assert!(front.remove_mem_region(&table[1]).is_err());
    front.add_mem_region(&table[1]).unwrap();

    let wish = VhostUserInflight::new(0, 0, 4, 64);
    let (area, file) = front.get_inflight_fd(&wish).unwrap();
    let area = VhostUserInflight::new(area.mmap_size, area.mmap_offset, 4, 64);
    front.set_inflight_fd(&area, file.as_raw_fd()).unwrap();

    let mut driver = Driver::new(&mem, 0, features(false));
    front.set_vring_num(0, driver.ring.size).unwrap();
    front.set_vring_base(0, 0).unwrap();
    front.set_vring_addr(0, &ring_config(&mem, &driver, false)).unwrap();
    front.set_vring_err(0, &EventFd::new(0).unwrap()).unwrap();
    front.set_vring_call(0, &driver.call.0).unwrap();
    front.set_vring_kick(0, &driver.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    driver.exchange(200);

    // The dirty log.
    let bits = vhost_user::testing::memfd(0x10_0000);
    let region = VhostUserDirtyLogRegion {
        mmap_size: 0x10_0000,
        mmap_offset: 0,
        mmap_handle: bits.as_raw_fd(),
    };
    front.set_log_base(0, Some(region)).unwrap();
    front.set_features(acked | protocol::F_LOG_ALL).unwrap();
    front.set_vring_addr(0, &ring_config(&mem, &driver, true)).unwrap();
    driver.exchange(64);
    let log = ForeignMapping::map(bits, 0, 0x10_0000).unwrap();
    let used_page = driver.ring.used / PAGE_SIZE;
    assert_ne!(log.take_bits(used_page / 8, 1 << (used_page % 8)), 0);

    let written = front.set_config(4, VhostUserConfigFlags::WRITABLE, &[7; 8]);
    written.unwrap();
    let (_, read) = front.get_config(4, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    assert_eq!(read, [7; 8]);
    let used = mem.load_u16(driver.ring.used + 2, Ordering::Acquire).unwrap();
    assert_eq!(front.get_vring_base(0).unwrap(), u32::from(used));
    front.reset_device().unwrap();
    assert!(server.shared.calls().iter().any(|c| c == "reset"));
    drop(front);
    assert!(matches!(server.end(), vhost_user::Error::Disconnected));
}

/// A back end behind their message handler: our rings, their protocol.
#[derive(Default)]
struct TheirDevice {
    mem: Vec<(VhostUserMemoryRegion, Arc<ForeignMapping>)>,
    size: u16,
    addr: [u64; 3],
    base: u32,
    kick: Option<File>,
    call: Option<File>,
    queue: Option<Queue>,
    enabled: bool,
    log: Option<Arc<ForeignMapping>>,
    features: u64,
    calls: Vec<String>,
    config: Vec<u8>,
}

type Their<T> = std::result::Result<T, vhost::vhost_user::Error>;

fn eventfd(file: File) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is given up by the file.
    #[allow(unsafe_code)]
    unsafe {
        EventFd::from_raw_fd(file.into_raw_fd())
    }
}

impl TheirDevice {
    fn gpa(&self, user: u64) -> u64 {
        let find = |(r, _): &&(VhostUserMemoryRegion, _)| {
            let (at, size) = (r.user_addr, r.memory_size);
            user >= at && user - at < size
        };
        let (r, _) = self.mem.iter().find(find).expect("in memory");
        user - r.user_addr + r.guest_phys_addr
    }

    fn start(&mut self) {
        if self.kick.is_none() || self.call.is_none() {
            return;
        }
        let (Some(kick), Some(call)) = (self.kick.take(), self.call.take()) else { return };
        let region = |(r, m): &(VhostUserMemoryRegion, Arc<ForeignMapping>)| ForeignRegion {
            gpa: r.guest_phys_addr,
            mapping: m.clone(),
        };
        let list: Vec<_> = self.mem.iter().map(region).collect();
        let used = self.base as u16;
        self.queue = Some(
            Queue::new(RingSetup {
                mem: GuestMemory::from_foreign(&list, None).unwrap(),
                size: self.size,
                desc: self.gpa(self.addr[0]),
                avail: self.gpa(self.addr[1]),
                used: self.gpa(self.addr[2]),
                features: self.features,
                pos: Some(virtio::RingPos { avail: used, used }),
                kick: eventfd(kick),
                call: Arc::new(Eventfd(eventfd(call))),
            })
            .unwrap(),
        );
    }

    fn step(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|_| self.enabled) else { return };
        queue.ack_kick();
        let mut chain = Chain::new();
        while queue.pop(&mut chain).unwrap() {
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read_at(0, &mut bytes);
            let n = chain.write_at(0, &bytes);
            if let Some(log) = &self.log {
                // It only shows that the front end finds the bits.
                vhost_log(log, chain.id());
            }
            queue.push(&chain, n as u32);
        }
        queue.flush();
        queue.ring.enable_kicks();
    }
}

fn vhost_log(log: &Arc<ForeignMapping>, id: u16) {
    mem::DirtyLog::new(log.clone(), Vec::new()).mark(u64::from(id) * PAGE_SIZE, 1);
}

impl VhostUserBackendReqHandlerMut for TheirDevice {
    fn set_owner(&mut self) -> Their<()> {
        self.calls.push("owner".into());
        Ok(())
    }
    fn reset_owner(&mut self) -> Their<()> {
        Ok(())
    }
    fn reset_device(&mut self) -> Their<()> {
        self.queue = None;
        self.calls.push("reset".into());
        Ok(())
    }
    fn get_features(&mut self) -> Their<u64> {
        Ok(features(false) | protocol::F_PROTOCOL_FEATURES | protocol::F_LOG_ALL)
    }
    fn set_features(&mut self, features: u64) -> Their<()> {
        self.features = features & !(protocol::F_PROTOCOL_FEATURES | protocol::F_LOG_ALL);
        self.calls.push(format!("log {}", features & protocol::F_LOG_ALL != 0));
        Ok(())
    }
    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Their<Option<Vec<VhostUserMemoryRegionBase>>> {
        let map = |(r, file): (&VhostUserMemoryRegion, File)| {
            (*r, ForeignMapping::map(file, r.mmap_offset, r.memory_size).unwrap())
        };
        self.mem = ctx.iter().zip(files).map(map).collect();
        Ok(None)
    }
    fn set_vring_num(&mut self, _: u32, num: u32) -> Their<()> {
        self.size = num as u16;
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        _: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Their<()> {
        self.addr = [descriptor, available, used];
        Ok(())
    }
    fn set_vring_base(&mut self, _: u32, base: u32) -> Their<()> {
        self.base = base;
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> Their<VhostUserVringState> {
        let pos = self.queue.take().expect("a ring").stop();
        Ok(VhostUserVringState::new(index, pos.avail.into()))
    }
    fn set_vring_kick(&mut self, _: u8, fd: Option<File>) -> Their<()> {
        self.kick = fd;
        self.start();
        Ok(())
    }
    fn set_vring_call(&mut self, _: u8, fd: Option<File>) -> Their<()> {
        self.call = fd;
        self.start();
        Ok(())
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Their<()> {
        Ok(())
    }
    fn get_protocol_features(&mut self) -> Their<VhostUserProtocolFeatures> {
        use VhostUserProtocolFeatures as F;
        Ok(F::MQ
            | F::LOG_SHMFD
            | F::REPLY_ACK
            | F::CONFIG
            | F::INFLIGHT_SHMFD
            | F::CONFIGURE_MEM_SLOTS
            | F::RESET_DEVICE
            | F::BACKEND_REQ)
    }
    fn set_protocol_features(&mut self, features: u64) -> Their<()> {
        self.calls.push(format!("protocol {features:#x}"));
        Ok(())
    }
    fn get_queue_num(&mut self) -> Their<u64> {
        Ok(3)
    }
    fn set_vring_enable(&mut self, _: u32, enable: bool) -> Their<()> {
        self.enabled = enable;
        Ok(())
    }
    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Their<Vec<u8>> {
        Ok(self.config[offset as usize..][..size as usize].to_vec())
    }
    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Their<()> {
        self.config.resize(256, 0);
        self.config[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Their<()> {
        unreachable!("not for a NIC")
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Their<File> {
        unreachable!("not for a NIC")
    }
    fn get_inflight_fd(&mut self, i: &VhostUserInflight) -> Their<(VhostUserInflight, File)> {
        let file = vhost_user::testing::memfd(0x1000);
        Ok((VhostUserInflight::new(0x1000, 0, i.num_queues, i.queue_size), file))
    }
    fn set_inflight_fd(&mut self, i: &VhostUserInflight, _: File) -> Their<()> {
        self.calls.push(format!("inflight {} {}", i.num_queues, i.queue_size));
        Ok(())
    }
    fn get_max_mem_slots(&mut self) -> Their<u64> {
        Ok(32)
    }
    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Their<Option<VhostUserMemoryRegionBase>> {
        let at = region.guest_phys_addr;
        self.calls.push(format!("add {at:#x}"));
        Ok(None)
    }
    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Their<()> {
        let at = region.guest_phys_addr;
        self.calls.push(format!("remove {at:#x}"));
        Ok(())
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Their<Option<File>> {
        Ok(None)
    }
    fn check_device_state(&mut self) -> Their<()> {
        Ok(())
    }
    fn get_shmem_config(&mut self) -> Their<VhostUserShMemConfig> {
        unreachable!("not for a NIC")
    }
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Their<()> {
        let mapping = ForeignMapping::map(file, log.mmap_offset, log.mmap_size);
        self.log = Some(mapping.unwrap());
        Ok(())
    }
}

/// Our front end, and theirs at the other end.
#[test]
fn our_front_end_and_their_back_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = Arc::new(Mutex::new(TheirDevice::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let (served, stopped) = (device.clone(), stop.clone());
    let protocol_thread = std::thread::spawn(move || {
        let mut handler = BackendReqHandler::from_stream(theirs, served);
        while handler.handle_request().is_ok() {}
    });
    let served = device.clone();
    let data_thread = std::thread::spawn(move || {
        while !stopped.load(Ordering::SeqCst) {
            served.lock().unwrap().step();
            std::thread::yield_now();
        }
    });
    let mut front = Frontend::new(ours, TIMEOUT).unwrap();
    let mem = memory();
    let offer = front.negotiate(u64::MAX).unwrap();
    assert_eq!((offer.features, offer.queues, offer.can_log), (features(false), 3, true));
    front.set_features(features(false)).unwrap();
    front.track_inflight(2, 64).unwrap();
    front.set_memory(&mem).unwrap();
    assert_eq!(front.max_mem_slots().unwrap(), 32);
    let mut driver = Driver::new(&mem, 0, features(false));
    driver.start(&mut front, None);
    driver.exchange(300);
    let log = front.start_log().unwrap();
    driver.exchange(100);
    let pages = Bitmap::new(64);
    until("a logged page", || log.harvest(0, 64, &pages) > 0);
    front.stop_log().unwrap();
    let pos = front.stop_ring(0).unwrap();
    assert_eq!(pos.avail, mem.load_u16(driver.ring.used + 2, Ordering::Acquire).unwrap());
    driver.start(&mut front, Some(pos));
    driver.exchange(50);
    let r = &mem.regions()[1];
    let region = vhost_user::message::MemRegion {
        guest_addr: r.gpa + r.size,
        size: r.size,
        user_addr: 0x1000,
        mmap_offset: 0,
    };
    use std::os::fd::AsFd;
    front.add_region(region, r.file.as_ref().unwrap().0.as_fd()).unwrap();
    front.remove_region(region).unwrap();
    front.set_config(8, &[1, 2, 3], true).unwrap();
    assert_eq!(front.get_config(7, 4).unwrap(), [0, 1, 2, 3]);
    front.reset_device().unwrap();
    assert!(front.send_rarp([0; 6]).is_err());
    drop(front);
    protocol_thread.join().unwrap();
    stop.store(true, Ordering::SeqCst);
    data_thread.join().unwrap();
    let calls = device.lock().unwrap().calls.join(" ");
    let expected = [
        "owner",
        "protocol 0xb22b",
        "log false",
        "inflight 2 64",
        "log true",
        "log false",
        "add 0x100100000",
        "remove 0x100100000",
        "reset",
    ];
    assert_eq!(calls, expected.join(" "));
}
