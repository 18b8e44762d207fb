//! The table of HMP commands. Each is made of QMP commands only, checked against the same schema
//! as a QMP client's, so that both languages cannot differ.

use serde_json::{Value, json};

use super::info;
use crate::cmdline::value;
use crate::command::{ClientFds, Commands, Error, ErrorClass};
use crate::params;
use crate::qmp::session::version;
use crate::schema;

/// Longest command line in bytes.
const MAX_LINE: usize = 64 << 10;

/// What a command led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Lines end in LF.
    Text(String),
    /// A migration has begun that the terminal waits for.
    Migrating,
}

/// A command's view of the world.
pub(super) struct Context<'a> {
    commands: &'a dyn Commands,
    fds: &'a ClientFds,
    /// The terminal can wait.
    interactive: bool,
}

impl Context<'_> {
    /// Runs a QMP command, its arguments checked.
    pub(super) fn qmp(&self, name: &str, arguments: Value) -> Result<Value, Error> {
        if name == "query-version" {
            return Ok(version());
        }
        let spec = schema::command(name).ok_or_else(|| Error {
            class: ErrorClass::CommandNotFound,
            desc: format!("The command {name} has not been found"),
        })?;
        spec.check(&arguments)?;
        self.commands.execute(name, arguments, self.fds)
    }

    fn done(&self, name: &str, arguments: Value) -> Result<Outcome, Failure> {
        self.qmp(name, arguments)?;
        Ok(Outcome::Text(String::new()))
    }
}

/// Why a command did nothing.
enum Failure {
    Qmp(Error),
    /// The line is wrong: told as it is, with a pointer to `help`.
    Usage(String),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Qmp(e)
    }
}

type Run = fn(&Context, &[String]) -> Result<Outcome, Failure>;

/// One HMP command.
pub struct HmpCommand {
    pub name: &'static str,
    /// A short name for it.
    pub alias: Option<&'static str>,
    /// Arguments as `help` shows them.
    pub args: &'static str,
    pub help: &'static str,
    /// Fewest and most words after the name.
    words: (usize, usize),
    run: Run,
}

const fn cmd(
    name: &'static str,
    args: &'static str,
    words: (usize, usize),
    help: &'static str,
    run: Run,
) -> HmpCommand {
    HmpCommand { name, alias: None, args, help, words, run }
}

const fn alias(mut command: HmpCommand, alias: &'static str) -> HmpCommand {
    command.alias = Some(alias);
    command
}

/// All commands, in the order of their names.
pub const HMP_COMMANDS: &[HmpCommand] = &[
    alias(cmd("cont", "", (0, 0), "resume emulation", |c, _| c.done("cont", json!({}))), "c"),
    alias(cmd("help", "[cmd]", (0, 2), "show the help", help), "?"),
    cmd(
        "info",
        "[subcommand]",
        (0, 2),
        "show various information about the system state",
        |c, w| Ok(Outcome::Text(info::run(c, w)?)),
    ),
    cmd(
        "migrate",
        "[-d] uri",
        (1, 5),
        "migrate to URI (using -d to not wait for completion)",
        migrate,
    ),
    cmd("migrate_cancel", "", (0, 0), "cancel the current VM migration", |c, _| {
        c.done("migrate_cancel", json!({}))
    }),
    cmd(
        "migrate_incoming",
        "uri",
        (1, 1),
        "Continue an incoming migration from an -incoming defer",
        |c, w| c.done("migrate-incoming", json!({ "uri": w[0] })),
    ),
    cmd(
        "migrate_set_capability",
        "capability state",
        (2, 2),
        "Enable/Disable the usage of a capability for migration",
        |c, w| {
            let state = switch(&w[1])?;
            let list = json!([{ "capability": w[0], "state": state }]);
            c.done("migrate-set-capabilities", json!({ "capabilities": list }))
        },
    ),
    cmd(
        "migrate_set_downtime",
        "seconds",
        (1, 1),
        "set maximum tolerated downtime (old name; see migrate_set_parameter)",
        |c, w| {
            let seconds: f64 = w[0].parse().unwrap_or(f64::NAN);
            if !(0.0..=2000.0).contains(&seconds) {
                return Err(Failure::Usage("Parameter 'value' expects a number of seconds".into()));
            }
            let ms = (seconds * 1000.0) as u64;
            c.done("migrate-set-parameters", json!({ "downtime-limit": ms }))
        },
    ),
    cmd(
        "migrate_set_parameter",
        "parameter value",
        (2, 2),
        "Set the parameter for migration",
        set_parameter,
    ),
    cmd(
        "migrate_set_speed",
        "value",
        (1, 1),
        "set maximum speed in bytes, unit MiB (old name; see migrate_set_parameter)",
        |c, w| c.done("migrate-set-parameters", json!({ "max-bandwidth": megabytes(&w[0])? })),
    ),
    alias(cmd("quit", "", (0, 0), "quit the emulator", |c, _| c.done("quit", json!({}))), "q"),
    cmd(
        "set_link",
        "name on|off",
        (2, 2),
        "change the link status of a network adapter",
        |c, w| c.done("set_link", json!({ "name": w[0], "up": switch(&w[1])? })),
    ),
    alias(cmd("stop", "", (0, 0), "stop emulation", |c, _| c.done("stop", json!({}))), "s"),
    cmd("system_powerdown", "", (0, 0), "send system power down event", |c, _| {
        c.done("system_powerdown", json!({}))
    }),
    cmd("system_reset", "", (0, 0), "reset the system", |c, _| c.done("system_reset", json!({}))),
];

