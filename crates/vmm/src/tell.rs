//! What a process has to say on standard error. That nobody reads it, or that it cannot be written,
//! is no reason to stop a VM: `eprintln!` would.

use std::fmt::Arguments;
use std::io::Write;

/// Writes a line to standard error if that can be done. [`tell!`](crate::tell!) is its short form.
pub fn line(text: Arguments<'_>) {
    let mut to = std::io::stderr().lock();
    let _ = to.write_fmt(text);
    let _ = to.write_all(b"\n");
}

/// As `eprintln!`, but it never panics.
#[macro_export]
macro_rules! tell {
    ($($text:tt)*) => { $crate::tell::line(::std::format_args!($($text)*)) };
}
