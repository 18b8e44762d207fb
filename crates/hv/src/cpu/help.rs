//! What `-cpu help` prints: the models and features of the tables that [`super::build`] goes by.

use std::fmt::Write;

use super::{HOST, MAX, REFUSED, SWITCHES, features, models};

/// Columns of a line of names.
const WIDTH: usize = 78;

/// All models with their brands, then all features that a guest can have, in QEMU's form.
pub fn help() -> String {
    let mut text = String::from("Available CPUs:\n");
    let mut line = |name: &str, about: &str| {
        let _ = writeln!(text, "{}", format!("  {name:<30} {about}").trim_end());
    };
    line(HOST, "the host's own CPU (default)");
    line(MAX, "the same: all that KVM offers");
    for model in models::all() {
        line(model.name, model.brand());
    }
    for (name, model) in models::aliases() {
        line(name, &format!("(alias of {model})"));
    }
    let refused: Vec<&str> = REFUSED.split_whitespace().collect();
    let mut names: Vec<&str> =
        features::all().map(|f| f.name).filter(|n| !refused.contains(n)).collect();
    names.sort_unstable();
    for (heading, names) in [
        ("Recognized CPUID flags:", &names[..]),
        ("Refused, as their state cannot be migrated:", &refused[..]),
        ("Other switches:", SWITCHES),
    ] {
        let _ = write!(text, "\n{heading}\n{}", wrapped(names));
    }
    text
}

fn wrapped(names: &[&str]) -> String {
    let mut text = String::new();
    let mut column = WIDTH;
    for name in names {
        if column + 1 + name.len() > WIDTH {
            text += if text.is_empty() { "  " } else { "\n  " };
            column = 2;
        } else {
            text.push(' ');
            column += 1;
        }
        text += name;
        column += name.len();
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{lookup, models};

    #[test]
    fn every_model_and_feature_that_is_listed_is_known_and_none_is_left_out() {
        let text = help();
        let (cpus, flags) = text.split_once("\nRecognized CPUID flags:\n").unwrap();
        let listed: Vec<&str> =
            cpus.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
        assert!(listed.iter().all(|name| lookup(name).is_ok()), "{cpus}");
        assert!(models().iter().all(|name| listed.contains(name)), "{cpus}");
        let words: Vec<&str> = flags.split_whitespace().collect();
        for feature in features::all() {
            assert!(words.contains(&feature.name), "{}", feature.name);
        }
        assert!(text.lines().all(|l| l.len() <= WIDTH + 20), "{text}");
    }
}