/// Runs one line as `human-monitor-command` does: nobody waits, lines end in CR LF.
pub fn execute(line: &str, commands: &dyn Commands, fds: &ClientFds) -> String {
    match run(line, commands, fds, false) {
        Outcome::Text(text) => text.replace('\n', "\r\n"),
        Outcome::Migrating => String::new(),
    }
}

/// Runs one line. `interactive`: a `migrate` without `-d` may be waited for.
pub(super) fn run(
    line: &str,
    commands: &dyn Commands,
    fds: &ClientFds,
    interactive: bool,
) -> Outcome {
    let words = match split(line) {
        Ok(words) => words,
        Err(message) => return Outcome::Text(message),
    };
    let Some((name, rest)) = words.split_first() else { return Outcome::Text(String::new()) };
    let Some(command) = find(name) else {
        return Outcome::Text(format!("unknown command: '{name}'\n"));
    };
    let again = format!("Try \"help {}\" for more information\n", command.name);
    if rest.len() < command.words.0 {
        return Outcome::Text(format!("{}: string expected\n{again}", command.names()));
    }
    if rest.len() > command.words.1 {
        return Outcome::Text(format!(
            "{}: extraneous characters at the end of line\n{again}",
            command.names()
        ));
    }
    let context = Context { commands, fds, interactive };
    (command.run)(&context, rest).unwrap_or_else(|failure| {
        Outcome::Text(match failure {
            Failure::Qmp(e) => format!("Error: {}\n", e.desc),
            Failure::Usage(text) => format!("{text}\n{again}"),
        })
    })
}

impl HmpCommand {
    /// "stop|s".
    fn names(&self) -> String {
        self.alias.map_or(self.name.to_string(), |a| format!("{}|{a}", self.name))
    }
}

fn find(name: &str) -> Option<&'static HmpCommand> {
    HMP_COMMANDS.iter().find(|c| c.name == name || c.alias == Some(name))
}

/// Words between blanks; double quotes hold blanks, with C's escapes for quote and backslash.
fn split(line: &str) -> Result<Vec<String>, String> {
    if line.len() > MAX_LINE {
        return Err("the command line is too long\n".into());
    }
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_whitespace() {
            continue;
        }
        let mut word = String::new();
        if c != '"' {
            word.push(c);
            while let Some(c) = chars.next_if(|c| !c.is_whitespace()) {
                word.push(c);
            }
            words.push(word);
            continue;
        }
        loop {
            match chars.next() {
                Some('"') => break,
                Some('\\') => match chars.next() {
                    Some('n') => word.push('\n'),
                    Some('r') => word.push('\r'),
                    Some(c @ ('\\' | '\'' | '"')) => word.push(c),
                    Some(c) => return Err(format!("unsupported escape code: '\\{c}'\n")),
                    None => return Err("unterminated string\n".into()),
                },
                Some(c) => word.push(c),
                None => return Err("unterminated string\n".into()),
            }
        }
        words.push(word);
    }
    Ok(words)
}

