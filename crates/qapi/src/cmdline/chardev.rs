//! `-chardev`, `-serial`, `-monitor`, `-mon`, `-qmp`: character back ends and who uses them.

use spec::{Chardev, ChardevKind, Monitor, MonitorMode, SocketAddress};

use super::keys::Kind::{Fds, Id, Number, OneOf, Switch, Text};
use super::keys::{Family, Key, Member, Schema, fixed, key};
use super::keyval::Opts;
use super::suggest::hint;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken, invalid};

/// `-chardev`.
pub const BACKENDS: Family = Family {
    key: "backend",
    what: "chardev type",
    heading: "Available chardev backend types:",
    members: &[
        Member { schema: &NULL, aliases: &[], about: "nothing" },
        Member { schema: &STDIO, aliases: &[], about: "the process's terminal" },
        Member { schema: &PTY, aliases: &[], about: "pseudo-terminal" },
        Member { schema: &FILE, aliases: &[], about: "file that output goes to" },
        Member { schema: &SOCKET, aliases: &[], about: "TCP or Unix socket" },
    ],
    absent: &[],
    instead: "",
};

const EVERY: &[Key] = &[
    key("id", Id, "", "Name of the back end; must be given"),
    key("mux", Switch, "off", "Several front ends share it; C-a c goes from one to the next"),
    key("logfile", Text, "", "File that all output is written to as well"),
    key("logappend", Switch, "off", "Write on at the end of that file"),
];

const NULL: Schema = Schema { name: "null", implied: None, keys: &[EVERY] };

const STDIO: Schema = Schema {
    name: "stdio",
    implied: None,
    keys: &[EVERY, &[key("signal", Switch, "on", "C-c and the like end the process")]],
};

const PTY: Schema = Schema { name: "pty", implied: None, keys: &[EVERY] };

const FILE: Schema = Schema {
    name: "file",
    implied: None,
    keys: &[
        EVERY,
        &[
            key("path", Text, "", "The file; must be given"),
            key("append", Switch, "off", "Write on at its end"),
        ],
    ],
};

const SOCKET: Schema = Schema {
    name: "socket",
    implied: None,
    keys: &[
        EVERY,
        CONNECTION,
        &[
            key("path", Text, "", "Path of a Unix socket"),
            key("host", Text, "", "Host name or address of TCP; by default any"),
            key("port", Number(0, 65535), "", "Port of TCP"),
            key("fd", Fds, "", "Inherited socket"),
            fixed("telnet", "off", "Telnet's protocol"),
            fixed("tn3270", "off", "TN3270's protocol"),
            fixed("websocket", "off", "WebSocket's protocol"),
            fixed("abstract", "off", "Abstract Unix socket"),
            key("tight", Switch, "on", "Length of an abstract name").quiet(),
            key("ipv4", Switch, "", "Use IPv4").quiet(),
            key("ipv6", Switch, "", "Use IPv6").quiet(),
        ],
    ],
};

/// A socket's keys in both forms.
const CONNECTION: &[Key] = &[
    key("server", Switch, "off", "Listen instead of connecting"),
    key("wait", Switch, "on", "As a server, do not start before a client is there"),
    key(
        "reconnect",
        Number(0, 1 << 30),
        "0",
        "As a client, seconds until it connects again; 0 is never",
    ),
    key("nodelay", Switch, "", "Send at once").quiet(),
    key("delay", Switch, "", "Wait for more to send").quiet(),
];

/// `unix:` and `tcp:` of `-serial`, `-monitor` and `-qmp`.
const SHORT: Schema =
    Schema::of(Some("address"), &[CONNECTION, &[key("address", Text, "", "Where")]]);

const MON: Schema = Schema::of(
    Some("chardev"),
    &[&[
        key("chardev", Text, "", "id of the -chardev; must be given"),
        key("mode", OneOf(&["readline", "control"]), "readline", "HMP for people, or QMP"),
        key("pretty", Switch, "off", "QMP's replies are indented over several lines"),
        key("id", Id, "", "Name of the monitor"),
    ]],
);

