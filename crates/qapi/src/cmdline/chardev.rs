//! `-chardev`, `-serial`, `-monitor`, `-mon`, `-qmp`: character back ends and who uses them.

use spec::{Chardev, ChardevKind, Monitor, MonitorMode, SocketAddress};

use super::keyval::Opts;
use super::suggest::hint;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken, invalid};

const BACKENDS: [&str; 5] = ["null", "stdio", "pty", "file", "socket"];

impl Builder {
    pub(super) fn chardev(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("backend"))?;
        let backend = o.required("backend")?;
        if matches!(backend.as_str(), "help" | "?") {
            return Err(Stop::Print(format!(
                "Available chardev backend types:\n  {}\n",
                BACKENDS.join("\n  ")
            )));
        }
        let id = o.id("id")?.ok_or_else(|| o.error("parameter 'id' is missing"))?;
        if self.machine.chardevs.iter().any(|c| c.id == id) {
            return Err(o.error(format!("chardev '{id}' was given before")).into());
        }
        let kind = chardev_kind(&mut o, &backend)?;
        let mux = o.flag("mux", false)?;
        let logfile = o.str("logfile").map(Into::into);
        let log_append = o.flag("logappend", false)?;
        o.finish()?;
        self.add_chardev(option, Chardev { id, kind, mux, logfile, log_append })
    }

    fn add_chardev(&mut self, option: &str, chardev: Chardev) -> Taken {
        if matches!(chardev.kind, ChardevKind::Stdio { .. }) {
            if let Some(first) = &self.stdio_option {
                return Err(invalid(
                    option,
                    format!(
                        "cannot use stdio by multiple character devices (first used by {first})"
                    ),
                ));
            }
            self.stdio_option = Some(option.into());
        }
        self.machine.chardevs.push(chardev);
        Ok(())
    }

    /// The chardev that a `-serial`, `-monitor` or `-qmp` word means: its id, `None` for `none`.
    /// A new one is called `label`.
    pub(super) fn character_device(
        &mut self,
        option: &str,
        label: &str,
        word: &str,
    ) -> Result<Option<String>, Stop> {
        if word == "none" {
            return Ok(None);
        }
        if let Some(id) = word.strip_prefix("chardev:") {
            return match self.machine.chardevs.iter().any(|c| c.id == id) {
                true => Ok(Some(id.into())),
                false => Err(invalid(option, format!("there is no chardev '{id}'"))),
            };
        }
        let (mux, word) = match word.strip_prefix("mon:") {
            Some(rest) => (true, rest),
            None => (false, word),
        };
        let kind = compat(option, word)?;
        let kind = match kind {
            // With a monitor beside it, Ctrl-C goes to the guest.
            ChardevKind::Stdio { .. } if mux => ChardevKind::Stdio { signal: false },
            kind => kind,
        };
        let id = label.into();
        self.add_chardev(option, Chardev { id, kind, mux, logfile: None, log_append: false })?;
        if mux {
            self.add_monitor(label.into(), MonitorMode::Readline, false);
        }
        Ok(Some(label.into()))
    }

    pub(super) fn add_monitor(&mut self, chardev: String, mode: MonitorMode, pretty: bool) {
        self.machine.monitors.push(Monitor { chardev, mode, pretty });
    }

    /// `-monitor`, `-qmp`, `-qmp-pretty`: read when all chardevs are known.
    pub(super) fn monitor(&mut self, option: &str, word: &str) -> Taken {
        self.monitor_given = true;
        self.monitor_words.push((option.into(), word.into()));
        Ok(())
    }

    pub(super) fn mon(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("chardev"))?;
        self.monitor_given = true;
        let chardev = o.required("chardev")?;
        let mode = o.with("mode", |s| match s {
            "readline" => Ok(MonitorMode::Readline),
            "control" => Ok(MonitorMode::Control),
            _ => Err(format!("expected readline or control, not '{s}'")),
        })?;
        let pretty = o.flag("pretty", false)?;
        o.id("id")?;
        o.finish()?;
        self.add_monitor(chardev, mode.unwrap_or(MonitorMode::Readline), pretty);
        Ok(())
    }
}

