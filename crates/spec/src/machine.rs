//! [`Machine`]: everything that the command line or a configuration can say about a VM.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// PCI Express, root bus `pcie.0`.
    #[default]
    Q35,
    /// Conventional PCI, root bus `pci.0`.
    Pc,
    /// Nothing but a monitor (`-machine none`), for probing.
    None,
}

/// A CPU model with features switched on and off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// "host", "max", or a named model in QEMU's spelling.
    pub model: String,
    /// Feature name (QEMU's spelling) and whether it is switched on.
    pub features: BTreeMap<String, bool>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { model: "host".into(), features: BTreeMap::new() }
    }
}

/// vCPU counts and topology; sockets x dies x cores x threads = max.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smp {
    pub cpus: u32,
    pub max_cpus: u32,
    pub sockets: u32,
    pub dies: u32,
    pub cores: u32,
    pub threads: u32,
}

impl Default for Smp {
    fn default() -> Self {
        Self { cpus: 1, max_cpus: 1, sockets: 1, dies: 1, cores: 1, threads: 1 }
    }
}

/// A memory backend object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackend {
    pub id: String,
    pub kind: MemoryKind,
    /// Bytes.
    pub size: u64,
    pub share: bool,
    pub prealloc: bool,
}

/// `memory-backend-{ram,memfd,file}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    Ram,
    /// `hugetlb`: page size in bytes.
    Memfd {
        hugetlb: Option<u64>,
    },
    File {
        path: PathBuf,
    },
}

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    pub id: u32,
    pub cpus: Vec<u32>,
    /// Backend id, or `None` with `size`.
    pub memdev: Option<String>,
    /// Bytes.
    pub size: u64,
}

/// What is loaded at boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Boot {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
}

/// Bytes of a file that are put into RAM at power-on (`-device loader,file=,addr=`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    pub file: PathBuf,
    /// Guest-physical address of the first byte.
    pub addr: u64,
    /// The file's bytes are meant as they are, whatever format they look like.
    pub raw: bool,
}

/// One level of a block node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockNode {
    pub node_name: String,
    /// The name is a drive's id (`-drive`), not a node's.
    #[serde(default)]
    pub drive: bool,
    pub driver: BlockDriver,
    pub read_only: bool,
    /// `cache.direct`: O_DIRECT.
    pub direct: bool,
    /// `cache.no-flush`: flushes are not passed on.
    pub no_flush: bool,
    /// `discard=unmap`.
    pub unmap: bool,
    /// Open read-only when it cannot be opened for writing.
    pub auto_read_only: bool,
    pub aio: Aio,
    /// `locking`: image locks (`auto` is on where the file system can).
    pub locking: bool,
}

/// How disk I/O is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    #[default]
    Threads,
    Native,
    IoUring,
}

/// What a block node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockDriver {
    /// A host file or block device.
    File { filename: PathBuf },
    /// The raw format over the node called `file`.
    Raw { file: String },
}

/// A network back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetBackend {
    pub id: String,
    pub kind: NetKind,
    /// What the user wrote for it, for messages ("-nic tap,ifname=t0").
    #[serde(default)]
    pub written: String,
}

/// `-netdev` types that work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetKind {
    Tap {
        /// Interface name; made by the kernel when it does not exist. `None` with fds.
        ifname: Option<String>,
        /// Open tap fds, one a queue.
        fds: Vec<i32>,
        queues: u16,
        /// Script run after (before) the tap goes up (down); `None` is `no`.
        script: Option<PathBuf>,
        downscript: Option<PathBuf>,
        /// Bridge to add it to.
        bridge: Option<String>,
    },
}

/// A device on a bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// User's id; devices without one get none, and are named by position in sections.
    pub id: Option<String>,
    /// Bus name (`pcie.0`, a root port's id); `None`: the root bus.
    pub bus: Option<String>,
    /// Slot and function on that bus; `None`: the next free.
    pub addr: Option<(u8, u8)>,
    pub multifunction: bool,
    pub kind: DeviceKind,
    /// What the user wrote for it, for messages.
    #[serde(default)]
    pub written: String,
}

