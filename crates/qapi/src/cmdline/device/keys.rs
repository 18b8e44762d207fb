//! The devices that there are, and their properties.

use crate::cmdline::keys::Kind::{
    Id, Mac, Number, OneOf, PciAddr, PowerOfTwo, Signed, Size, Switch, SwitchOrAuto, Text,
};
use crate::cmdline::keys::{Family, Key, Member, Schema, fixed, key, refused};

/// `-device`.
pub const DEVICES: Family = Family {
    key: "driver",
    what: "device",
    heading: "Devices:",
    members: &[
        Member { schema: &ISA_SERIAL, aliases: &[], about: "16550 serial port" },
        Member { schema: &LOADER, aliases: &[], about: "bytes of a file in guest memory" },
        Member { schema: &ROOT_PORT, aliases: &[], about: "PCI Express root port" },
        Member {
            schema: &BLK,
            aliases: &["virtio-blk", "virtio-blk-pci-non-transitional"],
            about: "virtio disk",
        },
        Member {
            schema: &NET,
            aliases: &["virtio-net", "virtio-net-pci-non-transitional"],
            about: "virtio network card",
        },
        Member {
            schema: &RNG,
            aliases: &["virtio-rng", "virtio-rng-pci-non-transitional"],
            about: "virtio random number source",
        },
    ],
    absent: &[],
    instead: "",
};

const EVERY: &[Key] = &[key("id", Id, "", "Name of the device, for monitors and other options")];

const PCI: &[Key] = &[
    key(
        "bus",
        Id,
        "",
        "Root bus (pcie.0 or pci.0) or id of a pcie-root-port; by default the root bus",
    ),
    key(
        "addr",
        PciAddr,
        "",
        "Slot and function in hexadecimal, such as 06.0; by default the next free",
    ),
    key("multifunction", Switch, "off", "Other functions share its slot"),
    key("rombar", Number(0, 0xffff_ffff), "", "Show the option ROM to the guest").quiet(),
    key("romsize", Number(0, 0xffff_ffff), "", "Size of the option ROM").quiet(),
    key("romfile", Text, "", "Option ROM; none is ever loaded").quiet(),
    key("x-pcie-lnksta-dllla", Switch, "on", "Link status reports an active link").quiet(),
    key("x-pcie-extcap-init", Switch, "on", "PCIe extended configuration space").quiet(),
];

const VIRTIO: &[Key] = &[
    key(
        "vectors",
        Number(0, 2048),
        "",
        "MSI-X vectors; by default what the queues need, 0 is none",
    ),
    key("disable-legacy", SwitchOrAuto, "on", "No virtio 0.9 interface")
        .only(&["on", "auto"], "legacy virtio is not available"),
    fixed("disable-modern", "off", "No virtio 1.x interface"),
    fixed("iommu_platform", "off", "Offer VIRTIO_F_ACCESS_PLATFORM"),
    fixed("ats", "off", "PCIe address translation service"),
    fixed("page-per-vq", "off", "A page of doorbells for each queue"),
    fixed("failover", "off", "Stand-by of a passed-through device"),
    fixed("any_layout", "on", "Any layout of descriptors"),
    fixed("ioeventfd", "on", "Doorbells by eventfd"),
    fixed("modern-pio-notify", "off", "Doorbells by port I/O"),
];

const RINGS: &[Key] = &[
    key("packed", Switch, "off", "Offer packed rings"),
    key("event_idx", Switch, "on", "Offer VIRTIO_F_EVENT_IDX"),
    key("indirect_desc", Switch, "on", "Offer VIRTIO_F_INDIRECT_DESC"),
    key("bootindex", Signed, "", "Boot order; the kernel of -kernel boots in any case"),
];

const ISA_SERIAL: Schema = Schema {
    name: "isa-serial",
    implied: None,
    keys: &[
        EVERY,
        &[
            key("chardev", Text, "", "id of the -chardev that it is connected to; must be given"),
            key("index", Number(0, 3), "", "COM port less one; by default the next free"),
            key("bus", Text, "", "ISA bus; there is one").quiet(),
            refused("iobase", "follows from 'index'"),
            refused("irq", "follows from 'index'"),
            refused("wakeup", "follows from 'index'"),
        ],
    ],
};