fn help(_: &Context, words: &[String]) -> Result<Outcome, Failure> {
    let line = |c: &HmpCommand| {
        format!("{} -- {}\n", [&c.names()[..], c.args].join(" ").trim_end(), c.help)
    };
    let text = match words.first() {
        None => HMP_COMMANDS.iter().map(line).collect(),
        Some(name) if name == "info" => info::help(),
        Some(name) => find(name).map_or(format!("unknown command: '{name}'\n"), line),
    };
    Ok(Outcome::Text(text))
}

fn migrate(c: &Context, words: &[String]) -> Result<Outcome, Failure> {
    let mut detach = false;
    let mut uri = None;
    for word in words {
        match word.as_str() {
            "-d" if !detach => detach = true,
            "-b" | "-i" => {
                return Err(
                    Error::generic("disks cannot be copied with -b and -i; share them").into()
                );
            }
            "-r" => return Err(Error::generic("a migration cannot be resumed").into()),
            _ if uri.is_none() && !word.starts_with('-') => uri = Some(word),
            other => {
                return Err(Failure::Usage(format!("migrate: unsupported option {other}")));
            }
        }
    }
    let uri = uri.ok_or_else(|| Failure::Usage("migrate: string expected".into()))?;
    c.qmp("migrate", json!({ "uri": uri }))?;
    if detach {
        return Ok(Outcome::Text(String::new()));
    }
    if c.interactive {
        return Ok(Outcome::Migrating);
    }
    Ok(Outcome::Text("terminal does not allow synchronous migration, continuing detached\n".into()))
}

/// The progress line of a migration that is waited for, and whether it is over.
pub(super) fn migrate_progress(commands: &dyn Commands, fds: &ClientFds) -> (String, bool) {
    let context = Context { commands, fds, interactive: true };
    let reply = match context.qmp("query-migrate", json!({})) {
        Ok(reply) => reply,
        Err(e) => return (format!("\nError: {}\n", e.desc), true),
    };
    match reply["status"].as_str().unwrap_or("none") {
        "completed" => ("Completed 100 %\n".into(), true),
        status @ ("none" | "cancelled" | "failed") => {
            let text = reply["error-desc"].as_str().unwrap_or(status);
            (format!("\nError: {text}\n"), true)
        }
        _ => {
            let ram = |key: &str| reply["ram"][key].as_u64();
            let (total, left) = (ram("total").unwrap_or(0), ram("remaining").unwrap_or(0));
            let percent = match total {
                0 => 0,
                _ => u128::from(total.saturating_sub(left)) * 100 / u128::from(total),
            };
            (format!("Completed {percent} %\r"), false)
        }
    }
}

fn set_parameter(c: &Context, words: &[String]) -> Result<Outcome, Failure> {
    let (name, text) = (&words[0], &words[1]);
    let unknown = || Error::generic(format!("invalid parameter value: {name}"));
    let arg = params::ARGUMENTS.iter().find(|a| a.name == name).ok_or_else(unknown)?;
    let value = match arg.ty {
        schema::Type::Bool => json!(switch(text)?),
        schema::Type::Int if name == "max-bandwidth" => json!(megabytes(text)?),
        schema::Type::Int if name == "downtime-limit" => {
            let ms = value::number(text).map_err(|_| {
                Error::generic(format!(
                    "Parameter '{name}': expected a number of milliseconds such as 300, not '{text}'"
                ))
            })?;
            json!(ms)
        }
        schema::Type::Int => json!(
            value::size(text, 1)
                .map_err(|e| { Error::generic(format!("Parameter '{name}': {e}")) })?
        ),
        _ => json!(text),
    };
    c.done("migrate-set-parameters", json!({ name.as_str(): value }))
}

