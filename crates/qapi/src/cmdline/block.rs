//! `-drive` and `-blockdev`.

use std::io::Read;
use std::path::PathBuf;

use spec::{Aio, BlockDriver, BlockNode};

use super::keyval::Opts;
use super::suggest::hint;
use super::{Builder, CmdlineError, Taken};

/// A `-drive`: its format node has the drive's id for a name.
pub(super) struct Drive {
    pub id: String,
    /// `if=virtio`: it makes its own device.
    pub virtio: bool,
    pub read_only: bool,
    pub write_cache: bool,
    pub used: bool,
}

/// Deepest nesting of `-blockdev` nodes.
const MAX_DEPTH: usize = 8;

impl Builder {
    pub(super) fn blockdev(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("driver"))?;
        if !o.has("node-name") {
            return Err(o.error("parameter 'node-name' is missing").into());
        }
        self.node(&mut o, 0)?;
        Ok(o.finish()?)
    }

    /// Reads one node, and the nodes below it first; returns its name.
    fn node(&mut self, o: &mut Opts, depth: usize) -> Result<String, CmdlineError> {
        if depth > MAX_DEPTH {
            return Err(o.error("block nodes are nested too deep"));
        }
        let node_name = match o.id("node-name")? {
            Some(name) => name,
            None => self.next_node_name(),
        };
        if self.machine.blocks.iter().any(|b| b.node_name == node_name) {
            return Err(o.error(format!("node '{node_name}' was given before")));
        }
        let driver = match o.required("driver")?.as_str() {
            "file" | "host_device" => {
                let filename = PathBuf::from(
                    o.text("filename")?
                        .ok_or_else(|| o.error("parameter 'filename' is missing"))?,
                );
                BlockDriver::File { filename }
            }
            "raw" => BlockDriver::Raw { file: self.child(o, depth)? },
            other => return Err(no_driver(o, other)),
        };
        let node = node_options(o, node_name.clone(), driver)?;
        check_aio(o, &node)?;
        self.machine.blocks.push(node);
        Ok(node_name)
    }

    fn child(&mut self, o: &mut Opts, depth: usize) -> Result<String, CmdlineError> {
        o.take("backing");
        for key in ["offset", "size"] {
            if o.size(key, 1)?.is_some_and(|n| n != 0) {
                return Err(o.bad(key, "a part of a file is not available"));
            }
        }
        if let Some(mut inner) = o.nested("file") {
            let name = self.node(&mut inner, depth + 1)?;
            inner.finish()?;
            return Ok(name);
        }
        let name = o.required("file")?;
        match self.machine.blocks.iter().any(|b| b.node_name == name) {
            true => Ok(name),
            false => Err(o.bad("file", format!("there is no block node '{name}' before this"))),
        }
    }

    fn next_node_name(&mut self) -> String {
        // '#' keeps it apart from users' names.
        self.node_counter += 1;
        format!("#block{:03}", self.node_counter)
    }

    pub(super) fn drive(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, None)?;
        let virtio = match o.str("if").as_deref() {
            Some("virtio") => true,
            Some("none") => false,
            Some(other) => {
                return Err(o
                    .bad("if", format!("'{other}' is not available; use virtio or none"))
                    .into());
            }
            None => {
                return Err(o.error("the default if=ide is not available; add if=virtio").into());
            }
        };
        let index = o.number::<u32>("index", 0, 255)?;
        let id = match o.id("id")? {
            Some(id) => id,
            None => {
                let n = self.drives.iter().filter(|d| d.virtio == virtio).count();
                let n = index.map_or(n, |index| index as usize);
                format!("{}{n}", if virtio { "virtio" } else { "none" })
            }
        };
        if self.machine.blocks.iter().any(|b| b.node_name == id) {
            return Err(o.error(format!("drive '{id}' was given before")).into());
        }
        let file = o.str("file").or_else(|| o.str("file.filename"));
        let file = file.ok_or_else(|| o.error("parameter 'file' is missing"))?;
        if let Some(driver) = o.str("file.driver").filter(|d| d != "file" && d != "host_device") {
            return Err(no_driver(&o, &driver).into());
        }
        for (key, only) in [("media", "disk"), ("copy-on-read", "off"), ("detect-zeroes", "off")] {
            if let Some(v) = o.str(key).filter(|v| v != only) {
                return Err(o.bad(key, format!("only '{only}' is supported, not '{v}'")).into());
            }
        }
        if o.flag("snapshot", false)? {
            return Err(o.bad("snapshot", "temporary overlays are not available").into());
        }
        for (key, good) in [("werror", ["report", "enospc"]), ("rerror", ["report", "auto"])] {
            if let Some(v) = o.str(key).filter(|v| !good.contains(&v.as_str())) {
                return Err(o.bad(key, format!("only 'report' is supported, not '{v}'")).into());
            }
        }
        for key in o.ignore(&["bus", "unit"]) {
            self.warn(format!("{option} {key}= is ignored: each disk has a slot of its own"));
        }
        self.drive_format(&mut o, &file)?;
        let cache = Cache::read(&mut o)?;
        let file_node = format!("#{id}-file");
        let driver = BlockDriver::File { filename: file.into() };
        let mut node = node_options(&mut o, file_node.clone(), driver)?;
        (node.direct, node.no_flush) =
            (node.direct || cache.direct, node.no_flush || cache.no_flush);
        if let Some(on) = o.on_off_auto("file.locking")? {
            node.locking = on;
        }
        check_aio(&o, &node)?;
        let (read_only, file) = (node.read_only, file_node);
        let top =
            BlockNode { node_name: id.clone(), driver: BlockDriver::Raw { file }, ..node.clone() };
        self.machine.blocks.extend([node, top]);
        self.drives.push(Drive {
            id,
            virtio,
            read_only,
            write_cache: cache.write_back,
            used: false,
        });
        Ok(o.finish()?)
    }

    /// Only raw is there. Without `format=` an image of another format must not be shown to the
    /// guest as raw, so its first bytes are looked at.
    fn drive_format(&mut self, o: &mut Opts, file: &str) -> Result<(), CmdlineError> {
        match o.str("format").or_else(|| o.str("driver")).as_deref() {
            Some("raw") => Ok(()),
            Some(other) => Err(no_driver(o, other)),
            None => {
                let mut magic = [0; 4];
                // Unreadable or short files are told about when the disk is opened.
                let read = std::fs::metadata(file).is_ok_and(|m| m.is_file())
                    && std::fs::File::open(file).and_then(|mut f| f.read_exact(&mut magic)).is_ok();
                if read && [*b"QFI\xfb", *b"KDMV", *b"QED\0"].contains(&magic) {
                    return Err(
                        o.bad("file", format!("{file} is not a raw image; convert it first"))
                    );
                }
                self.warn(format!(
                    "-drive file={file}: the image format is not given and taken as raw; say format=raw"
                ));
                Ok(())
            }
        }
    }
}

