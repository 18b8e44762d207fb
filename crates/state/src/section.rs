//! Sections: what one device saves, with its kind and version, apart from the protocol's version.

use minicbor::{Decode, Encode};

use crate::{Error, Result};

/// Most sections in one saved state.
pub const MAX_SECTIONS: usize = 4096;
/// Most bytes in one section's payload.
pub const MAX_SECTION_BYTES: usize = 16 << 20;

/// The stable, plain-data form of a device's state: minicbor with integer-tagged fields
/// (`#[cbor(map)]`), so that fields can be added (as `Option` or with a default) and old and new
/// builds still read each other.
pub trait SavedState: Encode<()> + for<'b> Decode<'b, ()> {
    /// What it is, for ever: "virtio-net", "serial16550".
    const KIND: &'static str;
    /// Raised when the meaning of a field changes. Adding an optional field does not raise it.
    const VERSION: u16;
    /// The versions that this build can restore.
    const READS: &'static [u16] = &[Self::VERSION];
}

/// A device whose state can move. `save` takes `&self`: saving cannot change the device.
pub trait SaveRestore {
    type State: SavedState;
    /// The state now. Called only while the machine is quiesced.
    fn save(&self) -> Result<Self::State>;
    /// Takes over `state`, which is untrusted: a bad value is an error and the device is unusable
    /// (the incoming machine is thrown away), but nothing panics.
    fn restore(&mut self, state: Self::State) -> Result<()>;
}

/// [`SaveRestore`] without its type: what a list of devices holds.
pub trait Saveable {
    /// The kind and version that [`save_section`](Self::save_section) writes.
    fn kind(&self) -> (&'static str, u16);
    /// Saves as a section called `name`.
    fn save_section(&self, name: &str) -> Result<Section>;
    /// Restores from a section after checking its kind and version.
    fn restore_section(&mut self, section: &Section) -> Result<()>;
}

impl<T: SaveRestore> Saveable for T {
    fn kind(&self) -> (&'static str, u16) {
        (T::State::KIND, T::State::VERSION)
    }

    fn save_section(&self, name: &str) -> Result<Section> {
        Section::encode(name, &self.save()?)
    }

    fn restore_section(&mut self, section: &Section) -> Result<()> {
        self.restore(section.decode()?)
    }
}

/// One device's saved state: its instance name ("net0", "vcpu.1"), kind, version and bytes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Section {
    #[n(0)]
    pub name: String,
    #[n(1)]
    pub kind: String,
    #[n(2)]
    pub version: u16,
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub payload: Vec<u8>,
}

impl Section {
    /// Encodes `state` under the instance name `name`.
    pub fn encode<S: SavedState>(name: &str, state: &S) -> Result<Self> {
        let payload = minicbor::to_vec(state)
            .map_err(|e| Error::Encode { section: name.into(), reason: e.to_string() })?;
        let (kind, version) = (S::KIND.into(), S::VERSION);
        Ok(Self { name: name.into(), kind, version, payload })
    }

    /// Decodes as `S`, after checking kind and version.
    pub fn decode<S: SavedState>(&self) -> Result<S> {
        if self.kind != S::KIND || !S::READS.contains(&self.version) {
            return Err(Error::Version {
                section: self.name.clone(),
                kind: self.kind.clone(),
                found: self.version,
                supported: format!("{} versions {:?}", S::KIND, S::READS),
            });
        }
        minicbor::decode(&self.payload)
            .map_err(|e| Error::Decode { section: self.name.clone(), reason: e.to_string() })
    }
}

/// All sections of a machine, in the order in which they are loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sections(pub Vec<Section>);

impl Sections {
    /// Takes the section called `name` out.
    pub fn take(&mut self, name: &str) -> Result<Section> {
        let at = self.0.iter().position(|s| s.name == name);
        at.map(|i| self.0.remove(i)).ok_or_else(|| Error::Missing(name.into()))
    }

    /// An error that names what is left over, if anything is.
    pub fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.0.into_iter().map(|s| s.name).collect();
        Err(Error::LeftOver(names.join(", ")))
    }
}
