//! The XDP program that hands frames to AF_XDP sockets, made by hand and loaded with bpf(2): each
//! frame goes to the socket that its receive queue has in an XSKMAP, or on to the host's stack where
//! the queue has none. Sources: bpf(2), linux/bpf.h, Linux' Documentation/bpf/standardization.
//!
//! It is attached by a BPF link, which ends with its file descriptor: whatever becomes of this
//! process, no program is left on the interface.
#![allow(unsafe_code)] // bpf(2)

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const BPF_FUNC_REDIRECT_MAP: i32 = 51;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const XDP_PASS: i32 = 2;
/// Where struct xdp_md has the receive queue's number.
const XDP_MD_RX_QUEUE_INDEX: i16 = 16;
// linux/if_link.h
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Where in the kernel the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// In the interface's driver, before there is an skb.
    Native,
    /// After the driver; any interface has it.
    Generic,
}

/// One instruction (RFC 9669, section 3).
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    opcode: u8,
    /// Source register in the high half, destination in the low one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(opcode: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { opcode, registers: src << 4 | dst, offset, immediate }
}

/// `return bpf_redirect_map(&map, ctx->rx_queue_index, XDP_PASS);`
fn redirect(map: i32) -> [Instruction; 6] {
    [
        // r2 = *(u32 *)(r1 + rx_queue_index)
        instruction(0x61, 2, 1, XDP_MD_RX_QUEUE_INDEX, 0),
        // r1 = map; 64 bits take two instructions
        instruction(0x18, 1, BPF_PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        // r3 = what to return where the map has nothing
        instruction(0xb7, 3, 0, 0, XDP_PASS),
        instruction(0x85, 0, 0, 0, BPF_FUNC_REDIRECT_MAP),
        // return r0
        instruction(0x95, 0, 0, 0, 0),
    ]
}

/// Calls bpf(2) for a command that answers with a descriptor or with 0.
///
/// # Safety
/// `attr` is what the command reads, and pointers in it are valid.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_int> {
    let size = size_of::<T>();
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// # Safety
/// As [`bpf`]; the command answers with a descriptor.
unsafe fn bpf_fd<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is new and nobody else's. bpf(2) sets
    // close-on-exec on all of its own.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// A loaded program with its map of sockets.
pub struct Program {
    map: OwnedFd,
    program: OwnedFd,
}

impl Program {
    /// Loads one for `queues` queues. `frags`: it may be given frames of several buffers.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the first user namespace.
    pub fn load(queues: u32, frags: bool) -> io::Result<Self> {
        #[repr(C)]
        struct MapCreate {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
        }
        let attr = MapCreate {
            map_type: BPF_MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: queues,
        };
        // SAFETY: the start of union bpf_attr for this command; the kernel takes the rest for zeroes.
        let map = unsafe { bpf_fd(BPF_MAP_CREATE, &attr) }?;
        #[repr(C)]
        struct ProgLoad {
            prog_type: u32,
            instructions: u32,
            code: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; 16],
            ifindex: u32,
            expected_attach_type: u32,
        }
        let code = redirect(map.as_raw_fd());
        let attr = ProgLoad {
            prog_type: BPF_PROG_TYPE_XDP,
            instructions: code.len() as u32,
            code: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: if frags { BPF_F_XDP_HAS_FRAGS } else { 0 },
            name: *b"tern_switch\0\0\0\0\0",
            ifindex: 0,
            expected_attach_type: BPF_XDP,
        };
        // SAFETY: as above; `code` and the licence outlive the call.
        let program = unsafe { bpf_fd(BPF_PROG_LOAD, &attr) }?;
        Ok(Self { map, program })
    }

    /// Attaches it to interface `index`, until the result is dropped.
    ///
    /// # Errors
    /// `EBUSY` or `EEXIST` when the interface has a program already; others when it cannot have one at
    /// this hook.
    pub fn attach(&self, index: u32, hook: Hook) -> io::Result<OwnedFd> {
        #[repr(C)]
        struct LinkCreate {
            program: u32,
            ifindex: u32,
            attach_type: u32,
            flags: u32,
        }
        let attr = LinkCreate {
            program: self.program.as_raw_fd() as u32,
            ifindex: index,
            attach_type: BPF_XDP,
            flags: match hook {
                Hook::Native => XDP_FLAGS_DRV_MODE,
                Hook::Generic => XDP_FLAGS_SKB_MODE,
            },
        };
        // SAFETY: as above.
        unsafe { bpf_fd(BPF_LINK_CREATE, &attr) }
    }

    /// Gives receive queue `queue`'s frames to `socket`, until that is closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn redirect(&self, queue: u32, socket: &OwnedFd) -> io::Result<()> {
        #[repr(C)]
        struct Update {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let value = socket.as_raw_fd() as u32;
        let attr = Update {
            map: self.map.as_raw_fd() as u32,
            padding: 0,
            key: std::ptr::from_ref(&queue) as u64,
            value: std::ptr::from_ref(&value) as u64,
            flags: 0,
        };
        // SAFETY: as above; key and value outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attr) }.map(drop)
    }
}
