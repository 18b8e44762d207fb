//! What a user says of the switch and its ports: on the command line, in a TOML file, over the control
//! socket. All three end in the same types and the same checks; what is not known is refused by
//! name, with the nearest known key.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use net::XdpMode;
use serde::{Deserialize, Serialize};

use crate::shared::PollMode;
use crate::vlan::{MAX_VLAN, Vlans};
use crate::{Error, Result};

/// Most queues of a port.
pub const MAX_QUEUES: u16 = 64;
/// Longest name of a port.
const MAX_NAME: usize = 32;

/// Kinds of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortType {
    VhostUser,
    Tap,
    AfPacket,
    AfXdp,
}

impl PortType {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Tap => "tap",
            Self::AfPacket => "af-packet",
            Self::AfXdp => "af-xdp",
        }
    }
}

/// Who listens on a vhost-user port's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The other side; the switch connects.
    Client,
    /// The switch.
    #[default]
    Server,
}

fn one() -> u16 {
    1
}

/// One port, as configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: PortType,
    /// Socket of a vhost-user port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Interface of other ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifname: Option<String>,
    /// How an af-xdp port uses its interface.
    #[serde(default, rename = "xdp-mode", skip_serializing_if = "Option::is_none")]
    pub xdp_mode: Option<XdpMode>,
    /// Queues (pairs of rings), 1 to [`MAX_QUEUES`].
    #[serde(default = "one")]
    pub queues: u16,
    /// VLAN of untagged frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// VLANs of tagged frames.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trunk: Vec<u16>,
    /// Largest payload of a frame to this port, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Bits a second that the port may send.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "amount")]
    pub rate: Option<u64>,
    /// Flooded frames a second that the port may send.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "amount")]
    pub storm: Option<u64>,
}

/// The switch, as configured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// CPUs, one for each poll thread; none: one thread that runs anywhere.
    #[serde(default)]
    pub cpus: Vec<usize>,
    /// Control socket.
    #[serde(default)]
    pub control: Option<PathBuf>,
    #[serde(default)]
    pub poll: PollMode,
    /// Seconds after which an address is forgotten; 300 without.
    #[serde(default)]
    pub ageing: Option<u32>,
    /// Addresses that the forwarding database holds; 8192 without.
    #[serde(default)]
    pub macs: Option<usize>,
    /// Address and TCP port for Prometheus.
    #[serde(default)]
    pub metrics: Option<String>,
    #[serde(default)]
    pub port: Vec<PortSpec>,
}

const PORT_KEYS: &[&str] = &[
    "name", "type", "path", "mode", "ifname", "xdp-mode", "queues", "vlan", "trunk", "mtu", "rate",
    "storm",
];
const CONFIG_KEYS: &[&str] = &["cpus", "control", "poll", "ageing", "macs", "metrics", "port"];

/// The known word nearest to `word`, if one is near.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (distance(word, k), *k))
        .filter(|(d, k)| *d <= 1 + k.len() / 3)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate().take(64) {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn unknown(place: &str, key: &str, known: &[&str]) -> Error {
    let hint = match nearest(key, known) {
        Some(k) => format!("did you mean '{k}'?"),
        None => format!("known are {}", known.join(", ")),
    };
    Error::Config(format!("{place}: unknown key '{key}'; {hint}"))
}

/// A number a second, as a number or as text with a unit.
fn amount<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Amount {
        Number(u64),
        Text(String),
    }
    match Amount::deserialize(from) {
        Ok(Amount::Number(n)) => Ok(Some(n)),
        Ok(Amount::Text(text)) => parse_amount(&text).map(Some).map_err(serde::de::Error::custom),
        Err(_) => Err(serde::de::Error::custom("expected a number, or text as \"100M\"")),
    }
}

/// A number from 1 on, with k, M or G for powers of 1000.
///
/// # Errors
/// A sentence.
fn parse_amount(text: &str) -> std::result::Result<u64, String> {
    let bad =
        || format!("'{text}': expected a number from 1 on, with k, M or G for powers of 1000");
    let (digits, factor) = match text.char_indices().last() {
        Some((i, 'k' | 'K')) => (&text[..i], 1000),
        Some((i, 'M')) => (&text[..i], 1_000_000),
        Some((i, 'G')) => (&text[..i], 1_000_000_000),
        _ => (text, 1),
    };
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    let n: u64 = digits.parse().ok().filter(|_| plain).ok_or_else(bad)?;
    n.checked_mul(factor).filter(|n| *n > 0).ok_or_else(bad)
}

fn number<T: TryFrom<u64>>(place: &str, key: &str, value: &str) -> Result<T> {
    let bad = |what| Error::Config(format!("{place}: {key}={value}: {what}"));
    let n: u64 = value.parse().map_err(|_| bad("expected a whole number"))?;
    T::try_from(n).map_err(|_| bad("too large"))
}