const LOADER: Schema = Schema {
    name: "loader",
    implied: None,
    keys: &[
        EVERY,
        &[
            key("file", Text, "", "File whose bytes are loaded; must be given"),
            key(
                "addr",
                Number(0, u64::MAX),
                "",
                "Guest-physical address of the first byte; must be given",
            ),
            key(
                "force-raw",
                Switch,
                "off",
                "Take the bytes as they are, whatever format they look like",
            ),
            refused("data", "values are not loaded; give a file="),
            refused("data-len", "values are not loaded; give a file="),
            refused("data-be", "values are not loaded; give a file="),
            refused("cpu-num", "a vCPU cannot be started by a loader; it starts with -kernel"),
        ],
    ],
};

const WINDOWS: &str = "windows follow the devices";

const ROOT_PORT: Schema = Schema {
    name: "pcie-root-port",
    implied: None,
    keys: &[
        EVERY,
        PCI,
        &[
            key("port", Number(0, 255), "0", "Port number"),
            key("chassis", Number(0, 255), "0", "Chassis number"),
            key("slot", Number(0, 8191), "", "Physical slot number; by default the chassis"),
            key("hotplug", SwitchOrAuto, "", "Devices come and go").quiet(),
            key("power_controller_present", SwitchOrAuto, "", "Slot power can be switched").quiet(),
            key("io-reserve", Size(1), "", "I/O window").ignored(WINDOWS),
            key("mem-reserve", Size(1), "", "Memory window").ignored(WINDOWS),
            key("pref64-reserve", Size(1), "", "64-bit prefetchable window").ignored(WINDOWS),
            key("bus-reserve", Number(0, 0xffff_ffff), "", "Bus numbers").ignored(WINDOWS),
            key("x-speed", Text, "", "Link speed").ignored("the link has no speed"),
            key("x-width", Text, "", "Link width").ignored("the link has no width"),
        ],
    ],
};

/// Of virtio-net, the switches that go to the device by their names.
pub const NET_FEATURES: &[Key] = &[
    key("csum", Switch, "on", "The guest may leave checksums to the host"),
    key("guest_csum", Switch, "on", "The host may leave checksums to the guest"),
    key("gso", Switch, "on", "Segmentation of any kind is left to the host"),
    key("guest_tso4", Switch, "on", "The guest takes large TCP/IPv4 frames"),
    key("guest_tso6", Switch, "on", "The guest takes large TCP/IPv6 frames"),
    key("guest_ecn", Switch, "on", "The guest takes large frames with ECN"),
    key("guest_ufo", Switch, "on", "The guest takes large UDP frames"),
    key("host_tso4", Switch, "on", "The host takes large TCP/IPv4 frames"),
    key("host_tso6", Switch, "on", "The host takes large TCP/IPv6 frames"),
    key("host_ecn", Switch, "on", "The host takes large frames with ECN"),
    key("host_ufo", Switch, "on", "The host takes large UDP frames"),
    key("mrg_rxbuf", Switch, "on", "Offer mergeable receive buffers"),
    key("status", Switch, "on", "Offer the link status"),
    key("ctrl_vq", Switch, "on", "Offer the control queue"),
    key("ctrl_rx", Switch, "on", "Offer control of receive modes"),
    key("ctrl_vlan", Switch, "on", "Offer the VLAN filter"),
    key("ctrl_mac_addr", Switch, "on", "Offer setting of the MAC address"),
    key("guest_announce", Switch, "on", "The guest may be asked to announce itself"),
];

/// `model` of `-nic` is this device's.
const NET: Schema = Schema {
    name: "virtio-net-pci",
    implied: None,
    keys: &[
        EVERY,
        PCI,
        VIRTIO,
        RINGS,
        NET_FEATURES,
        &[
            key("netdev", Text, "", "id of the -netdev that it is connected to; must be given"),
            key(
                "mac",
                Mac,
                "",
                "MAC address; by default 52:54:00:12:34:56, the next card's one more",
            ),
            key("rx_queue_size", PowerOfTwo(64, 1024), "256", "Buffers of each receive queue"),
            key("tx_queue_size", PowerOfTwo(64, 1024), "256", "Buffers of each transmit queue"),
            key("host_mtu", Number(0, 65535), "0", "MTU that the guest is told; 0 tells none"),
            key("mq", Switch, "off", "Offer several queue pairs; the back end says how many"),
            fixed("rss", "off", "Receive-side scaling"),
            fixed("hash", "off", "Hash reports"),
            fixed("guest_uso4", "off", "The guest takes large UDP/IPv4 frames"),
            fixed("guest_uso6", "off", "The guest takes large UDP/IPv6 frames"),
            fixed("host_uso", "off", "The host takes large UDP frames"),
            fixed("guest_rsc_ext", "off", "Receive coalescing reports"),
            key("tx", Text, "", "How frames are sent").ignored("they are sent at once"),
            key("x-txtimer", Text, "", "Delay of sending").ignored("frames are sent at once"),
            key("x-txburst", Text, "", "Frames sent at once").ignored("all that wait are sent"),
            key("ctrl_guest_offloads", Switch, "", "Offer control of offloads")
                .ignored("it changes nothing here"),
            key("ctrl_rx_extra", Switch, "", "Offer control of more receive modes")
                .ignored("it changes nothing here"),
        ],
    ],
};