/// A size that counts MiB when it has no unit, in bytes.
fn megabytes(text: &str) -> Result<u64, Error> {
    value::size(text, 1 << 20).map_err(|e| Error::generic(format!("Parameter 'value': {e}")))
}

fn switch(text: &str) -> Result<bool, Failure> {
    value::switch(text).map_err(|_| Failure::Usage("Expected 'on' or 'off'".into()))
}

/// Completes the last word of `text`: the word so far, and what it can become.
pub(super) fn complete(text: &str) -> (String, Vec<String>) {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let last = if text.ends_with(char::is_whitespace) || words.is_empty() {
        ""
    } else {
        words.pop().unwrap_or_default()
    };
    let known: Vec<&str> = match &words[..] {
        [] => HMP_COMMANDS.iter().map(|c| c.name).collect(),
        ["help" | "?"] => HMP_COMMANDS.iter().map(|c| c.name).collect(),
        ["info"] | ["help" | "?", "info"] => info::INFOS.iter().map(|i| i.name).collect(),
        ["migrate_set_capability"] => params::CAPABILITY_NAMES.to_vec(),
        ["migrate_set_parameter"] => params::ARGUMENTS.iter().map(|a| a.name).collect(),
        ["migrate_set_capability" | "set_link", _] => vec!["on", "off"],
        ["migrate"] => vec!["-d", "tcp:", "unix:"],
        _ => Vec::new(),
    };
    let fitting = known.into_iter().filter(|k| k.starts_with(last)).map(str::to_string).collect();
    (last.to_string(), fitting)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers with what QEMU 7.2 replied (shortened), and nothing else.
    struct Recorded;
    impl Commands for Recorded {
        fn execute(&self, name: &str, _: Value, _: &ClientFds) -> Result<Value, Error> {
            Ok(match name {
                "query-migrate" => json!({
                    "status": "completed", "setup-time": 4, "downtime": 46, "total-time": 435,
                    "ram": {
                        "total": 537927680, "postcopy-requests": 0, "dirty-sync-count": 3,
                        "multifd-bytes": 0, "pages-per-second": 103801, "downtime-bytes": 7684070,
                        "page-size": 4096, "remaining": 0, "postcopy-bytes": 0,
                        "mbps": 1922.5161392111368, "transferred": 103234586,
                        "precopy-bytes": 95550516, "duplicate": 106509, "dirty-pages-rate": 0,
                        "skipped": 0, "normal-bytes": 102076416, "normal": 24921
                    },
                    "downtime-phases": {"quiesce": 1.5, "device": 2},
                    "rounds": [{"at-us": 5, "stopped": false}, {"at-us": 9, "stopped": true}]
                }),
                "query-block" => json!([{
                    "device": "virtio0", "qdev": "/machine/peripheral-anon/device[0]/virtio-backend",
                    "inserted": {
                        "node-name": "#block188", "file": "/o.img", "drv": "raw", "ro": false,
                        "cache": {"writeback": true, "direct": false, "no-flush": false}
                    }
                }]),
                "query-status" => json!({"running": false, "status": "prelaunch"}),
                "query-name" => json!({}),
                "x-query-network" => json!([{
                    "name": "net0", "type": "nic", "info": "model=virtio-net-pci",
                    "peer": {"name": "hostnet0", "type": "tap", "info": "ifname=t0"}
                }]),
                "query-pci" => json!([{"bus": 0, "devices": [{
                    "bus": 0, "slot": 1, "function": 0, "class_info": {"class": 512,
                        "desc": "Ethernet controller"},
                    "id": {"vendor": 0x1af4, "device": 0x1000, "subsystem": 1,
                        "subsystem-vendor": 0x1af4},
                    "irq": 0, "irq_pin": 1, "qdev_id": "", "regions": [
                        {"bar": 0, "type": "io", "address": 0xc000, "size": 32},
                        {"bar": 4, "type": "memory", "address": 0xfe00_0000u64, "size": 16384,
                            "prefetch": true, "mem_type_64": true}]
                }]}]),
                _ => json!({}),
            })
        }
    }

    fn hmp(line: &str) -> String {
        execute(line, &Recorded, &ClientFds::default()).replace("\r\n", "\n")
    }

    #[test]
    fn the_texts_are_qemus() {
        let expected = "Migration status: completed\ntotal time: 435 ms\ndowntime: 46 ms\n\
            setup: 4 ms\ntransferred ram: 100815 kbytes\nthroughput: 1922.52 mbps\n\
            remaining ram: 0 kbytes\ntotal ram: 525320 kbytes\nduplicate: 106509 pages\n\
            skipped: 0 pages\nnormal: 24921 pages\nnormal bytes: 99684 kbytes\n\
            dirty sync count: 3\npage size: 4 kbytes\nmultifd bytes: 0 kbytes\n\
            pages-per-second: 103801\nprecopy ram: 93311 kbytes\ndowntime ram: 7503 kbytes\n\
            downtime phases:\n  quiesce: 1.5\n  device: 2\n\
            rounds:\n  at us 5, stopped false\n  at us 9, stopped true\n";
        assert_eq!(hmp("info migrate"), expected);
        assert_eq!(
            hmp("info block"),
            "virtio0 (#block188): /o.img (raw)\n    \
             Attached to:      /machine/peripheral-anon/device[0]/virtio-backend\n    \
             Cache mode:       writeback\n"
        );
        assert_eq!(hmp("info block #block188"), hmp("info block"));
        assert_eq!(hmp("info block d9"), "Device 'd9' not found\n");
        assert_eq!(hmp("info status"), "VM status: paused (prelaunch)\n");
        assert_eq!(hmp("info name"), "");
        assert_eq!(
            hmp("info network"),
            "net0: index=0,type=nic,model=virtio-net-pci\n \\ hostnet0: index=0,type=tap,ifname=t0\n"
        );
        assert_eq!(
            hmp("info pci"),
            "  Bus  0, device   1, function 0:\n    Ethernet controller: PCI device 1af4:1000\n      \
             PCI subsystem 1af4:0001\n      IRQ 0, pin A\n      BAR0: I/O at 0xc000 [0xc01f].\n      \
             BAR4: 64 bit prefetchable memory at 0xfe000000 [0xfe003fff].\n      id \"\"\n"
        );
    }

    #[test]
    fn wrong_lines_are_told_in_qemus_words() {
        for (line, expected) in [
            ("nope", "unknown command: 'nope'\n"),
            (
                "migrate_set_parameter downtime-limit abc",
                "Error: Parameter 'downtime-limit': expected a number of milliseconds such as 300, \
                 not 'abc'\n",
            ),
            ("info nope", "unknown command: 'info nope'\n"),
            (
                "info status x",
                "info status: extraneous characters at the end of line\n\
                 Try \"help info\" for more information\n",
            ),
            ("migrate", "migrate: string expected\nTry \"help migrate\" for more information\n"),
            (
                "stop now",
                "stop|s: extraneous characters at the end of line\n\
                 Try \"help stop\" for more information\n",
            ),
            (
                "set_link a b",
                "Expected 'on' or 'off'\nTry \"help set_link\" for more information\n",
            ),
            ("migrate_set_parameter foo 1", "Error: invalid parameter value: foo\n"),
            ("migrate \"x", "unterminated string\n"),
            (
                "migrate -q x",
                "migrate: unsupported option -q\nTry \"help migrate\" for more information\n",
            ),
            ("", ""),
            ("s", ""),
        ] {
            assert_eq!(hmp(line), expected, "{line}");
        }
        assert!(hmp("help").contains("quit|q -- quit the emulator"));
    }

    #[test]
    fn the_table_is_in_order_and_words_are_completed() {
        assert!(HMP_COMMANDS.windows(2).all(|w| w[0].name < w[1].name));
        assert_eq!(complete("info migrate_p").1, ["migrate_parameters"]);
        assert_eq!(complete("migrate_set_parameter down").1, ["downtime-limit"]);
        assert_eq!(complete("sys").1, ["system_powerdown", "system_reset"]);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC{0,60}") {
            hmp(&line);
            complete(&line);
        }
    }
}