fn chardev_kind(o: &mut Opts, backend: &str) -> Result<ChardevKind, CmdlineError> {
    Ok(match backend {
        "null" => ChardevKind::Null,
        "stdio" => ChardevKind::Stdio { signal: o.flag("signal", true)? },
        "pty" => ChardevKind::Pty,
        "file" => {
            ChardevKind::File { path: o.required("path")?.into(), append: o.flag("append", false)? }
        }
        "socket" => socket(o)?,
        other => {
            let near = hint(other, BACKENDS.into_iter(), "");
            return Err(o.error(format!(
                "chardev type '{other}' is not supported{near} (available: {})",
                BACKENDS.join(", ")
            )));
        }
    })
}

fn socket(o: &mut Opts) -> Result<ChardevKind, CmdlineError> {
    let server = o.flag("server", false)?;
    let wait = o.bool("wait")?;
    let reconnect = o.number::<u32>("reconnect", 0, 1 << 30)?;
    let (path, port, fd) = (o.str("path"), o.str("port"), o.with("fd", value::fds)?);
    let host = o.str("host");
    let address = match (path, port, fd) {
        (Some(path), None, None) => SocketAddress::Unix { path: path.into() },
        (None, Some(port), None) => SocketAddress::Inet {
            host: host.unwrap_or_default(),
            port: port
                .parse()
                .map_err(|_| o.bad("port", format!("'{port}' is not a port number")))?,
        },
        (None, None, Some(fds)) if fds.len() == 1 => SocketAddress::Fd { fd: fds[0] },
        _ => return Err(o.error("give one of 'path', 'host' with 'port', or 'fd'")),
    };
    for key in ["telnet", "tn3270", "websocket", "abstract"] {
        if o.flag(key, false)? {
            return Err(o.bad(key, "is not available"));
        }
    }
    // A socket's bytes are sent at once in any case.
    o.ignore(&["nodelay", "delay", "ipv4", "ipv6", "tight"]);
    socket_kind(address, server, wait, reconnect).map_err(|e| o.error(e))
}

fn socket_kind(
    address: SocketAddress,
    server: bool,
    wait: Option<bool>,
    reconnect: Option<u32>,
) -> Result<ChardevKind, &'static str> {
    if !server && wait == Some(true) {
        return Err("'wait' option is incompatible with socket in client connect mode");
    }
    if server && reconnect.is_some_and(|r| r > 0) {
        return Err("'reconnect' option is incompatible with socket in server listen mode");
    }
    let wait = server && wait.unwrap_or(true);
    Ok(ChardevKind::Socket { address, server, wait, reconnect: reconnect.unwrap_or(0) })
}

/// The short forms: `stdio`, `pty`, `file:PATH`, `unix:PATH,server=on`, `tcp:HOST:PORT,...`.
fn compat(option: &str, word: &str) -> Result<ChardevKind, Stop> {
    match word {
        "null" => return Ok(ChardevKind::Null),
        "stdio" => return Ok(ChardevKind::Stdio { signal: true }),
        "pty" => return Ok(ChardevKind::Pty),
        _ => {}
    }
    let unknown = || {
        let known =
            ["none", "null", "stdio", "pty", "mon:stdio", "file:", "unix:", "tcp:", "chardev:"];
        let near = hint(word, known.into_iter(), "");
        invalid(option, format!("'{word}' is not supported{near} (use {})", known.join(", ")))
    };
    let (scheme, rest) = word.split_once(':').ok_or_else(unknown)?;
    match scheme {
        "file" => Ok(ChardevKind::File { path: rest.into(), append: false }),
        "unix" | "tcp" => {
            let mut o = Opts::parse(option, rest, Some("address"))?;
            let address = o.required("address")?;
            let address = if scheme == "unix" {
                SocketAddress::Unix { path: address.into() }
            } else {
                let (host, port) = address
                    .rsplit_once(':')
                    .ok_or_else(|| o.error(format!("expected tcp:HOST:PORT, not '{word}'")))?;
                let port =
                    port.parse().map_err(|_| o.error(format!("'{port}' is not a port number")))?;
                SocketAddress::Inet { host: host.trim_matches(['[', ']']).into(), port }
            };
            let server = o.flag("server", false)?;
            let wait = o.bool("wait")?;
            let reconnect = o.number::<u32>("reconnect", 0, 1 << 30)?;
            o.ignore(&["delay", "nodelay"]);
            o.finish()?;
            socket_kind(address, server, wait, reconnect).map_err(|e| invalid(option, e))
        }
        _ => Err(unknown()),
    }
}
