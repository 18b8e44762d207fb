//! Values: switches, numbers, sizes, MAC and PCI addresses, lists of fds.

/// `on|off`, `yes|no`, `true|false`, `y|n`.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("expected 'on' or 'off', not '{text}'")),
    }
}

/// A letter, then letters, digits, `-`, `.` and `_`.
pub fn id(text: &str) -> Result<(), String> {
    let mut chars = text.chars();
    let good = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    match good {
        true => Ok(()),
        false => {
            Err(format!("'{text}' is not an identifier (a letter, then letters, digits, '-._')"))
        }
    }
}

/// A whole number, decimal or with 0x.
pub fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        None if !text.starts_with('+') => text.parse().ok(),
        _ => None,
    };
    parsed.ok_or_else(|| format!("expected a number, not '{text}'"))
}

/// A size in bytes: a number, maybe with a fraction, and a suffix from B to E (powers of 1024).
/// `unit` counts when there is no suffix.
pub fn size(text: &str, unit: u64) -> Result<u64, String> {
    let wrong = || format!("expected a size such as 512M or 2G, not '{text}'");
    let end = text.char_indices().last().map(|(i, _)| i).ok_or_else(wrong)?;
    let shift = match text[end..].to_ascii_lowercase().as_str() {
        "b" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        "p" => Some(50),
        "e" => Some(60),
        _ => None,
    };
    let hex = text.starts_with("0x") || text.starts_with("0X");
    if hex {
        return number(text)?.checked_mul(unit).ok_or_else(wrong);
    }
    let (digits, unit) = match shift {
        Some(shift) => (&text[..end], 1u64 << shift),
        None => (text, unit),
    };
    if let Ok(whole) = number(digits) {
        return whole.checked_mul(unit).ok_or_else(|| format!("'{text}' is too large"));
    }
    let simple = digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let fraction: f64 = if simple { digits.parse().ok() } else { None }.ok_or_else(wrong)?;
    let bytes = fraction * unit as f64;
    // Beyond 2^53 a fraction is not exact, and means nothing for memory.
    if !bytes.is_finite() || bytes >= 9e15 {
        return Err(format!("'{text}' is too large"));
    }
    Ok(bytes as u64)
}

/// A number of bytes for people: "512 MiB", in the largest unit of which it is a whole number.
pub fn bytes(n: u64) -> String {
    let units = ["TiB", "GiB", "MiB", "KiB"];
    let unit = units
        .iter()
        .zip([40, 30, 20, 10])
        .find(|(_, shift)| n != 0 && n.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{n} bytes"), |(name, shift)| format!("{} {name}", n >> shift))
}

/// "52:54:00:12:34:56", also with dashes; not multicast.
pub fn mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("expected a MAC address such as 52:54:00:12:34:56, not '{text}'");
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|p| (1..=2).contains(&p.len())).ok_or_else(wrong)?;
        if part.starts_with('+') {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 != 0 {
        return Err(format!("{text} is a multicast address; a NIC needs a unicast one"));
    }
    Ok(mac)
}

/// "3", "0x3", "3.1", "0x1.0x1": slot and function, hexadecimal with or without 0x.
pub fn pci_addr(text: &str) -> Result<(u8, u8), String> {
    let wrong =
        || format!("expected SLOT or SLOT.FUNCTION in hexadecimal (0x1f.0x7), not '{text}'");
    let part = |s: &str, max: u8| {
        let digits = s.strip_prefix("0x").unwrap_or(s);
        let n = u8::from_str_radix(digits, 16).ok().filter(|n| *n <= max);
        n.filter(|_| !digits.starts_with('+')).ok_or_else(wrong)
    };
    match text.split_once('.') {
        Some((slot, function)) => Ok((part(slot, 31)?, part(function, 7)?)),
        None => Ok((part(text, 31)?, 0)),
    }
}

/// "31" or "31:33": numbers of inherited fds.
pub fn fds(text: &str) -> Result<Vec<i32>, String> {
    let list: Result<Vec<i32>, String> = text
        .split(':')
        .map(|s| match s.parse::<i32>() {
            Ok(fd) if fd >= 0 => Ok(fd),
            _ => Err(format!("expected the number of an open file descriptor, not '{s}'")),
        })
        .collect();
    list.and_then(|l| if l.len() > 64 { Err("more than 64 queues".into()) } else { Ok(l) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("512", 1 << 20), Ok(512 << 20));
        assert_eq!(size("524288k", 1 << 20), Ok(512 << 20));
        assert_eq!(size("1.5G", 1), Ok(3 << 29));
        assert_eq!(size("0x100", 1), Ok(256));
        let told: Vec<String> = [0, 1000, 3 << 20, 1 << 40].into_iter().map(bytes).collect();
        assert_eq!(told, ["0 bytes", "1000 bytes", "3 MiB", "1 TiB"]);
        for bad in ["", "M", "-1", "1x", "99999999999999999999", "20E", "1e3", "é"] {
            assert!(size(bad, 1).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(pci_addr("0x1.0x1"), Ok((1, 1)));
        assert_eq!(pci_addr("1f"), Ok((31, 0)));
        assert!(pci_addr("20").is_err() && pci_addr("1.8").is_err() && pci_addr("").is_err());
        assert_eq!(mac("52:54:00:12:34:56"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert!(mac("01:00:5e:00:00:01").is_err() && mac("52:54").is_err());
        assert_eq!(fds("31:33"), Ok(vec![31, 33]));
        assert!(fds("tap0").is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,30}") {
            let _ = (switch(&text), number(&text), size(&text, 1 << 20), mac(&text));
            let _ = (pci_addr(&text), fds(&text));
        }
    }
}
