//! What a command prints on standard output. When that cannot be written the command ends: with the
//! status of a program that SIGPIPE killed when nobody reads any more, otherwise with a sentence.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

/// 128 + SIGPIPE, as a shell reports it.
const NOBODY_READS: i32 = 141;

/// Writes `text`, or ends the process.
pub fn text(text: Arguments<'_>) {
    let mut to = std::io::stdout().lock();
    if let Err(e) = to.write_fmt(text).and_then(|()| to.flush()) {
        if e.kind() == ErrorKind::BrokenPipe {
            std::process::exit(NOBODY_READS);
        }
        vmm::tell!("tern: cannot write to standard output: {e}");
        std::process::exit(1);
    }
}

/// As `println!`, but it never panics.
macro_rules! say {
    () => { $crate::say::text(::std::format_args!("\n")) };
    ($format:literal $($rest:tt)*) => {
        $crate::say::text(::std::format_args!("{}\n", ::std::format_args!($format $($rest)*)))
    };
}
pub(crate) use say;
