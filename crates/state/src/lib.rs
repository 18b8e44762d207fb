//! Saved state: versioned sections, one a device, and the typestate that makes sure that state is
//! saved only from a machine that stands still.
//!
//! - [`section`]: [`SavedState`], [`SaveRestore`], [`Section`], [`Sections`].
//! - [`units`]: [`Unit`] and [`UnitSet`]: running -> quiesced -> running.
//! - [`container`]: sections in a file or pipe.
//! - [`conformance`]: the test that every device with saved state runs.

pub mod conformance;
pub mod container;
pub mod section;
pub mod units;

pub use section::{SaveRestore, Saveable, SavedState, Section, Sections};
pub use units::{Quiesced, Running, Unit, UnitSet};

/// What can go wrong when state is saved or restored. Restored state is untrusted: every field is
/// checked, and an error names the section and what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A section is not valid CBOR of its type.
    #[error("section {section}: {reason}")]
    Decode { section: String, reason: String },
    /// A value cannot be encoded.
    #[error("section {section}: cannot encode: {reason}")]
    Encode { section: String, reason: String },
    /// A section of another kind or of a version that this build does not read.
    #[error("section {section}: {kind} version {found}, this build reads {supported}")]
    Version { section: String, kind: String, found: u16, supported: String },
    /// A section that a device needs is not there.
    #[error("section {0} is missing")]
    Missing(String),
    /// Sections that no device asked for.
    #[error("sections that no device here has: {0}")]
    LeftOver(String),
    /// The stream holds more, or larger, sections than allowed.
    #[error("saved state too large: {0}")]
    TooLarge(String),
    /// What is read is not a snapshot container, or a damaged one.
    #[error("saved state: {0}")]
    Container(String),
    /// A file or pipe with saved state cannot be read or written.
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
    /// A field holds a value that the device cannot have.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A device could not be brought to a stand-still, or not save or restore.
    #[error("{unit}: {reason}")]
    Unit { unit: String, reason: String },
}

impl Error {
    /// A field that holds a value that cannot be.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
