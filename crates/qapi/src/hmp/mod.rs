//! HMP: commands for people, made of QMP commands only.
//!
//! - [`editor`]: the line editor, bytes in and out.
//! - [`session`]: [`HmpSession`], one terminal.
//! - [`commands`]: the table of commands and what each does.
//! - `info`: `info` subcommands and their texts.

pub mod commands;
pub mod editor;
pub mod info;
pub mod session;

pub use commands::execute;
pub use session::{HmpSession, Output};
