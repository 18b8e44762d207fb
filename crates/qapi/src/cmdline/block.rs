//! `-drive` and `-blockdev`.

use std::io::Read;
use std::path::PathBuf;

use spec::{Aio, BlockDriver, BlockNode};

use super::device::keys::ON_ERROR;
use super::keys::Kind::{Id, Node, Number, OneOf, Size, Switch, SwitchOrAuto, Text};
use super::keys::{Family, Key, Member, Schema, fixed, key, refused};
use super::keyval::Opts;
use super::{Builder, CmdlineError, Stop, Taken};

/// A `-drive`: its format node has the drive's id for a name.
pub(super) struct Drive {
    pub id: String,
    /// `if=virtio`: it makes its own device.
    pub virtio: bool,
    pub read_only: bool,
    pub write_cache: bool,
    pub used: bool,
    /// The option with its text.
    pub written: String,
}

/// Deepest nesting of `-blockdev` nodes.
const MAX_DEPTH: usize = 8;

/// `-blockdev`.
pub const NODES: Family = Family {
    key: "driver",
    what: "block driver",
    heading: "Available block drivers:",
    members: &[
        Member { schema: &FILE, aliases: &[], about: "regular file" },
        Member { schema: &HOST_DEVICE, aliases: &[], about: "block device of the host" },
        Member { schema: &RAW, aliases: &[], about: "raw format over another node" },
    ],
    absent: &[],
    instead: "",
};

/// What every node has, of -drive too.
const NODE: &[Key] = &[
    key("read-only", Switch, "off", "The guest cannot write"),
    key("auto-read-only", Switch, "off", "Open read-only when it cannot be opened for writing"),
    key("cache.direct", Switch, "off", "Go past the host's page cache (O_DIRECT)"),
    key("cache.no-flush", Switch, "off", "Do not pass flushes on"),
    key(
        "discard",
        OneOf(&["ignore", "unmap", "off", "on"]),
        "ignore",
        "What discards do to the file",
    ),
    key("detect-zeroes", OneOf(&["off", "on", "unmap"]), "off", "Writes of zeroes become unmaps")
        .only(&["off"], "it is not available"),
    fixed("force-share", "off", "Others may write meanwhile"),
];

const OF_FILE: &[Key] = &[
    key("aio", OneOf(&["threads", "native", "io_uring"]), "threads", "How I/O is done"),
    key("aio-max-batch", Number(0, u64::MAX), "", "Requests submitted at once").quiet(),
    key("drop-cache", Switch, "", "Drop the page cache after a migration").quiet(),
    key("x-check-cache-dropped", Switch, "", "Check that it is dropped").quiet(),
];

const NAMED: &[Key] = &[key("node-name", Id, "", "Name of the node; must be given at the top")];

const FILENAME: &[Key] = &[
    key("filename", Text, "", "Path of the file or device; must be given"),
    key("locking", SwitchOrAuto, "auto", "Lock the image against other users"),
];

const FILE: Schema =
    Schema { name: "file", implied: None, keys: &[NAMED, NODE, OF_FILE, FILENAME] };

const HOST_DEVICE: Schema =
    Schema { name: "host_device", implied: None, keys: &[NAMED, NODE, OF_FILE, FILENAME] };

const PART: &str = "a part of a file is not available";

const RAW: Schema = Schema {
    name: "raw",
    implied: None,
    keys: &[
        NAMED,
        NODE,
        &[
            key(
                "file",
                Node,
                "",
                "Name of the node below, or its own keys as file.KEY; must be given",
            ),
            key("backing", Node, "", "Raw has no backing file").quiet(),
            key("offset", Size(1), "0", "Where the image begins in the file").only(&["0"], PART),
            key("size", Size(1), "0", "Length of the image; 0 is the file's").only(&["0"], PART),
        ],
    ],
};

const RAW_ONLY: &str = "convert the image (qemu-img convert -O raw)";

const CACHE_MODES: &[&str] = &["writeback", "none", "off", "writethrough", "directsync", "unsafe"];

