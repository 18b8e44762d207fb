//! Debian's kernels, fetched and unpacked (not installed) under target/lab/.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Result, paths, setup};

/// Which of Debian's builds: the cloud one is small and has no KVM in it.
#[derive(Clone, Copy)]
pub enum Flavour {
    /// For the lab host: all drivers, KVM.
    Host,
    /// For guests.
    Cloud,
}

impl Flavour {
    fn name(self) -> &'static str {
        match self {
            Flavour::Host => "host",
            Flavour::Cloud => "cloud",
        }
    }

    fn meta_package(self) -> &'static str {
        match self {
            Flavour::Host => "linux-image-amd64",
            Flavour::Cloud => "linux-image-cloud-amd64",
        }
    }
}

/// An unpacked kernel package.
pub struct Kernel {
    /// What `uname -r` says under it.
    pub version: String,
    /// The package's root: boot/ and lib/modules/ are under it.
    pub dir: PathBuf,
}

impl Kernel {
    /// The kernel image.
    pub fn image(&self) -> PathBuf {
        self.dir.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// Its modules.
    pub fn modules_dir(&self) -> PathBuf {
        self.dir.join("lib/modules").join(&self.version)
    }

    /// The module files of `names` with all that they need, in loading order. What is built in is
    /// left out.
    pub fn module_files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let out = Command::new("/sbin/modprobe")
                .args(["-C", "/dev/null", "-d"])
                .arg(&self.dir)
                .args(["-S", &self.version, "--show-depends", name])
                .output()
                .map_err(|e| format!("modprobe does not start: {e}"))?;
            if !out.status.success() {
                let why = String::from_utf8_lossy(&out.stderr);
                return Err(format!("the kernel {} has no module {name}: {why}", self.version));
            }
            for line in String::from_utf8_lossy(&out.stdout).lines() {
                let Some(path) = line.trim().strip_prefix("insmod ") else { continue };
                let path = PathBuf::from(path.trim());
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }
}

/// The package that a meta package stands for now, for example linux-image-6.1.0-56-amd64.
fn resolve(flavour: Flavour) -> Result<String> {
    let meta = flavour.meta_package();
    let out = Command::new("apt-cache")
        .args(["depends", "--no-recommends", "--no-suggests", meta])
        .output()
        .map_err(|e| format!("apt-cache does not start: {e}"))?;
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|l| l.split_once("Depends:").map(|(_, p)| p.trim().to_owned()))
        .find(|p| p.starts_with("linux-image-") && p.contains(|c: char| c.is_ascii_digit()))
        .ok_or_else(|| {
            format!("apt knows no package {meta}: is Debian's main archive among its sources?")
        })
}

fn download(package: &str, into: &Path) -> Result<PathBuf> {
    let wanted = [package.to_owned(), format!("{package}-unsigned")];
    for name in &wanted {
        let status = Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", name])
            .current_dir(into)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .map_err(|e| format!("apt-get does not start: {e}"))?;
        if status.success() {
            let entries = fs::read_dir(into).map_err(|e| e.to_string())?;
            if let Some(deb) = entries
                .flatten()
                .map(|e| e.path())
                .find(|p| p.extension().is_some_and(|x| x == "deb"))
            {
                return Ok(deb);
            }
        }
    }
    Err(format!("cannot download the package {package} with apt-get"))
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|e| format!("{name} does not start: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{name} failed ({status})")) }
}

fn find(dir: &Path) -> Option<Kernel> {
    let entries = fs::read_dir(dir.join("lib/modules")).ok()?;
    let version = entries.flatten().next()?.file_name().to_string_lossy().into_owned();
    let kernel = Kernel { version, dir: dir.to_path_buf() };
    (kernel.image().exists() && dir.join(".complete").exists()).then_some(kernel)
}

/// The newest kernel of that flavour; once it is there, it is used without asking apt again.
pub fn ensure(flavour: Flavour) -> Result<Kernel> {
    let dir = paths::lab().join("kernel").join(flavour.name());
    if let Some(kernel) = find(&dir) {
        return Ok(kernel);
    }
    setup::refresh_lists()?;
    let package = resolve(flavour)?;
    eprintln!("xtask: fetching {package}");
    let tmp = paths::lab().join("kernel").join(format!("{}.new", flavour.name()));
    let _ = fs::remove_dir_all(&tmp);
    fs::create_dir_all(&tmp).map_err(|e| format!("cannot make {}: {e}", tmp.display()))?;
    let deb = download(&package, &tmp)?;
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tmp))?;
    fs::remove_file(&deb).map_err(|e| e.to_string())?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    run(Command::new("/sbin/depmod").arg("-b").arg(&tmp).arg(&version))?;
    fs::write(tmp.join(".complete"), &version).map_err(|e| e.to_string())?;
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&tmp, &dir)
        .map_err(|e| format!("cannot put the kernel at {}: {e}", dir.display()))?;
    find(&dir).ok_or_else(|| format!("the package {package} has no kernel image in it"))
}