/// Of virtio-blk, the switches that go to the device by their names.
pub const BLK_FEATURES: &[Key] = &[
    key("config-wce", Switch, "on", "The guest may switch the write cache"),
    key("discard", Switch, "on", "Offer discard"),
    key("write-zeroes", Switch, "on", "Offer writing of zeroes"),
];

const FROM_IMAGE: &str = "it follows from the image";

const BLK: Schema = Schema {
    name: "virtio-blk-pci",
    implied: None,
    keys: &[
        EVERY,
        PCI,
        VIRTIO,
        RINGS,
        BLK_FEATURES,
        &[
            key("drive", Text, "", "id of the -drive or name of the -blockdev node; must be given"),
            key("serial", Text, "", "Serial number, at most 20 bytes"),
            key(
                "write-cache",
                SwitchOrAuto,
                "auto",
                "A volatile write cache; auto is what the -drive has, or on",
            ),
            key("num-queues", Number(1, 256), "1", "Number of queues"),
            key("queue-size", PowerOfTwo(2, 1024), "256", "Requests of each queue"),
            key("share-rw", Switch, "off", "Another writer may have the image open"),
            key(
                "iothread",
                Text,
                "",
                "id of an -object iothread; each disk has a thread in any case",
            ),
            key("logical_block_size", Size(1), "512", "Logical block size")
                .only(&["512"], "other sizes are not available"),
            key("physical_block_size", Size(1), "512", "Physical block size")
                .only(&["512"], "other sizes are not available"),
            fixed("scsi", "off", "SCSI requests"),
            key("seg-max-adjust", Switch, "on", "Segments follow the queue's size")
                .ignored("it is always done"),
            key("request-merging", Switch, "on", "Adjacent requests are merged")
                .ignored("it is always done"),
            key("discard_granularity", Size(1), "", "Unit of discards").ignored(FROM_IMAGE),
            key("min_io_size", Size(1), "", "Smallest good request").ignored(FROM_IMAGE),
            key("opt_io_size", Size(1), "", "Best request").ignored(FROM_IMAGE),
            key("werror", OneOf(ON_ERROR), "auto", "What is done when a write fails")
                .only(&["auto", "report", "enospc"], "the guest is told"),
            key("rerror", OneOf(ON_ERROR), "auto", "What is done when a read fails")
                .only(&["auto", "report", "enospc"], "the guest is told"),
        ],
    ],
};

/// What QEMU can do when a disk fails.
pub(in crate::cmdline) const ON_ERROR: &[&str] = &["auto", "report", "ignore", "enospc", "stop"];

const RNG: Schema = Schema {
    name: "virtio-rng-pci",
    implied: None,
    keys: &[
        EVERY,
        PCI,
        VIRTIO,
        &[
            key(
                "rng",
                Text,
                "",
                "id of an -object rng-random or rng-builtin; by default /dev/urandom",
            ),
            refused("max-bytes", "rate limits are not available"),
            refused("period", "rate limits are not available"),
        ],
    ],
};

/// Drivers that are taken with a warning and left out: a guest does its work without them.
pub const HARMLESS_DRIVERS: &[&str] = &[
    "AC97",
    "ES1370",
    "VGA",
    "bochs-display",
    "cirrus-vga",
    "hda-duplex",
    "hda-micro",
    "hda-output",
    "ich9-intel-hda",
    "ich9-usb-ehci1",
    "ich9-usb-uhci1",
    "ich9-usb-uhci2",
    "ich9-usb-uhci3",
    "intel-hda",
    "nec-usb-xhci",
    "piix3-usb-uhci",
    "qemu-xhci",
    "qxl",
    "qxl-vga",
    "usb-ehci",
    "usb-hub",
    "usb-kbd",
    "usb-mouse",
    "usb-tablet",
    "virtio-sound-pci",
];