const DRIVE: Schema = Schema::of(
    None,
    &[
        NODE,
        OF_FILE,
        &[
            key("file", Text, "", "Path of the image; must be given"),
            key("file.filename", Text, "", "The same"),
            key("file.driver", OneOf(&["file", "host_device"]), "file", "What the file is"),
            key("file.locking", SwitchOrAuto, "auto", "Lock the image against other users"),
            key(
                "if",
                OneOf(&["virtio", "none"]),
                "",
                "virtio makes the disk's device, none waits for a -device; must be given",
            ),
            key("id", Id, "", "Name of the drive; by default virtio0 and so on"),
            key("index", Number(0, 255), "", "Number for the default name"),
            key("format", Text, "", "Format of the image; guessed when absent")
                .only(&["raw"], RAW_ONLY),
            key("driver", Text, "", "Old name of format").only(&["raw"], RAW_ONLY),
            key(
                "cache",
                OneOf(CACHE_MODES),
                "writeback",
                "Cache mode: cache.writeback, cache.direct and cache.no-flush in one",
            ),
            key("cache.writeback", Switch, "on", "The disk has a volatile write cache"),
            key("readonly", Switch, "off", "Old name of read-only"),
            key("locking", SwitchOrAuto, "auto", "Short for file.locking"),
            key("media", OneOf(&["disk", "cdrom"]), "disk", "What the guest sees")
                .only(&["disk"], "there is no CD-ROM drive"),
            fixed("copy-on-read", "off", "Copy what is read into the image"),
            fixed("snapshot", "off", "Write to a temporary overlay"),
            key("werror", OneOf(ON_ERROR), "enospc", "What is done when a write fails")
                .only(&["report", "enospc", "auto"], "the guest is told"),
            key("rerror", OneOf(ON_ERROR), "report", "What is done when a read fails")
                .only(&["report", "auto"], "the guest is told"),
            key("bus", Text, "", "Bus number").ignored("each disk has a slot of its own"),
            key("unit", Text, "", "Unit number").ignored("each disk has a slot of its own"),
            refused("backing", "raw has no backing file"),
        ],
    ],
);

impl Builder {
    pub(super) fn blockdev(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some(NODES.key))?;
        self.node(&mut o, 0).map(drop)
    }

    /// Reads one node, and the nodes below it first; returns its name.
    fn node(&mut self, o: &mut Opts, depth: usize) -> Result<String, Stop> {
        if depth > MAX_DEPTH {
            return Err(o.error("block nodes are nested too deep").into());
        }
        let schema = self.pick(o, &NODES)?;
        let node_name = match o.str("node-name") {
            Some(name) => name,
            None if depth == 0 => o.required("node-name")?,
            None => self.next_node_name(),
        };
        if self.machine.blocks.iter().any(|b| b.node_name == node_name) {
            return Err(o.error(format!("node '{node_name}' was given before")).into());
        }
        let node = match schema.name {
            "raw" => {
                let driver = BlockDriver::Raw { file: self.child(o, depth)? };
                node_options(o, node_name.clone(), driver)?
            }
            _ => {
                let driver = BlockDriver::File { filename: o.required("filename")?.into() };
                let node = node_options(o, node_name.clone(), driver)?;
                file_options(o, node, "locking")?
            }
        };
        o.finish()?;
        self.machine.blocks.push(node);
        Ok(node_name)
    }

    fn child(&mut self, o: &mut Opts, depth: usize) -> Result<String, Stop> {
        if let Some(mut inner) = o.nested("file") {
            return self.node(&mut inner, depth + 1);
        }
        let name = o.required("file")?;
        match self.machine.blocks.iter().any(|b| b.node_name == name) {
            true => Ok(name),
            false => {
                Err(o.bad("file", format!("there is no block node '{name}' before this")).into())
            }
        }
    }

    fn next_node_name(&mut self) -> String {
        // '#' keeps it apart from users' names.
        self.node_counter += 1;
        format!("#block{:03}", self.node_counter)
    }

    pub(super) fn drive(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, DRIVE.implied)?;
        let format_given = o.has("format") || o.has("driver");
        self.adopt(&mut o, &DRIVE)?;
        let virtio = match o.str("if").as_deref() {
            Some(bus) => bus == "virtio",
            None => {
                return Err(o.error("the default if=ide is not available; add if=virtio").into());
            }
        };
        let index: Option<usize> = o.number_if("index")?;
        let id = o.str("id").unwrap_or_else(|| {
            let n = self.drives.iter().filter(|d| d.virtio == virtio).count();
            format!("{}{}", if virtio { "virtio" } else { "none" }, index.unwrap_or(n))
        });
        if self.machine.blocks.iter().any(|b| b.node_name == id) {
            return Err(o.error(format!("drive '{id}' was given before")).into());
        }
        let file = match o.str("file") {
            Some(file) => file,
            None => o.str("file.filename").ok_or_else(|| o.error("parameter 'file' is missing"))?,
        };
        o.str("file.driver");
        if file.split_once("://").is_some_and(|(scheme, _)| scheme != "file") {
            let why = format!("'{file}' is a URL; only files and devices of this host are there");
            return Err(o.bad("file", why).into());
        }
        if !format_given {
            self.guess_format(&o, &file)?;
        }
        let cache = Cache::read(&mut o)?;
        let file_node = format!("#{id}-file");
        let driver = BlockDriver::File { filename: PathBuf::from(file) };
        let mut node = node_options(&mut o, file_node.clone(), driver)?;
        node.read_only |= o.flag("readonly")?;
        node.direct |= cache.direct;
        node.no_flush |= cache.no_flush;
        let short = o.on_off_auto("locking")?;
        let mut node = file_options(&mut o, node, "file.locking")?;
        node.locking &= short.unwrap_or(true);
        o.finish()?;
        let (read_only, file) = (node.read_only, file_node);
        let driver = BlockDriver::Raw { file };
        let top = BlockNode { node_name: id.clone(), drive: true, driver, ..node.clone() };
        self.machine.blocks.extend([node, top]);
        self.drives.push(Drive {
            id,
            virtio,
            read_only,
            write_cache: cache.write_back,
            used: false,
            written: String::new(),
        });
        Ok(())
    }

    /// Only raw is there. Without `format=` an image of another format must not be shown to the
    /// guest as raw, so its first bytes are looked at.
    fn guess_format(&mut self, o: &Opts, file: &str) -> Result<(), CmdlineError> {
        let mut magic = [0; 4];
        // Unreadable or short files are told about when the disk is opened.
        let read = std::fs::metadata(file).is_ok_and(|m| m.is_file())
            && std::fs::File::open(file).and_then(|mut f| f.read_exact(&mut magic)).is_ok();
        if read && [*b"QFI\xfb", *b"KDMV", *b"QED\0"].contains(&magic) {
            return Err(o.bad("file", format!("{file} is not a raw image; {RAW_ONLY}")));
        }
        self.warn(format!(
            "-drive file={file}: the image format is not given and taken as raw; say format=raw"
        ));
        Ok(())
    }
}

