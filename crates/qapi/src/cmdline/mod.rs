//! QEMU's command line, parsed into a [`spec::Machine`].
//!
//! - `options`: the table of all options and what becomes of each.
//! - `keys`: tables of keys; `keyval`, `value`, `suggest`: the grammar of option values.
//! - `machine`, `object`, `block`, `net`, `device`, `chardev`, `process`: one option family each.
//! - `finish`: default devices and checks across options, when all are read.
//!
//! Invariants: every word is either understood, taken with a warning line because it changes
//! nothing here, or refused by name. Nothing is dropped silently.

pub mod block;
pub mod chardev;
pub mod device;
mod finish;
pub mod keys;
pub mod keyval;
mod machine;
pub mod net;
pub mod object;
pub mod options;
mod process;
mod suggest;
pub mod value;

use std::collections::HashMap;
use std::path::PathBuf;

use keys::{Family, Schema};
use keyval::Opts;
use spec::Machine;

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Run this machine.
    Machine(Box<Machine>),
    /// Print this text and exit with status 0 (`-help`, `-version`, `-machine help`, ...).
    Print(String),
    /// Print the CPU models and features that there are (`-cpu help`) and exit with status 0.
    CpuHelp,
}

/// A command line that is refused; the text names the option and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// No such option.
    #[error("{option}: unknown option{hint}")]
    UnknownOption { option: String, hint: String },
    /// A word that belongs to no option.
    #[error(
        "'{word}' is not an option; a disk is given as -drive file={word},if=virtio,format=raw"
    )]
    StrayWord { word: String },
    /// The option needs a value and is the last word.
    #[error("{option}: requires an argument")]
    MissingValue { option: String },
    /// The option's value is refused.
    #[error("{option}: {message}")]
    Invalid { option: String, message: String },
}

/// Why an option's code stopped the parser.
enum Stop {
    Error(CmdlineError),
    /// `... help`: print this instead of running.
    Print(String),
    CpuHelp,
}

impl From<CmdlineError> for Stop {
    fn from(e: CmdlineError) -> Self {
        Self::Error(e)
    }
}

type Taken = Result<(), Stop>;

/// Parses the arguments after the program's name. A short second form of each option with two
/// dashes is taken too, as in QEMU. Reads no file but the first bytes of an image whose format is
/// not given.
pub fn parse(args: &[String]) -> Result<Parsed, CmdlineError> {
    let mut builder = Builder::default();
    match builder.read(args).and_then(|()| builder.finish()) {
        Ok(()) => Ok(Parsed::Machine(Box::new(builder.machine))),
        Err(Stop::Print(text)) => Ok(Parsed::Print(text)),
        Err(Stop::CpuHelp) => Ok(Parsed::CpuHelp),
        Err(Stop::Error(e)) => Err(e),
    }
}

/// What has been read so far, and what is needed only until the end.
#[derive(Default)]
struct Builder {
    machine: Machine,
    no_defaults: bool,
    nographic: bool,
    /// `-display none` was given.
    headless: bool,
    /// Accelerators named, in order.
    accels: Vec<String>,
    memory_given: bool,
    /// `-serial` words, in order.
    serials: Vec<String>,
    /// `-monitor`, `-qmp` and `-qmp-pretty` words: option, word.
    monitor_words: Vec<(String, String)>,
    /// A monitor was asked for (or off) by any option.
    monitor_given: bool,
    /// rng objects: id and file.
    rngs: HashMap<String, PathBuf>,
    drives: Vec<block::Drive>,
    /// Devices whose references are checked at the end, with the option text for messages.
    parsed_devices: Vec<device::Pending>,
    nics: Vec<(spec::NetBackend, device::Pending)>,
    object_ids: Vec<String>,
    node_counter: u32,
    stdio_option: Option<String>,
}