fn word<T: for<'a> Deserialize<'a>>(
    place: &str,
    key: &str,
    value: &str,
    known: &[&str],
) -> Result<T> {
    serde_json::from_value(value.into()).map_err(|_| {
        Error::Config(format!("{place}: {key}={value}: expected one of {}", known.join(", ")))
    })
}

const TYPES: &[&str] = &["vhost-user", "tap", "af-packet", "af-xdp"];
const XDP_MODES: &[&str] = &["best-effort", "native-with-zerocopy", "native", "generic"];

impl PortSpec {
    /// Parses `NAME,type=...,key=value,...`.
    ///
    /// # Errors
    /// A sentence that names the port and the key.
    pub fn parse(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let place = format!("port '{name}'");
        let missing =
            || Error::Config(format!("{place}: type= is missing: one of {}", TYPES.join(", ")));
        let pairs: Vec<(&str, &str)> = parts
            .map(|p| {
                p.split_once('=')
                    .ok_or_else(|| Error::Config(format!("{place}: '{p}': expected key=value")))
            })
            .collect::<Result<_>>()?;
        let kind = pairs.iter().find(|(k, _)| *k == "type").ok_or_else(missing)?.1;
        let kind: PortType = word(&place, "type", kind, TYPES)?;
        let mut spec = Self {
            name: name.into(),
            kind,
            path: None,
            mode: None,
            ifname: None,
            xdp_mode: None,
            queues: 1,
            vlan: None,
            trunk: Vec::new(),
            mtu: None,
            rate: None,
            storm: None,
        };
        let mut seen = HashSet::new();
        for (key, value) in pairs {
            if !seen.insert(key) {
                return Err(Error::Config(format!("{place}: {key}= is given twice")));
            }
            match key {
                "type" => {}
                "path" => spec.path = Some(value.into()),
                "mode" => spec.mode = Some(word(&place, key, value, &["client", "server"])?),
                "ifname" => spec.ifname = Some(value.into()),
                "xdp-mode" => spec.xdp_mode = Some(word(&place, key, value, XDP_MODES)?),
                "queues" => spec.queues = number(&place, key, value)?,
                _ => spec.set(&place, key, value)?,
            }
        }
        spec.check()?;
        Ok(spec)
    }

    /// Changes one of the keys that a running port can change; an empty value takes it away.
    ///
    /// # Errors
    /// A sentence. [`check`](Self::check) has to follow.
    pub fn set(&mut self, place: &str, key: &str, value: &str) -> Result<()> {
        let some = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        match key {
            "vlan" => self.vlan = some(value).map(|v| number(place, key, &v)).transpose()?,
            "trunk" => {
                let all = value.split('+').filter(|v| !v.is_empty());
                self.trunk = all.map(|v| number(place, key, v)).collect::<Result<_>>()?;
            }
            "mtu" => self.mtu = some(value).map(|v| number(place, key, &v)).transpose()?,
            "rate" | "storm" => {
                let limit = some(value).map(|v| parse_amount(&v)).transpose();
                let limit = limit.map_err(|e| Error::Config(format!("{place}: {key}={e}")))?;
                *(if key == "rate" { &mut self.rate } else { &mut self.storm }) = limit;
            }
            known if PORT_KEYS.contains(&known) => {
                return Err(Error::Config(format!(
                    "{place}: {key} cannot change while the port is there: remove it and add it anew"
                )));
            }
            _ => return Err(unknown(place, key, PORT_KEYS)),
        }
        Ok(())
    }

    /// Whether it can be.
    ///
    /// # Errors
    /// A sentence that names the port and the key.
    pub fn check(&self) -> Result<()> {
        let Self {
            name,
            kind,
            path,
            mode,
            ifname,
            xdp_mode,
            queues,
            vlan,
            trunk,
            mtu,
            rate,
            storm,
        } = self;
        let fail = |what: String| Err(Error::Config(format!("port '{name}': {what}")));
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_.:@".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fine) {
            return fail(format!(
                "a name has 1 to {MAX_NAME} letters, digits, '-', '_', '.', ':', '@'"
            ));
        }
        let wanted = |key: &str| fail(format!("type={} needs {key}=", kind.name()));
        let useless = |key: &str| fail(format!("{key}= means nothing for type={}", kind.name()));
        if *kind == PortType::VhostUser {
            match path {
                None => return wanted("path"),
                Some(p) if p.as_os_str().is_empty() => return wanted("path"),
                Some(p) if p.as_os_str().len() > 107 => {
                    return fail("path= is longer than the 107 bytes of a socket's name".into());
                }
                Some(_) if ifname.is_some() => return useless("ifname"),
                Some(_) => {}
            }
        } else if ifname.as_ref().is_none_or(String::is_empty) {
            return wanted("ifname");
        } else if path.is_some() {
            return useless("path");
        } else if mode.is_some() {
            return useless("mode");
        }
        if xdp_mode.is_some() && *kind != PortType::AfXdp {
            return useless("xdp-mode");
        }
        if !(1..=MAX_QUEUES).contains(queues) {
            return fail(format!("queues={queues}: expected 1 to {MAX_QUEUES}"));
        }
        if let Some(v) = vlan.iter().chain(trunk).find(|v| !(1..=MAX_VLAN).contains(*v)) {
            return fail(format!("VLAN {v}: expected 1 to {MAX_VLAN}"));
        }
        if let Some(v) = vlan.filter(|v| trunk.contains(v)) {
            return fail(format!("VLAN {v} is both the untagged one (vlan=) and in trunk="));
        }
        if mtu.is_some_and(|m| m < 68) {
            return fail("mtu=: expected 68 or more".into());
        }
        if *rate == Some(0) || *storm == Some(0) {
            return fail("rate= and storm= are at least 1".into());
        }
        Ok(())
    }

    /// Its VLANs.
    pub fn vlans(&self) -> Vlans {
        Vlans::new(self.vlan, &self.trunk)
    }
}

