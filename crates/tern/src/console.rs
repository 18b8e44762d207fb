//! `tern console`: the terminal on the guest's serial port.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use serde_json::json;

use crate::{Outcome, client, runtime_dir};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern console vm1        (Ctrl-] leaves)")]
pub struct Args {
    /// Name of the VM
    name: String,
}

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    if stays_taken(&vm) {
        return Err(format!(
            "the console of VM {} is taken: somebody is connected to it, and it serves one at a \
             time. End that connection first (Ctrl-] leaves `tern console`)",
            vm.name
        )
        .into());
    }
    let stream = match UnixStream::connect(vm.console_socket()) {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(format!(
                "VM {} has no console here: its serial port is connected elsewhere \
                 (`tern info {}` shows where)",
                vm.name, vm.name
            )
            .into());
        }
        Err(e) => {
            return Err(format!("cannot connect to the console of VM {}: {e}", vm.name).into());
        }
    };
    let raw = if io::stdin().is_terminal() {
        vmm::tell!("Connected to VM {}; Ctrl-] leaves.", vm.name);
        Some(RawTerminal::new()?)
    } else {
        None
    };
    let end = shuttle(stream);
    drop(raw);
    match end? {
        End::Escape => vmm::tell!("\nLeft the console of VM {}.", vm.name),
        End::Closed => vmm::tell!("\nThe console of VM {} was closed.", vm.name),
    }
    Ok(0)
}

/// A client that has just left may still be counted for a moment.
fn stays_taken(vm: &runtime_dir::Entry) -> bool {
    (0..5).all(|attempt| {
        std::thread::sleep(std::time::Duration::from_millis(if attempt > 0 { 100 } else { 0 }));
        is_taken(vm)
    })
}

/// Whether the console serves somebody. A second client is let in only after the first, and would
/// wait before a dark screen.
fn is_taken(vm: &runtime_dir::Entry) -> bool {
    let path = vm.console_socket().display().to_string();
    let Ok(chardevs) = client::execute(vm, "query-chardev", json!({})) else { return false };
    let name = |chardev: &serde_json::Value| chardev["filename"].as_str().map(str::to_owned);
    let mut names = chardevs.as_array().into_iter().flatten().filter_map(name);
    names.any(|name| name.contains(&path) && !name.starts_with("disconnected:"))
}

enum End {
    Escape,
    Closed,
}

/// Moves bytes both ways until the escape is typed or the VM closes the console. An end of the
/// standard input is not the end: what the guest answers to a script is still to come.
fn shuttle(mut stream: UnixStream) -> io::Result<End> {
    // Not smaller than the buffer of stdin, which it thereby goes past: poll sees all that waits.
    let mut chunk = [0; 16 << 10];
    let mut input_fd = libc::STDIN_FILENO;
    loop {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut set = [poll(stream.as_raw_fd()), poll(input_fd)];
        // SAFETY: a live array and its length.
        if unsafe { libc::poll(set.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if set[0].revents != 0 {
            let n = stream.read(&mut chunk)?;
            if n == 0 {
                return Ok(End::Closed);
            }
            let mut out = io::stdout().lock();
            out.write_all(&chunk[..n])?;
            out.flush()?;
        }
        if set[1].revents != 0 {
            let n = io::stdin().lock().read(&mut chunk)?;
            if n == 0 {
                input_fd = -1;
            }
            let typed = &chunk[..n];
            let end = typed.iter().position(|b| *b == ESCAPE);
            if stream.write_all(&typed[..end.unwrap_or(n)]).is_err() {
                return Ok(End::Closed);
            }
            if end.is_some() {
                return Ok(End::Escape);
            }
        }
    }
}

/// The terminal in raw mode (its signals are keys then); given back on drop.
struct RawTerminal(libc::termios);

impl RawTerminal {
    fn new() -> io::Result<Self> {
        // SAFETY: termios is plain data for which all zeroes is valid; it is alive.
        let before = unsafe {
            let mut mode: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(libc::STDIN_FILENO, &raw mut mode) < 0 {
                return Err(io::Error::last_os_error());
            }
            mode
        };
        let mut raw = before;
        // SAFETY: live termios structures.
        unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw);
        }
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: a live termios.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.0) };
    }
}
