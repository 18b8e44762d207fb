//! Protocol feature bits, as masks ("Protocol features" in the specification), and vhost's own
//! feature bits.

/// Several queues: GET_QUEUE_NUM, SET_VRING_ENABLE.
pub const MQ: u64 = 1 << 0;
/// The dirty log is a descriptor.
pub const LOG_SHMFD: u64 = 1 << 1;
/// SEND_RARP.
pub const RARP: u64 = 1 << 2;
/// Any message may ask for an answer.
pub const REPLY_ACK: u64 = 1 << 3;
/// NET_SET_MTU.
pub const MTU: u64 = 1 << 4;
/// The back end may send requests of its own, over a second socket. Its owner can send his end of the
/// first one through it, which then is not seen to close: offer it where front ends are trusted.
pub const BACKEND_REQ: u64 = 1 << 5;
/// SET_VRING_ENDIAN, for legacy guests of the other endianness.
pub const CROSS_ENDIAN: u64 = 1 << 6;
/// Crypto sessions.
pub const CRYPTO_SESSION: u64 = 1 << 7;
/// Post-copy by userfaultfd.
pub const PAGEFAULT: u64 = 1 << 8;
/// GET_CONFIG, SET_CONFIG.
pub const CONFIG: u64 = 1 << 9;
/// Requests of the back end may carry descriptors.
pub const BACKEND_SEND_FD: u64 = 1 << 10;
/// Doorbells of hardware.
pub const HOST_NOTIFIER: u64 = 1 << 11;
/// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
pub const INFLIGHT_SHMFD: u64 = 1 << 12;
/// RESET_DEVICE.
pub const RESET_DEVICE: u64 = 1 << 13;
/// Kicks and calls as messages.
pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
/// ADD_MEM_REG, REM_MEM_REG, GET_MAX_MEM_SLOTS.
pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
/// SET_STATUS, GET_STATUS.
pub const STATUS: u64 = 1 << 16;
/// Memory of Xen guests.
pub const XEN_MMAP: u64 = 1 << 17;
/// Shared virtio objects.
pub const SHARED_OBJECT: u64 = 1 << 18;
/// The device's own state in migrations.
pub const DEVICE_STATE: u64 = 1 << 19;

/// What [`crate::Connection`] does by itself or with the smallest device: a device offers these
/// and adds RARP, MTU and CONFIG if it has the methods for them.
pub const COMMON: u64 = MQ
    | LOG_SHMFD
    | REPLY_ACK
    | BACKEND_REQ
    | INFLIGHT_SHMFD
    | RESET_DEVICE
    | CONFIGURE_MEM_SLOTS
    | STATUS;

/// What a connection can do with a device that has every method.
pub const POSSIBLE: u64 = COMMON | RARP | MTU | CONFIG | PAGEFAULT;

/// Feature bit: the back end logs what it writes into guest memory (VHOST_F_LOG_ALL).
pub const F_LOG_ALL: u64 = 1 << 26;
/// Feature bit: there are protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