/// `-device` drivers that work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    VirtioNet(VirtioNet),
    VirtioBlk(VirtioBlk),
    VirtioRng {
        /// `rng-random` file; default /dev/urandom.
        filename: PathBuf,
        /// MSI-X vectors; `None`: what the queues need.
        #[serde(default)]
        vectors: Option<u16>,
    },
    PcieRootPort {
        port: u8,
        chassis: u8,
        /// Physical slot number; `None`: the chassis.
        #[serde(default)]
        slot: Option<u16>,
    },
    /// A 16550 on the ISA bus.
    IsaSerial {
        chardev: String,
        index: u8,
    },
}

/// virtio-net-pci.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNet {
    /// Back end id.
    pub netdev: String,
    pub mac: [u8; 6],
    pub rx_queue_size: u16,
    pub tx_queue_size: u16,
    /// Offered as VIRTIO_NET_F_MTU when set.
    pub host_mtu: Option<u16>,
    /// Offer packed rings.
    pub packed: bool,
    /// MSI-X vectors; `None`: what the queues need.
    pub vectors: Option<u16>,
    /// Offer VIRTIO_NET_F_MQ; the back end says how many queues there are.
    pub mq: bool,
    /// Feature properties that were given, by QEMU's name ("csum", "mrg_rxbuf", "guest_tso4",
    /// "host_tso4", "event_idx", ...); what is not here is on where the back end can.
    pub features: BTreeMap<String, bool>,
    pub bootindex: Option<i32>,
}

impl Default for VirtioNet {
    fn default() -> Self {
        Self {
            netdev: String::new(),
            mac: [0x52, 0x54, 0x00, 0x12, 0x34, 0x56],
            rx_queue_size: 256,
            tx_queue_size: 256,
            host_mtu: None,
            packed: false,
            vectors: None,
            mq: false,
            features: BTreeMap::new(),
            bootindex: None,
        }
    }
}

/// virtio-blk-pci.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlk {
    /// Node name (or `-drive` id) of the disk.
    pub drive: String,
    pub num_queues: u16,
    pub queue_size: u16,
    pub serial: String,
    pub read_only: bool,
    /// `write-cache`: offer VIRTIO_BLK_F_FLUSH and a volatile cache.
    pub write_cache: bool,
    pub packed: bool,
    pub bootindex: Option<i32>,
    /// Another writer may have the image open.
    pub share_rw: bool,
    /// MSI-X vectors; `None`: what the queues need.
    #[serde(default)]
    pub vectors: Option<u16>,
    /// Feature properties that were given, by QEMU's name ("discard", "config-wce", ...); what is
    /// not here is on.
    #[serde(default)]
    pub features: BTreeMap<String, bool>,
}

impl Default for VirtioBlk {
    fn default() -> Self {
        Self {
            drive: String::new(),
            num_queues: 1,
            queue_size: 256,
            serial: String::new(),
            read_only: false,
            write_cache: true,
            packed: false,
            bootindex: None,
            share_rw: false,
            vectors: None,
            features: BTreeMap::new(),
        }
    }
}

/// A character back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chardev {
    pub id: String,
    pub kind: ChardevKind,
    /// `mux=on`: shared by several front ends (serial and monitor), switched with C-a c.
    pub mux: bool,
    /// All output is also written to this file.
    pub logfile: Option<PathBuf>,
    /// It is written on, not anew.
    #[serde(default)]
    pub log_append: bool,
    /// What the user wrote for it, for messages; empty: it is nobody's but Tern's.
    #[serde(default)]
    pub written: String,
}

impl Chardev {
    /// Its name in messages: what the user wrote, and otherwise its id.
    pub fn told(&self) -> String {
        match self.written.as_str() {
            "" => format!("chardev '{}'", self.id),
            written => written.into(),
        }
    }
}