/// The options that every node has.
fn node_options(
    o: &mut Opts,
    node_name: String,
    driver: BlockDriver,
) -> Result<BlockNode, CmdlineError> {
    let discard = o.or_default("discard");
    Ok(BlockNode {
        node_name,
        drive: false,
        driver,
        read_only: o.flag("read-only")?,
        direct: o.flag("cache.direct")?,
        no_flush: o.flag("cache.no-flush")?,
        unmap: matches!(discard.as_str(), "unmap" | "on"),
        auto_read_only: o.flag("auto-read-only")?,
        aio: Aio::default(),
        locking: true,
    })
}

/// The options of a node that is a file.
fn file_options(o: &mut Opts, node: BlockNode, locking: &str) -> Result<BlockNode, CmdlineError> {
    let aio = match o.or_default("aio").as_str() {
        "native" if !node.direct => {
            return Err(o.bad("aio", "aio=native requires cache.direct=on (cache=none)"));
        }
        "native" => Aio::Native,
        "io_uring" => Aio::IoUring,
        _ => Aio::Threads,
    };
    Ok(BlockNode { aio, locking: o.on_off_auto(locking)?.unwrap_or(true), ..node })
}

/// `cache=` modes.
struct Cache {
    write_back: bool,
    direct: bool,
    no_flush: bool,
}

impl Cache {
    fn read(o: &mut Opts) -> Result<Self, CmdlineError> {
        let (write_back, direct, no_flush) = match o.or_default("cache").as_str() {
            "none" | "off" => (true, true, false),
            "writethrough" => (false, false, false),
            "directsync" => (false, true, false),
            "unsafe" => (true, false, true),
            _ => (true, false, false),
        };
        let write_back = o.bool("cache.writeback")?.unwrap_or(write_back);
        Ok(Self { write_back, direct, no_flush })
    }
}
