//! Tables of keys: what an option takes, as data. The parser goes by them (which keys there are,
//! what their values may be, what holds when they are absent), and `help` prints them, so that
//! neither can say anything else than the other.
//!
//! - [`Key`], [`Schema`]: the keys of one option, or of one driver of it.
//! - [`Family`]: an option whose first word chooses among drivers (`-device`, `-netdev`, ...).

use super::CmdlineError;
use super::suggest::hint;
use super::value;

/// What the value of a key is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Text,
    /// A letter, then letters, digits, `-`, `.` and `_`.
    Id,
    /// `on|off`.
    Switch,
    /// `on|off|auto`.
    SwitchOrAuto,
    /// From the first to the second.
    Number(u64, u64),
    /// A power of two from the first to the second.
    PowerOfTwo(u64, u64),
    /// A number that may be negative.
    Signed,
    /// Bytes; without a suffix in units of this many.
    Size(u64),
    OneOf(&'static [&'static str]),
    Mac,
    PciAddr,
    /// Numbers of inherited file descriptors, joined by colons.
    Fds,
    /// The name of a block node, or the keys of one below this key (`file.driver=...`).
    Node,
    /// May be given several times; in JSON a list.
    List,
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy)]
pub enum Fate {
    /// The option's code takes it.
    Taken,
    /// Only these values are supported, because of this.
    Only(&'static [&'static str], &'static str),
    /// What it asks for changes nothing that anybody could see.
    Quiet,
    /// Changes nothing here, because of this: a warning, unless the default is asked for.
    Ignored(&'static str),
    /// Known, and refused because of this; not shown by `help`.
    Refused(&'static str),
}

/// A key of an option.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    /// What holds when the key is absent; "" when `about` says it or nothing does.
    pub default: &'static str,
    pub about: &'static str,
    pub fate: Fate,
}

pub const fn key(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    about: &'static str,
) -> Key {
    Key { name, kind, default, about, fate: Fate::Taken }
}

/// A switch of which one position is supported: its default.
pub const fn fixed(name: &'static str, default: &'static str, about: &'static str) -> Key {
    let (on, off) = (&["on"], &["off"]);
    let only = if default.len() == 2 { on } else { off };
    key(name, Kind::Switch, default, about).only(only, "the other is not available")
}

pub const fn refused(name: &'static str, why: &'static str) -> Key {
    Key { name, kind: Kind::Text, default: "", about: "", fate: Fate::Refused(why) }
}

impl Key {
    pub const fn only(self, values: &'static [&'static str], why: &'static str) -> Self {
        Self { fate: Fate::Only(values, why), ..self }
    }

    pub const fn ignored(self, why: &'static str) -> Self {
        Self { fate: Fate::Ignored(why), ..self }
    }

    pub const fn quiet(self) -> Self {
        Self { fate: Fate::Quiet, ..self }
    }

    /// Whether `given`, a key as it was written, is this one or below it.
    pub(super) fn is(&self, given: &str) -> bool {
        let below = matches!(self.kind, Kind::Node | Kind::List);
        match given.strip_prefix(self.name) {
            Some("") => true,
            Some(rest) => below && rest.starts_with('.'),
            None => false,
        }
    }

    /// A line of `help`, in QEMU's form.
    fn help(&self) -> Option<String> {
        let mut about = self.about.to_string();
        match self.fate {
            Fate::Refused(_) => return None,
            Fate::Only(values, _) => about += &format!("; only {}", values.join(" or ")),
            Fate::Quiet => about += "; changes nothing here",
            Fate::Ignored(why) => about += &format!("; ignored: {why}"),
            Fate::Taken => {}
        }
        about += &self.kind.range();
        if !self.default.is_empty() {
            about += &format!(" (default: {})", self.default);
        }
        let left = format!("{}=<{}>", self.name, self.kind.word());
        Some(format!("  {left:<25} - {about}\n"))
    }
}

