//! Disks: from the description's block nodes to open images, and what `query-block` says of them.

use std::path::PathBuf;
use std::sync::Arc;

use block::{Aio, Cache, DiskOptions, Locking};
use devices::virtio_blk::{BlkConfig, VirtioBlk};
use serde_json::{Value, json};
use virtio::VirtioDevice;

/// An open disk with the names that it goes by.
pub struct Disk {
    pub image: Arc<block::Disk>,
    /// The description's node name (libvirt's), or of a `-drive` its id.
    name: String,
    is_drive: bool,
    /// The device's unit name.
    device: String,
    path: PathBuf,
    cache: Cache,
}

impl Disk {
    /// Opens what `blk` names. `incoming`: without locks, the source has them.
    ///
    /// # Errors
    /// Sentences that name the node or the file.
    pub fn open(
        spec: &spec::Machine,
        blk: &spec::VirtioBlk,
        device: &str,
        incoming: bool,
    ) -> Result<Self, String> {
        let chain = resolve(spec, &blk.drive)?;
        let path = chain.path.clone();
        let cache =
            Cache { direct: chain.direct, no_flush: chain.no_flush, writeback: blk.write_cache };
        let options = DiskOptions {
            path: path.clone(),
            read_only: chain.read_only || blk.read_only,
            auto_read_only: chain.auto_read_only,
            cache,
            unmap: chain.unmap,
            aio: match chain.aio {
                spec::Aio::Threads => Aio::Threads,
                spec::Aio::Native | spec::Aio::IoUring => Aio::IoUring,
            },
            locking: if chain.locking { Locking::default() } else { Locking::Off },
            share_rw: blk.share_rw,
            take_locks: !incoming,
        };
        let image = block::Disk::open(&options).map_err(|e| e.to_string())?;
        let (name, device) = (blk.drive.clone(), device.to_owned());
        Ok(Self { image, name, is_drive: chain.drive, device, path, cache })
    }

    /// The virtio-blk device on it.
    pub fn device(&self, blk: &spec::VirtioBlk) -> Result<Box<dyn VirtioDevice>, String> {
        let config = BlkConfig {
            name: self.device.clone(),
            serial: blk.serial.clone(),
            num_queues: blk.num_queues,
            queue_size: blk.queue_size,
            write_cache: blk.write_cache,
            packed: blk.packed,
        };
        Ok(Box::new(VirtioBlk::new(config, self.image.clone())?))
    }

    /// The unit name of its device.
    pub fn device_name(&self) -> &str {
        &self.device
    }

    /// Sectors of 512 bytes that the guest sees.
    pub fn sectors(&self) -> u64 {
        self.image.len().div_ceil(512)
    }

    /// Lets the destination of a migration have the image.
    pub fn release_locks(&self) -> Result<(), String> {
        self.image.release_locks().map_err(|e| e.to_string())
    }

    /// Takes the image, and fails where another process has it.
    pub fn acquire_locks(&self) -> Result<(), String> {
        self.image.acquire_locks().map_err(|e| e.to_string())
    }

    /// Its entry in `query-block`.
    pub fn describe(&self) -> Value {
        let file = self.path.display().to_string();
        // A drive's node has a made-up name, as in QEMU; '#' keeps it apart from users' names.
        let (drive, node) = match self.is_drive {
            true => (self.name.as_str(), format!("#{}", self.name)),
            false => ("", self.name.clone()),
        };
        json!({
            "device": drive,
            "qdev": format!("/machine/peripheral/{}/virtio-backend", self.device),
            "locked": false,
            "removable": false,
            "type": "unknown",
            "io-status": "ok",
            "inserted": {
                "file": file,
                "node-name": node,
                "drv": "raw",
                "ro": self.image.read_only(),
                "encrypted": false,
                "backing_file_depth": 0,
                "detect_zeroes": "off",
                "write_threshold": 0,
                "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
                "cache": {
                    "writeback": self.cache.writeback,
                    "direct": self.cache.direct,
                    "no-flush": self.cache.no_flush,
                },
                "image": {
                    "filename": file,
                    "format": "raw",
                    "virtual-size": self.image.len(),
                    "actual-size": self.image.allocated().unwrap_or(0),
                    "dirty-flag": false,
                },
            },
        })
    }
}

/// Checks that the images of block nodes that no device uses are there, as it is an error where
/// they are used.
///
/// # Errors
/// A sentence that names the node and the file.
pub fn check_idle(spec: &spec::Machine) -> Result<(), String> {
    let used: Vec<PathBuf> = spec
        .devices
        .iter()
        .filter_map(|d| match &d.kind {
            spec::DeviceKind::VirtioBlk(blk) => resolve(spec, &blk.drive).ok().map(|c| c.path),
            _ => None,
        })
        .collect();
    for node in &spec.blocks {
        let spec::BlockDriver::File { filename } = &node.driver else { continue };
        if used.contains(filename) {
            continue;
        }
        if let Err(e) = std::fs::metadata(filename) {
            let path = filename.display();
            return Err(format!("block node '{}': cannot open '{path}': {e}", node.node_name));
        }
    }
    Ok(())
}

/// A file and what the nodes above it say.
struct Chain {
    /// The top's name is a drive's id.
    drive: bool,
    path: PathBuf,
    read_only: bool,
    auto_read_only: bool,
    direct: bool,
    no_flush: bool,
    unmap: bool,
    aio: spec::Aio,
    locking: bool,
}

/// Follows `name` down to its file.
fn resolve(spec: &spec::Machine, name: &str) -> Result<Chain, String> {
    let node = |name: &str| {
        let found = spec.blocks.iter().find(|b| b.node_name == name);
        found.ok_or_else(|| format!("drive={name}: there is no -blockdev or -drive of that name"))
    };
    let top = node(name)?;
    let mut at = top;
    // A chain longer than the number of nodes goes in a circle.
    for _ in 0..=spec.blocks.len() {
        match &at.driver {
            spec::BlockDriver::Raw { file } => at = node(file)?,
            spec::BlockDriver::File { filename } => {
                return Ok(Chain {
                    drive: top.drive,
                    path: filename.clone(),
                    read_only: top.read_only || at.read_only,
                    auto_read_only: top.auto_read_only || at.auto_read_only,
                    direct: top.direct || at.direct,
                    no_flush: top.no_flush || at.no_flush,
                    unmap: top.unmap || at.unmap,
                    aio: at.aio,
                    locking: at.locking,
                });
            }
        }
    }
    Err(format!("-blockdev {name}: its file= nodes go in a circle"))
}
