//! What can go wrong.

/// Errors of the switch; each is a sentence for its user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line, the file, or a request.
    #[error("{0}")]
    Config(String),
    /// A port's socket or interface.
    #[error("port '{port}': {reason}")]
    Port { port: String, reason: String },
    /// The host refused something.
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
}

impl Error {
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