/// `-chardev` types that work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChardevKind {
    Null,
    Stdio {
        /// Ctrl-C and friends go to the process instead of the guest.
        signal: bool,
    },
    Pty,
    File {
        path: PathBuf,
        append: bool,
    },
    Socket {
        address: SocketAddress,
        server: bool,
        /// Wait at start until a client connects.
        wait: bool,
        /// Seconds between attempts to connect again; 0 is never.
        reconnect: u32,
    },
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketAddress {
    Unix {
        path: PathBuf,
    },
    Inet {
        host: String,
        port: u16,
    },
    /// An inherited fd (a listening socket when `server`).
    Fd {
        fd: i32,
    },
}

/// A monitor on a chardev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Monitor {
    pub chardev: String,
    pub mode: MonitorMode,
    /// QMP replies are indented over several lines.
    pub pretty: bool,
}

/// `-mon mode=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MonitorMode {
    /// HMP.
    Readline,
    /// QMP.
    Control,
}

/// What happens when the guest asks for a reset or power-off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Actions {
    /// `-no-reboot`: a reset ends the VM.
    pub no_reboot: bool,
    /// `-no-shutdown`: a power-off pauses the VM instead.
    pub no_shutdown: bool,
}

/// `-rtc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum RtcBase {
    #[default]
    Utc,
    Localtime,
    /// Seconds since 1970 at start.
    At(i64),
}

/// The process around the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Process {
    pub pidfile: Option<PathBuf>,
    pub daemonize: bool,
    /// `-D`.
    pub logfile: Option<PathBuf>,
    /// `-d`: what to log.
    pub log_items: Vec<String>,
    /// `-S`: do not start vCPUs.
    pub paused: bool,
    /// `-incoming`: a URI, or "defer".
    pub incoming: Option<String>,
    /// A unix socket on which QMP is served to several clients at once; for the `tern` commands.
    #[serde(default)]
    pub control: Option<PathBuf>,
}

/// Default RAM in bytes (QEMU's: 128 MiB).
pub const DEFAULT_MEMORY: u64 = 128 << 20;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub name: Option<String>,
    pub uuid: uuid::Uuid,
    pub machine_type: MachineType,
    pub cpu: Cpu,
    pub smp: Smp,
    /// Bytes of RAM.
    pub memory: u64,
    /// The backend of all RAM (`-machine memory-backend=`); `None`: private memory of the process.
    pub memory_backend: Option<String>,
    pub memory_backends: Vec<MemoryBackend>,
    pub numa: Vec<NumaNode>,
    pub boot: Boot,
    /// Loaded in this order, after what [`Boot`] names.
    #[serde(default)]
    pub loads: Vec<Load>,
    pub blocks: Vec<BlockNode>,
    pub netdevs: Vec<NetBackend>,
    pub devices: Vec<Device>,
    pub chardevs: Vec<Chardev>,
    pub monitors: Vec<Monitor>,
    /// Ids of `iothread` objects.
    pub iothreads: Vec<String>,
    pub rtc: RtcBase,
    pub actions: Actions,
    pub process: Process,
    /// Warnings to print once: options taken that change nothing here.
    pub warnings: Vec<String>,
}

/// A q35 machine with one vCPU of the host's model, 128 MiB and nothing on its buses; its UUID is
/// all zeroes, as QEMU's is when none is given.
impl Default for Machine {
    fn default() -> Self {
        Self {
            name: None,
            uuid: uuid::Uuid::nil(),
            machine_type: MachineType::Q35,
            cpu: Cpu::default(),
            smp: Smp::default(),
            memory: DEFAULT_MEMORY,
            memory_backend: None,
            memory_backends: Vec::new(),
            numa: Vec::new(),
            boot: Boot::default(),
            loads: Vec::new(),
            blocks: Vec::new(),
            netdevs: Vec::new(),
            devices: Vec::new(),
            chardevs: Vec::new(),
            monitors: Vec::new(),
            iothreads: Vec::new(),
            rtc: RtcBase::default(),
            actions: Actions::default(),
            process: Process::default(),
            warnings: Vec::new(),
        }
    }
}