impl Builder {
    fn read(&mut self, args: &[String]) -> Taken {
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix('-').filter(|n| !n.is_empty()) else {
                return Err(CmdlineError::StrayWord { word: word.clone() }.into());
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            let option = options::find(name).ok_or_else(|| {
                let names = options::OPTIONS.iter().map(|o| o.name);
                CmdlineError::UnknownOption {
                    option: word.clone(),
                    hint: suggest::hint(name, names, "-"),
                }
            })?;
            let argument = match option.argument {
                None => "",
                Some(_) => words
                    .next()
                    .ok_or_else(|| CmdlineError::MissingValue { option: word.clone() })?,
            };
            self.take(option, word, argument)?;
        }
        Ok(())
    }

    fn take(&mut self, option: &options::OptionSpec, word: &str, argument: &str) -> Taken {
        match option.action {
            options::Action::Run(run) => {
                run(self, word, argument)?;
                self.note(word, argument);
                Ok(())
            }
            options::Action::Nothing => Ok(()),
            options::Action::Warn(why) => {
                self.warn(format!("{word} is ignored: {why}"));
                Ok(())
            }
            options::Action::Refuse(why) => Err(invalid(word, why)),
        }
    }

    /// Gives what an option has made that option's text, for messages.
    fn note(&mut self, word: &str, argument: &str) {
        let written = shown(word, argument);
        let devices = self.parsed_devices.iter_mut().map(|d| &mut d.device.written);
        let nics = self.nics.iter_mut().flat_map(|(n, d)| [&mut n.written, &mut d.device.written]);
        let netdevs = self.machine.netdevs.iter_mut().map(|n| &mut n.written);
        let chardevs = self.machine.chardevs.iter_mut().map(|c| &mut c.written);
        let drives = self.drives.iter_mut().map(|d| &mut d.written);
        let all = devices.chain(nics).chain(netdevs).chain(chardevs).chain(drives);
        for made in all.filter(|made| made.is_empty()) {
            made.clone_from(&written);
        }
    }

    /// Parses an option that has one table of keys.
    fn opts(&mut self, option: &str, text: &str, schema: &'static Schema) -> Result<Opts, Stop> {
        let mut o = Opts::parse(option, text, schema.implied)?;
        self.adopt(&mut o, schema)?;
        Ok(o)
    }

    /// Parses an option whose first word chooses a driver; returns that driver's table too.
    fn member(
        &mut self,
        option: &str,
        text: &str,
        family: &Family,
    ) -> Result<(Opts, &'static Schema), Stop> {
        let mut o = Opts::parse(option, text, Some(family.key))?;
        let schema = self.pick(&mut o, family)?;
        Ok((o, schema))
    }

    /// The driver that `o` chooses.
    fn pick(&mut self, o: &mut Opts, family: &Family) -> Result<&'static Schema, Stop> {
        let name = o.required(family.key)?;
        self.choose(o, family, &name, &[])
    }

    /// The driver called `name`; `more` are names that are known otherwise.
    fn choose(
        &mut self,
        o: &mut Opts,
        family: &Family,
        name: &str,
        more: &[&'static str],
    ) -> Result<&'static Schema, Stop> {
        if matches!(name, "help" | "?") {
            return Err(Stop::Print(family.help(o.option())));
        }
        let schema = family.find(o.option(), name, more)?;
        self.adopt(o, schema)?;
        Ok(schema)
    }

    fn adopt(&mut self, o: &mut Opts, schema: &'static Schema) -> Taken {
        for line in o.adopt(schema)? {
            self.warn(line);
        }
        Ok(())
    }

    /// One warning line; the same line is not repeated.
    fn warn(&mut self, line: String) {
        if !self.machine.warnings.contains(&line) {
            self.machine.warnings.push(line);
        }
    }
}

/// An option with its argument, cut off where that is endless.
fn shown(option: &str, argument: &str) -> String {
    const MOST: usize = 200;
    match argument.char_indices().nth(MOST) {
        Some((end, _)) => format!("{option} {}...", &argument[..end]),
        None => format!("{option} {argument}"),
    }
}

fn invalid(option: &str, message: impl Into<String>) -> Stop {
    Stop::Error(CmdlineError::Invalid { option: option.into(), message: message.into() })
}