impl Config {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// A sentence that names file, line and key.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Config(format!("cannot read '{shown}': {e}")))?;
        Self::parse(&shown.to_string(), &text)
    }

    /// Reads TOML text of file `name`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let place = format!("{name}, line {}", line_at(text, at));
            let message = e.message();
            match message.strip_prefix("unknown field `").and_then(|m| m.split('`').next()) {
                Some(key) => {
                    let port = message.contains("`ifname`");
                    unknown(&place, key, if port { PORT_KEYS } else { CONFIG_KEYS })
                }
                None => Error::Config(format!("{place}: {}{message}", key_at(text, at))),
            }
        })?;
        config.check_parts().map_err(|(part, e)| match e {
            Error::Config(m) => match part.and_then(|part| part.position(text)) {
                Some(at) => Error::Config(format!("{name}, line {}: {m}", line_at(text, at))),
                None => Error::Config(format!("{name}: {m}")),
            },
            other => other,
        })?;
        Ok(config)
    }

    /// Whether it can be.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<()> {
        self.check_parts().map_err(|(_, e)| e)
    }

    /// As [`check`](Self::check); says what is wrong where it is known.
    fn check_parts(&self) -> std::result::Result<(), (Option<Part>, Error)> {
        let mut names = HashSet::new();
        let mut places = HashSet::new();
        for (i, p) in self.port.iter().enumerate() {
            let here = |e| (Some(Part::Port(i)), e);
            p.check().map_err(here)?;
            if !names.insert(&p.name) {
                let twice = Error::Config(format!("port '{}' is there twice", p.name));
                return Err(here(twice));
            }
            let place = p.path.as_ref().map(|p| p.display().to_string()).or(p.ifname.clone());
            if let Some(place) = place.filter(|x| !places.insert(x.clone())) {
                let taken = format!("port '{}': '{place}' has a port already", p.name);
                return Err(here(Error::Config(taken)));
            }
        }
        let fail = |key, what: String| Err((Some(Part::Key(key)), Error::Config(what)));
        let mut cpus = HashSet::new();
        if let Some(c) = self.cpus.iter().find(|c| !cpus.insert(**c)) {
            return fail("cpus", format!("cpus: {c} is there twice"));
        }
        if self.ageing.is_some_and(|a| !(10..=1_000_000).contains(&a)) {
            return fail("ageing", "ageing: expected 10 to 1000000 seconds".into());
        }
        if self.macs.is_some_and(|m| !(64..=4 << 20).contains(&m)) {
            return fail("macs", "macs: expected 64 to 4194304".into());
        }
        Ok(())
    }
}

/// A part of a configuration.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// The port with this index.
    Port(usize),
    Key(&'static str),
}

impl Part {
    /// Where it begins in `text`, which is TOML.
    fn position(self, text: &str) -> Option<usize> {
        type Table = std::collections::HashMap<String, toml::Spanned<toml::Value>>;
        #[derive(Deserialize)]
        struct Ports {
            #[serde(default)]
            port: Vec<toml::Spanned<toml::Value>>,
        }
        match self {
            Self::Port(i) => {
                toml::from_str::<Ports>(text).ok()?.port.get(i).map(|p| p.span().start)
            }
            Self::Key(key) => toml::from_str::<Table>(text).ok()?.get(key).map(|v| v.span().start),
        }
    }
}

/// The number of the line that byte `at` is in, from 1.
fn line_at(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|b| *b == b'\n').count()
}