impl Kind {
    /// The type's name in `help`.
    fn word(&self) -> String {
        match self {
            Self::Text | Self::Id => "str".into(),
            Self::Switch => "bool".into(),
            Self::SwitchOrAuto => "OnOffAuto".into(),
            Self::Number(_, max) | Self::PowerOfTwo(_, max) => match max {
                0..=0xff => "uint8".into(),
                0x100..=0xffff => "uint16".into(),
                0x1_0000..=0xffff_ffff => "uint32".into(),
                _ => "uint64".into(),
            },
            Self::Signed => "int32".into(),
            Self::Size(_) => "size".into(),
            Self::OneOf(words) => words.join("|"),
            Self::Mac => "mac".into(),
            Self::PciAddr => "slot[.function]".into(),
            Self::Fds => "fd[:fd...]".into(),
            Self::Node => "node".into(),
            Self::List => "list".into(),
        }
    }

    /// The values that the type's name does not tell.
    fn range(&self) -> String {
        match self {
            Self::Number(0, 0xff | 0xffff | 0xffff_ffff | u64::MAX) => String::new(),
            Self::Number(min, max) => format!(", {min} to {max}"),
            Self::PowerOfTwo(min, max) => format!(", a power of two from {min} to {max}"),
            Self::Size(1024) => ", in KiB without a suffix".into(),
            Self::Size(0x10_0000) => ", in MiB without a suffix".into(),
            _ => String::new(),
        }
    }

    /// Whether `text` is such a value; the error says what was expected.
    pub(super) fn check(&self, text: &str) -> Result<(), String> {
        match *self {
            Self::Text | Self::Node | Self::List => Ok(()),
            Self::Id => value::id(text),
            Self::Switch => value::switch(text).map(drop),
            Self::SwitchOrAuto if text == "auto" => Ok(()),
            Self::SwitchOrAuto => value::switch(text)
                .map(drop)
                .map_err(|_| format!("expected 'on', 'off' or 'auto', not '{text}'")),
            Self::Number(min, max) => match value::number(text)? {
                n if (min..=max).contains(&n) => Ok(()),
                _ => Err(format!("expected a number from {min} to {max}, not {text}")),
            },
            Self::PowerOfTwo(min, max) => match value::number(text)? {
                n if (min..=max).contains(&n) && n.is_power_of_two() => Ok(()),
                _ => Err(format!("expected a power of two from {min} to {max}, not {text}")),
            },
            Self::Signed => text
                .parse::<i32>()
                .map(drop)
                .map_err(|_| format!("expected a whole number, not '{text}'")),
            Self::Size(unit) => value::size(text, unit).map(drop),
            Self::OneOf(words) if words.contains(&text) => Ok(()),
            Self::OneOf(words) => Err(format!("expected {}, not '{text}'", words.join(" or "))),
            Self::Mac => value::mac(text).map(drop),
            Self::PciAddr => value::pci_addr(text).map(drop),
            Self::Fds => value::fds(text).map(drop),
        }
    }

    /// Whether two texts mean the same value ("on" and "yes").
    pub(super) fn same(&self, a: &str, b: &str) -> bool {
        match *self {
            Self::Switch | Self::SwitchOrAuto => {
                a == b || value::switch(a).is_ok_and(|a| value::switch(b) == Ok(a))
            }
            Self::Size(unit) => value::size(a, unit).is_ok_and(|a| value::size(b, unit) == Ok(a)),
            _ => a == b,
        }
    }
}

/// The keys of one option, or of one member of a [`Family`].
#[derive(Debug)]
pub struct Schema {
    /// The driver's name in messages after the option's ("tap"); "" when the option has none.
    pub name: &'static str,
    /// The key of a first word without `=`.
    pub implied: Option<&'static str>,
    pub keys: &'static [&'static [Key]],
}