fn no_driver(o: &Opts, driver: &str) -> CmdlineError {
    let known = ["file", "host_device", "raw"];
    let near = hint(driver, known.into_iter(), "");
    o.error(format!(
        "block driver '{driver}' is not supported{near} (available: {})",
        known.join(", ")
    ))
}

/// The options that every node has.
fn node_options(
    o: &mut Opts,
    node_name: String,
    driver: BlockDriver,
) -> Result<BlockNode, CmdlineError> {
    let unmap = o.with("discard", |s| match s {
        "unmap" | "on" => Ok(true),
        "ignore" | "off" => Ok(false),
        _ => Err(format!("expected unmap or ignore, not '{s}'")),
    })?;
    if o.str("detect-zeroes").is_some_and(|v| v != "off") {
        return Err(o.bad("detect-zeroes", "only 'off' is supported"));
    }
    if o.flag("force-share", false)? {
        return Err(o.bad("force-share", "is not available"));
    }
    let aio = o.with("aio", |s| match s {
        "threads" => Ok(Aio::Threads),
        "native" => Ok(Aio::Native),
        "io_uring" => Ok(Aio::IoUring),
        _ => Err(format!("expected threads, native or io_uring, not '{s}'")),
    })?;
    o.ignore(&["drop-cache", "x-check-cache-dropped", "aio-max-batch"]);
    let read_only = match o.bool("read-only")? {
        Some(on) => on,
        None => o.flag("readonly", false)?,
    };
    let node = BlockNode {
        node_name,
        driver,
        read_only,
        direct: o.flag("cache.direct", false)?,
        no_flush: o.flag("cache.no-flush", false)?,
        unmap: unmap.unwrap_or(false),
        auto_read_only: o.flag("auto-read-only", false)?,
        aio: aio.unwrap_or_default(),
        locking: o.on_off_auto("locking")?.unwrap_or(true),
    };
    Ok(node)
}

fn check_aio(o: &Opts, node: &BlockNode) -> Result<(), CmdlineError> {
    if node.aio == Aio::Native && !node.direct {
        return Err(o.bad("aio", "aio=native requires cache.direct=on (cache=none)"));
    }
    Ok(())
}

/// `cache=` modes.
struct Cache {
    write_back: bool,
    direct: bool,
    no_flush: bool,
}

impl Cache {
    fn read(o: &mut Opts) -> Result<Self, CmdlineError> {
        let mode = o.with("cache", |s| {
            let (write_back, direct, no_flush) = match s {
                "writeback" => (true, false, false),
                "none" | "off" => (true, true, false),
                "writethrough" => (false, false, false),
                "directsync" => (false, true, false),
                "unsafe" => (true, false, true),
                _ => {
                    return Err(format!(
                        "expected none, writeback, writethrough, directsync or unsafe, not '{s}'"
                    ));
                }
            };
            Ok(Self { write_back, direct, no_flush })
        })?;
        let mut cache = mode.unwrap_or(Self { write_back: true, direct: false, no_flush: false });
        if let Some(on) = o.bool("cache.writeback")? {
            cache.write_back = on;
        }
        Ok(cache)
    }
}
