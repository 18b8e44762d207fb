//! QEMU's command line, parsed into a [`spec::Machine`].

use spec::Machine;

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Run this machine.
    Machine(Box<Machine>),
    /// Print this text and exit with status 0 (`-help`, `-version`, `-machine help`, ...).
    Print(String),
}

/// A command line that is refused; the text names the option and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// No such option.
    #[error("{option}: unknown option{hint}")]
    UnknownOption { option: String, hint: String },
    /// The option needs a value and is the last word.
    #[error("{option}: requires an argument")]
    MissingValue { option: String },
    /// The option's value is refused.
    #[error("{option}: {message}")]
    Invalid { option: String, message: String },
}

/// Parses the arguments after the program's name.
pub fn parse(args: &[String]) -> Result<Parsed, CmdlineError> {
    match args.first() {
        None => Ok(Parsed::Machine(Box::default())),
        Some(option) => {
            Err(CmdlineError::UnknownOption { option: option.clone(), hint: String::new() })
        }
    }
}