impl Schema {
    /// Of an option without drivers.
    pub const fn of(implied: Option<&'static str>, keys: &'static [&'static [Key]]) -> Self {
        Self { name: "", implied, keys }
    }

    pub fn keys(&self) -> impl Iterator<Item = &'static Key> {
        self.keys.iter().copied().flatten()
    }

    pub(super) fn find(&self, given: &str) -> Option<&'static Key> {
        self.keys().find(|k| k.is(given))
    }

    /// "virtio-net-pci options:" and a line a key, in the order of their names.
    pub fn help(&self, option: &str) -> String {
        let title = if self.name.is_empty() { option.trim_start_matches('-') } else { self.name };
        let mut keys: Vec<&Key> = self.keys().collect();
        keys.sort_by_key(|k| k.name);
        let lines: String = keys.into_iter().filter_map(Key::help).collect();
        match lines.is_empty() {
            true => format!("{title} has no options\n"),
            false => format!("{title} options:\n{lines}"),
        }
    }

    /// How to come by [`help`](Self::help): "-device virtio-net-pci,help".
    fn how_to_help(&self, option: &str) -> String {
        // Of a part of it, "-blockdev (file)", the option is what can be asked.
        let option = option.split_once(' ').map_or(option, |(option, _)| option);
        match self.name {
            "" => format!("{option} help"),
            name => format!("{option} {name},help"),
        }
    }

    /// The refusal of a key that is not in the table.
    pub(super) fn unknown(&self, option: &str, key: &str) -> String {
        let names = self.keys().filter(|k| !matches!(k.fate, Fate::Refused(_))).map(|k| k.name);
        format!(
            "parameter '{key}' is not supported{} ({} lists what is)",
            hint(key, names, ""),
            self.how_to_help(option)
        )
    }
}

/// One driver of a [`Family`].
#[derive(Debug)]
pub struct Member {
    pub schema: &'static Schema,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    pub about: &'static str,
}

impl Member {
    pub fn name(&self) -> &'static str {
        self.schema.name
    }

    fn is(&self, name: &str) -> bool {
        self.name() == name || self.aliases.contains(&name)
    }
}

/// An option whose first word chooses a driver.
#[derive(Debug)]
pub struct Family {
    /// The key that chooses ("driver"), which may be left out in the first word.
    pub key: &'static str,
    /// What a member is ("device").
    pub what: &'static str,
    /// The first line of `help`.
    pub heading: &'static str,
    pub members: &'static [Member],
    /// Names that people know and that are not available here.
    pub absent: &'static [&'static str],
    /// What to use instead of these.
    pub instead: &'static str,
}

impl Family {
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.members.iter().map(Member::name)
    }

    /// The list of members.
    pub fn help(&self, option: &str) -> String {
        let mut text = format!("{}\n", self.heading);
        for member in self.members {
            let aliases = match member.aliases {
                [] => String::new(),
                names => format!(" (also {})", names.join(", ")),
            };
            text += &format!("  {:<20} {}{aliases}\n", member.name(), member.about);
        }
        text + &format!("{option} NAME,help lists the options of one.\n")
    }

    /// The member of that name. `more` are names that are known elsewhere, for the hint.
    pub(super) fn find(
        &self,
        option: &str,
        name: &str,
        more: &[&'static str],
    ) -> Result<&'static Schema, CmdlineError> {
        if let Some(member) = self.members.iter().find(|m| m.is(name)) {
            return Ok(member.schema);
        }
        let what = self.what;
        let message = if self.absent.contains(&name) {
            format!("{what} '{name}' is not available; {}", self.instead)
        } else {
            let aliases = self.members.iter().flat_map(|m| m.aliases.iter().copied());
            let near = hint(name, self.names().chain(aliases).chain(more.iter().copied()), "");
            format!("{what} '{name}' is not supported{near} ({option} help lists what is)")
        };
        Err(CmdlineError::Invalid { option: option.into(), message })
    }
}