/// "key: " of the line that byte `at` is in, or nothing.
fn key_at(text: &str, at: usize) -> String {
    let line = text.lines().nth(line_at(text, at) - 1).unwrap_or_default();
    match line.split_once('=') {
        Some((key, _)) => format!("{}: ", key.trim()),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        PortSpec::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn ports_from_the_command_line() {
        let p = PortSpec::parse("vm1,type=vhost-user,path=/run/a,mode=client,queues=4,trunk=1+2")
            .unwrap();
        assert_eq!((p.mode, p.queues, p.trunk), (Some(Mode::Client), 4, vec![1, 2]));
        let p = PortSpec::parse("up,type=tap,ifname=tap0,rate=100M,storm=2k,vlan=7").unwrap();
        assert_eq!((p.rate, p.storm, p.vlan), (Some(100_000_000), Some(2000), Some(7)));
        let p = PortSpec::parse("up,type=af-xdp,ifname=e,xdp-mode=native-with-zerocopy").unwrap();
        assert_eq!((p.kind, p.xdp_mode), (PortType::AfXdp, Some(XdpMode::NativeWithZeroCopy)));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, expected) in [
            ("a,type=vhost-user,pth=/x", "unknown key 'pth'; did you mean 'path'?"),
            ("a,path=/x", "type= is missing"),
            ("a,type=vhost,path=/x", "type=vhost: expected one of vhost-user, tap"),
            ("a,type=vhost-user", "type=vhost-user needs path="),
            ("a,type=tap,ifname=t,path=/x", "path= means nothing for type=tap"),
            ("a,type=tap,ifname=t,mode=client", "mode= means nothing"),
            ("a,type=tap,ifname=t,queues=65", "queues=65: expected 1 to 64"),
            ("a,type=tap,ifname=t,queues=65537", "queues=65537: too large"),
            ("a,type=tap,ifname=t,vlan=4095", "VLAN 4095: expected 1 to 4094"),
            ("a,type=tap,ifname=t,vlan=x", "vlan=x: expected a whole number"),
            ("a,type=tap,ifname=t,vlan=1,trunk=1", "both the untagged one"),
            ("a,type=tap,ifname=t,ifname=u", "given twice"),
            ("a,type=af-xdp", "type=af-xdp needs ifname="),
            ("a,type=af-xdp,ifname=e,xdp-mode=fast", "xdp-mode=fast: expected one of best-effort,"),
            ("a,type=af-xdp,ifname=e,xdpmode=native", "did you mean 'xdp-mode'?"),
            ("a,type=tap,ifname=t,xdp-mode=native", "xdp-mode= means nothing for type=tap"),
            ("a b,type=tap,ifname=t", "a name has"),
            ("a,type=tap,ifname=t,rate=fast", "rate='fast': expected a number from 1 on"),
            ("a,type=tap,ifname=t,storm=+5", "storm='+5': expected a number"),
            ("a,type=vhost-user,path=", "type=vhost-user needs path="),
            ("a,type=tap,nonsense", "expected key=value"),
        ] {
            assert!(message(text).contains(expected), "{text}: {}", message(text));
        }
    }

    #[test]
    fn a_file_is_read_and_its_mistakes_are_found() {
        let text =
            "cpus = [1]\npoll = 'always'\n[[port]]\nname = 'a'\ntype = 'tap'\nifname = 't'\n";
        let c = Config::parse("x.toml", text).unwrap();
        assert_eq!((c.cpus.len(), c.poll, c.port.len()), (1, PollMode::Always, 1));
        let m = |text: &str| Config::parse("x.toml", text).unwrap_err().to_string();
        let wrong = format!("{text}qeues = 2\n");
        assert!(
            m(&wrong).contains("x.toml, line 7: unknown key 'qeues'; did you mean 'queues'?"),
            "{}",
            m(&wrong)
        );
        assert!(m("cpu = [1]\n").contains("line 1: unknown key 'cpu'; did you mean 'cpus'?"));
        assert!(m("poll = 'never'\n").contains("line 1: poll: "));
        assert!(m("ageing = 20\nmacs = 5\n").contains("x.toml, line 2: macs: expected 64"));
        let wrong = format!("{text}vlan = 5000\n");
        assert!(m(&wrong).contains("x.toml, line 3: port 'a': VLAN 5000"), "{}", m(&wrong));
        let wrong = format!("{text}queues = 500000\n");
        assert!(m(&wrong).contains("line 7: queues: "), "{}", m(&wrong));
        let limits = format!("{text}rate = '100M'\nstorm = 5\n");
        let c = Config::parse("x.toml", &limits).unwrap();
        assert_eq!((c.port[0].rate, c.port[0].storm), (Some(100_000_000), Some(5)));
        let wrong = format!("{text}rate = 'fast'\n");
        assert!(m(&wrong).contains("line 7: rate: 'fast': expected"), "{}", m(&wrong));
        assert!(m(&format!("{text}{}", &text[text.find("[[").unwrap()..])).contains("twice"));
    }
}
