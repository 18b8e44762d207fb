//! Where a migration goes to or comes from: `tcp:HOST:PORT`, `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// A migration URI as QEMU writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`. The host is a name, an IPv4 address, or an IPv6 address (in brackets in
    /// the URI, without them here). Empty listens on every address, and connects to this machine.
    Tcp { host: String, port: u16 },
    /// `unix:PATH`.
    Unix { path: PathBuf },
}

/// Longest path of a Unix socket in bytes (sun_path without its final zero).
const MAX_UNIX_PATH: usize = 107;

impl FromStr for Uri {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let wrong = |why: String| Error::Uri(format!("migration URI '{s}': {why}"));
        let Some((scheme, rest)) = s.split_once(':') else {
            return Err(wrong("expected tcp:HOST:PORT or unix:PATH".into()));
        };
        match scheme {
            "tcp" => tcp(rest).map_err(wrong),
            "unix" => unix(rest).map_err(wrong),
            "fd" | "exec" | "file" | "rdma" => Err(wrong(format!(
                "'{scheme}:' is not offered yet; use tcp:HOST:PORT or unix:PATH"
            ))),
            _ => {
                Err(wrong(format!("unknown kind '{scheme}'; expected tcp:HOST:PORT or unix:PATH")))
            }
        }
    }
}

fn tcp(rest: &str) -> Result<Uri, String> {
    // QEMU allows options after a comma (ipv4=on, to=PORT); none of them is offered.
    if let Some((_, options)) = rest.split_once(',') {
        return Err(format!("options after the address are not offered ('{options}')"));
    }
    let (host, port) = match rest.strip_prefix('[') {
        Some(v6) => {
            let (host, after) =
                v6.split_once(']').ok_or("the IPv6 address lacks its closing bracket")?;
            let port = after.strip_prefix(':').ok_or("expected :PORT after the bracket")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() && !host.contains('%') {
                return Err(format!("'{host}' is not an IPv6 address"));
            }
            (host, port)
        }
        None => {
            let (host, port) =
                rest.rsplit_once(':').ok_or("expected tcp:HOST:PORT, the port is missing")?;
            if host.contains(':') {
                return Err("an IPv6 address goes in brackets, as in tcp:[::1]:4444".into());
            }
            (host, port)
        }
    };
    if host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/') {
        return Err(format!("'{}' is not a host name", host.escape_debug()));
    }
    let port = port
        .parse::<u16>()
        .map_err(|_| format!("port '{}': expected 0 to 65535", port.escape_debug()))?;
    Ok(Uri::Tcp { host: host.to_owned(), port })
}

fn unix(path: &str) -> Result<Uri, String> {
    if path.is_empty() || path.contains('\0') {
        return Err("expected unix:PATH, the path is missing".into());
    }
    if path.len() > MAX_UNIX_PATH {
        return Err(format!("the path has {} bytes, at most {MAX_UNIX_PATH} fit", path.len()));
    }
    Ok(Uri::Unix { path: path.into() })
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_qemu_takes() {
        let tcp = |h: &str, port| Uri::Tcp { host: h.into(), port };
        assert_eq!("tcp:127.0.0.1:4444".parse(), Ok(tcp("127.0.0.1", 4444)));
        assert_eq!("tcp:host.example:1".parse(), Ok(tcp("host.example", 1)));
        assert_eq!("tcp:[::]:0".parse(), Ok(tcp("::", 0)));
        assert_eq!("tcp::4444".parse(), Ok(tcp("", 4444)));
        assert_eq!("unix:/a:b".parse(), Ok(Uri::Unix { path: "/a:b".into() }));
    }

    #[test]
    fn says_what_is_wrong() {
        for (uri, says) in [
            ("", "expected tcp:HOST:PORT"),
            ("tcp:host", "port is missing"),
            ("tcp:host:", "port ''"),
            ("tcp:host:99999", "0 to 65535"),
            ("tcp:::1:44", "brackets"),
            ("tcp:[::1:44", "closing bracket"),
            ("tcp:[::1]44", "expected :PORT"),
            ("tcp:[xx]:44", "not an IPv6"),
            ("tcp:a:1,to=4", "not offered"),
            ("unix:", "path is missing"),
            ("exec:cat", "not offered yet"),
            ("http:x", "unknown kind"),
        ] {
            let e = uri.parse::<Uri>().unwrap_err().to_string();
            assert!(e.contains(says), "{uri}: {e}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_prints_what_it_reads(s in "(tcp:|unix:)?.{0,40}") {
            if let Ok(uri) = s.parse::<Uri>() {
                prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
            }
        }
    }
}