impl Builder {
    pub(super) fn chardev(&mut self, option: &str, text: &str) -> Taken {
        let (mut o, schema) = self.member(option, text, &BACKENDS)?;
        let id = o.required("id")?;
        if self.machine.chardevs.iter().any(|c| c.id == id) {
            return Err(o.error(format!("chardev '{id}' was given before")).into());
        }
        let kind = match schema.name {
            "stdio" => ChardevKind::Stdio { signal: o.flag("signal")? },
            "pty" => ChardevKind::Pty,
            "file" => {
                ChardevKind::File { path: o.required("path")?.into(), append: o.flag("append")? }
            }
            "socket" => socket(&mut o)?,
            _ => ChardevKind::Null,
        };
        let mux = o.flag("mux")?;
        let logfile = o.str("logfile").map(Into::into);
        let log_append = o.flag("logappend")?;
        o.finish()?;
        self.add_chardev(
            option,
            Chardev { id, kind, mux, logfile, log_append, written: String::new() },
        )
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
        let kind = self.short(option, word)?;
        let kind = match kind {
            // With a monitor beside it, Ctrl-C goes to the guest.
            ChardevKind::Stdio { .. } if mux => ChardevKind::Stdio { signal: false },
            kind => kind,
        };
        let (id, written) = (label.into(), super::shown(option, word));
        let (logfile, log_append) = (None, false);
        self.add_chardev(option, Chardev { id, kind, mux, logfile, log_append, written })?;
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
        let mut o = self.opts(option, text, &MON)?;
        self.monitor_given = true;
        let chardev = o.required("chardev")?;
        let mode = match o.or_default("mode").as_str() {
            "control" => MonitorMode::Control,
            _ => MonitorMode::Readline,
        };
        let pretty = o.flag("pretty")?;
        o.str("id");
        o.finish()?;
        self.add_monitor(chardev, mode, pretty);
        Ok(())
    }

    /// The short forms: `stdio`, `pty`, `file:PATH`, `unix:PATH,server=on`, `tcp:HOST:PORT,...`.
    fn short(&mut self, option: &str, word: &str) -> Result<ChardevKind, Stop> {
        let known =
            ["none", "null", "stdio", "pty", "mon:stdio", "file:", "unix:", "tcp:", "chardev:"];
        let unknown = || {
            let near = hint(word, known.into_iter(), "");
            invalid(option, format!("'{word}' is not supported{near} (use {})", known.join(", ")))
        };
        match word {
            "null" => return Ok(ChardevKind::Null),
            "stdio" => return Ok(ChardevKind::Stdio { signal: true }),
            "pty" => return Ok(ChardevKind::Pty),
            "help" | "?" => {
                return Err(Stop::Print(format!(
                    "{option} takes one of: {}\n{}",
                    known.join(", "),
                    SHORT.help("unix:PATH and tcp:HOST:PORT")
                )));
            }
            _ => {}
        }
        let (scheme, rest) = word.split_once(':').ok_or_else(unknown)?;
        match scheme {
            "file" if rest.is_empty() => Err(invalid(option, "file: the path is missing")),
            "file" => Ok(ChardevKind::File { path: rest.into(), append: false }),
            "unix" | "tcp" => {
                let mut o = self.opts(option, rest, &SHORT)?;
                let address = short_address(&mut o, scheme, word)?;
                let kind = socket_kind(&mut o, address)?;
                o.finish()?;
                Ok(kind)
            }
            _ => Err(unknown()),
        }
    }
}

fn short_address(o: &mut Opts, scheme: &str, word: &str) -> Result<SocketAddress, CmdlineError> {
    let address = o.str("address").unwrap_or_default();
    if scheme == "unix" {
        return match address.is_empty() {
            true => Err(o.error(format!("'{word}': the socket's path is missing"))),
            false => Ok(SocketAddress::Unix { path: address.into() }),
        };
    }
    let (host, port) = address
        .rsplit_once(':')
        .ok_or_else(|| o.error(format!("expected tcp:HOST:PORT, not '{word}'")))?;
    let port = port.parse().map_err(|_| o.error(format!("'{port}' is not a port number")))?;
    Ok(SocketAddress::Inet { host: host.trim_matches(['[', ']']).into(), port })
}

fn socket(o: &mut Opts) -> Result<ChardevKind, CmdlineError> {
    let (path, port, fd) = (o.str("path"), o.number_if("port")?, o.with("fd", value::fds)?);
    let host = o.str("host");
    let address = match (path, port, fd) {
        (Some(path), None, None) => SocketAddress::Unix { path: path.into() },
        (None, Some(port), None) => SocketAddress::Inet { host: host.unwrap_or_default(), port },
        (None, None, Some(fds)) if fds.len() == 1 => SocketAddress::Fd { fd: fds[0] },
        _ => return Err(o.error("give one of 'path', 'host' with 'port', or 'fd'")),
    };
    socket_kind(o, address)
}

/// Reads [`CONNECTION`].
fn socket_kind(o: &mut Opts, address: SocketAddress) -> Result<ChardevKind, CmdlineError> {
    let server = o.flag("server")?;
    let wait = o.bool("wait")?;
    let reconnect: u32 = o.number("reconnect")?;
    if !server && wait == Some(true) {
        return Err(o.error("'wait' option is incompatible with socket in client connect mode"));
    }
    if server && reconnect > 0 {
        return Err(o.error("'reconnect' option is incompatible with socket in server listen mode"));
    }
    Ok(ChardevKind::Socket { address, server, wait: server && wait.unwrap_or(true), reconnect })
}
