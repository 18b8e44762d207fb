//! The nearest known name, for "did you mean".

/// "; did you mean 'X'?" with the nearest of `known`, or nothing when none is near.
pub fn hint<'a>(word: &str, known: impl Iterator<Item = &'a str>, prefix: &str) -> String {
    let word: Vec<char> = word.chars().take(64).collect();
    let best =
        known.map(|k| (distance(&word, &k.chars().collect::<Vec<_>>()), k)).min_by_key(|(d, _)| *d);
    match best {
        Some((d, name)) if d <= 1 + word.len() / 4 => {
            format!("; did you mean '{prefix}{name}'?")
        }
        _ => String::new(),
    }
}

/// Edits (insert, delete, replace, swap neighbours) from one word to the other.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let change = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + change);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let known = ["device", "drive", "display"];
        assert_eq!(hint("devcie", known.into_iter(), "-"), "; did you mean '-device'?");
        assert_eq!(hint("xyzzy", known.into_iter(), "-"), "");
    }
}
