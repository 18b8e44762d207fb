//! Sizes, rates and times as people write and read them.

use std::time::Duration;

/// Parses "512M", "2G", "1.5G", "65536": bytes, with K, M, G, T for powers of 1024 (also written
/// KiB, KB, ...).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let expected =
        || format!("'{text}' is not a size: expected a number with K, M, G or T, as 512M");
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let shift = match unit.trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(expected()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(expected);
    }
    let value: f64 = number.parse().map_err(|_| expected())?;
    let bytes = value * (1u64 << shift) as f64;
    if bytes.is_finite() && (0.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(expected())
    }
}

/// "1.5 GiB".
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let shown = format!("{value:.1}");
    format!("{} {}", shown.strip_suffix(".0").unwrap_or(&shown), units[unit])
}

/// "3 d 4 h", "5 min 3 s", "12 s".
pub fn duration(time: Duration) -> String {
    let s = time.as_secs();
    match (s / 86_400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, s) => format!("{min} min {s} s"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("512M", 512 << 20), ("2g", 2 << 30), ("1.5G", 3 << 29), ("64KiB", 65536), ("7", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1X", "99999999999999T", "1e99", "nan", "1..2"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!((size(512 << 20), size(3 << 29)), ("512 MiB".into(), "1.5 GiB".into()));
        assert_eq!(size(100), "100 B");
    }

    #[test]
    fn times() {
        let show = |s| duration(Duration::from_secs(s));
        assert_eq!((show(5), show(65)), ("5 s".into(), "1 min 5 s".into()));
        assert_eq!((show(3700), show(90_000)), ("1 h 1 min".into(), "1 d 1 h".into()));
    }
}
