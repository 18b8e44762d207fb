//! The control connection's frames: what the two sessions say to each other, and its bytes.
//!
//! A frame is a 16-byte header and a payload in CBOR (minicbor, integer-tagged, so that fields can
//! be added):
//!
//! ```text
//!   0  magic "TnMC"      4  kind u16, reserved u16 (0)    8  payload bytes u32
//!   12 CRC-32C over the first 12 bytes and the payload    (little-endian)
//! ```
//!
//! Every kind has its own largest payload, which is checked before anything is allocated.

use std::io::Read;

use minicbor::{Decode, Encode};
use state::Section;

use crate::{Error, LateFrame, Preamble, Result};

/// The protocol versions that this build speaks.
pub const VERSIONS: &[u16] = &[1];
/// The named capabilities that this build has. `ram-channels`: more than one RAM connection.
pub const CAPABILITIES: &[&str] = &["ram-channels"];
/// Bytes of a control frame's header.
pub const HEADER: usize = 16;
/// Most bytes in all sections together.
pub const MAX_STATE_BYTES: usize = 256 << 20;
/// Most RAM connections of one migration.
pub const MAX_RAM_CHANNELS: u16 = 64;

const MAGIC: [u8; 4] = *b"TnMC";
/// Most sentences in a refusal, and most bytes of a sentence that came from the peer.
const MAX_REASONS: usize = 64;
const MAX_SENTENCE: usize = 1024;

/// Names one migration, the same on all its connections.
pub type SessionId = [u8; 16];

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Role {
    /// The first control connection.
    #[n(0)]
    Control,
    /// RAM connection number .0 of the migration.
    #[n(1)]
    Ram(#[n(0)] u16),
    /// A new control connection after go, in place of one that was lost.
    #[n(2)]
    Resolve,
}

/// The first frame on every connection, from the source.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    #[n(0)]
    pub versions: Vec<u16>,
    #[n(1)]
    pub capabilities: Vec<String>,
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub session: SessionId,
    #[n(3)]
    pub role: Role,
}

impl Hello {
    /// What this build says.
    pub fn new(session: SessionId, role: Role) -> Self {
        let capabilities = CAPABILITIES.iter().map(|c| (*c).to_owned()).collect();
        Self { versions: VERSIONS.to_vec(), capabilities, session, role }
    }

    /// How many bytes are missing at least of a greeting that begins with `heard`; 0 when it is
    /// whole.
    ///
    /// # Errors
    /// [`Error::Protocol`] when it is no greeting.
    pub fn missing(heard: &[u8]) -> Result<usize> {
        let Some(header) = heard.first_chunk::<HEADER>() else {
            return Ok(HEADER - heard.len());
        };
        let (kind, len) = check_header(header)?;
        if kind != 0 {
            return Err(Error::Protocol(format!("a frame of kind {kind} is no greeting")));
        }
        Ok((HEADER + len).saturating_sub(heard.len()))
    }

    /// The destination's answer: the highest common version and the common capabilities.
    ///
    /// # Errors
    /// A sentence that names both sides' versions.
    pub fn agree(&self) -> std::result::Result<HelloAck, String> {
        let version = VERSIONS.iter().copied().filter(|v| self.versions.contains(v)).max();
        let version = version.ok_or_else(|| {
            format!(
                "the source speaks migration protocol versions {:?}, the destination {VERSIONS:?}",
                &self.versions[..self.versions.len().min(16)]
            )
        })?;
        let capabilities = CAPABILITIES.iter().map(|c| (*c).to_owned());
        let capabilities = capabilities.filter(|c| self.capabilities.contains(c)).collect();
        Ok(HelloAck { version, capabilities })
    }
}

/// The destination's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct HelloAck {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    pub capabilities: Vec<String>,
}

/// How a destination that was asked by [`Role::Resolve`] stands.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Resolution {
    /// Go never came; the guest does not run here, and go is awaited.
    #[n(0)]
    NotGone,
    /// Go came and is being done; Running or Failed follows.
    #[n(1)]
    Going,
    /// The guest runs here with its output held.
    #[n(2)]
    Running,
    /// It never ran here and never will.
    #[n(3)]
    Failed(#[n(0)] String),
    /// Release came: the guest is this side's.
    #[n(4)]
    Released,
    /// This process does not know that session.
    #[n(5)]
    Unknown,
}

/// Everything that is said on the control connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Msg {
    // From the source.
    #[n(0)]
    Hello(#[n(0)] Hello),
    /// What the machine is, and how many RAM connections will come.
    #[n(1)]
    Preamble(#[n(0)] Preamble, #[n(1)] u16),
    /// One section of device state.
    #[n(2)]
    Section(#[n(0)] Section),
    /// All sections were sent; how many.
    #[n(3)]
    StateEnd(#[n(0)] u32),
    /// Disk locks are free here: take them and run.
    #[n(4)]
    Go,
    /// The guest is yours: let its output go.
    #[n(5)]
    Release,
    /// It ends here, and why. Never after go.
    #[n(6)]
    Abort(#[n(0)] String),
    /// All is done; no more questions will come.
    #[n(7)]
    Bye,
    /// Frames that came for the guest after it had stopped at the source. After Released.
    #[n(8)]
    Frames(#[n(0)] Vec<LateFrame>),
    // From the destination.
    #[n(32)]
    HelloAck(#[n(0)] HelloAck),
    #[n(33)]
    Accept,
    /// Why the machine does not fit, before any memory moves.
    #[n(34)]
    Refuse(#[n(0)] Vec<String>),
    /// Every page of round .0 is in memory.
    #[n(35)]
    RoundAck(#[n(0)] u64),
    /// All memory and state is loaded. .0: microseconds spent in loading.
    #[n(36)]
    Ready(#[n(0)] u64),
    /// The guest runs with its output held. .0: microseconds spent since go came.
    #[n(37)]
    Running(#[n(0)] u64),
    /// It does not run here and never will (locks are free); why.
    #[n(38)]
    Failed(#[n(0)] String),
    /// The output flows.
    #[n(39)]
    Released,
    #[n(40)]
    Resolution(#[n(0)] Resolution),
}

impl Msg {
    /// The kind in the frame's header.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 0,
            Self::Preamble(..) => 1,
            Self::Section(_) => 2,
            Self::StateEnd(_) => 3,
            Self::Go => 4,
            Self::Release => 5,
            Self::Abort(_) => 6,
            Self::Bye => 7,
            Self::Frames(_) => 8,
            Self::HelloAck(_) => 32,
            Self::Accept => 33,
            Self::Refuse(_) => 34,
            Self::RoundAck(_) => 35,
            Self::Ready(_) => 36,
            Self::Running(_) => 37,
            Self::Failed(_) => 38,
            Self::Released => 39,
            Self::Resolution(_) => 40,
        }
    }

    /// A word for messages to the operator.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Preamble(..) => "preamble",
            Self::Section(_) => "section",
            Self::StateEnd(_) => "end of state",
            Self::Go => "go",
            Self::Release => "release",
            Self::Abort(_) => "abort",
            Self::Bye => "bye",
            Self::Frames(_) => "late frames",
            Self::HelloAck(_) => "hello acknowledgement",
            Self::Accept => "accept",
            Self::Refuse(_) => "refuse",
            Self::RoundAck(_) => "round acknowledgement",
            Self::Ready(_) => "ready",
            Self::Running(_) => "running",
            Self::Failed(_) => "failed",
            Self::Released => "released",
            Self::Resolution(_) => "resolution",
        }
    }

    /// The whole frame.
    ///
    /// # Errors
    /// [`Error::Machine`] when the payload passes its kind's bound.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut frame = vec![0; HEADER];
        minicbor::encode(self, &mut frame)
            .map_err(|e| Error::Machine(format!("cannot encode {}: {e}", self.name())))?;
        let len = frame.len() - HEADER;
        let most = max_payload(self.kind()).unwrap_or(0);
        if len > most {
            return Err(Error::Machine(format!(
                "the {} has {len} bytes, at most {most} can be sent",
                self.name()
            )));
        }
        frame[0..4].copy_from_slice(&MAGIC);
        frame[4..6].copy_from_slice(&self.kind().to_le_bytes());
        frame[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        let crc = checksum(&frame[..12], &frame[HEADER..]);
        frame[12..16].copy_from_slice(&crc.to_le_bytes());
        Ok(frame)
    }

    /// Reads one frame. `None` at a clean end before its first byte.
    ///
    /// # Errors
    /// [`Error::Lost`] when the connection fails, [`Error::Protocol`] for anything malformed.
    pub fn read(from: &mut impl Read) -> Result<Option<Self>> {
        let mut header = [0; HEADER];
        if !read_header(from, &mut header)? {
            return Ok(None);
        }
        let (kind, len) = check_header(&header)?;
        let mut payload = vec![0; len];
        from.read_exact(&mut payload).map_err(lost)?;
        if checksum(&header[..12], &payload).to_le_bytes() != header[12..16] {
            return Err(Error::Protocol("a control frame's checksum is wrong".into()));
        }
        Self::decode(kind, &payload).map(Some)
    }

    fn decode(kind: u16, payload: &[u8]) -> Result<Self> {
        let mut decoder = minicbor::Decoder::new(payload);
        let msg: Self = decoder
            .decode()
            .map_err(|e| Error::Protocol(format!("control frame of kind {kind}: {e}")))?;
        if decoder.position() != payload.len() || msg.kind() != kind {
            return Err(Error::Protocol(format!("control frame of kind {kind} is malformed")));
        }
        Ok(msg.bounded())
    }

    /// Cuts sentences of the peer to a length that can be shown.
    fn bounded(self) -> Self {
        match self {
            Self::Abort(s) => Self::Abort(sentence(s)),
            Self::Failed(s) => Self::Failed(sentence(s)),
            Self::Resolution(Resolution::Failed(s)) => {
                Self::Resolution(Resolution::Failed(sentence(s)))
            }
            Self::Refuse(reasons) => {
                Self::Refuse(reasons.into_iter().take(MAX_REASONS).map(sentence).collect())
            }
            other => other,
        }
    }
}

/// Text from the peer, with control characters and excess length taken out.
fn sentence(s: String) -> String {
    let one_line = |c: char| if c.is_whitespace() { ' ' } else { c };
    s.chars().map(one_line).filter(|c| !c.is_control()).take(MAX_SENTENCE).collect()
}

fn lost(e: std::io::Error) -> Error {
    Error::Lost(format!("the migration's control connection was lost: {e}"))
}

/// Fills `header`; false at an end before the first byte.
fn read_header(from: &mut impl Read, header: &mut [u8; HEADER]) -> Result<bool> {
    let mut have = 0;
    while have < HEADER {
        match from.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(false),
            Ok(0) => return Err(lost(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(lost(e)),
        }
    }
    Ok(true)
}

fn check_header(header: &[u8; HEADER]) -> Result<(u16, usize)> {
    if header[0..4] != MAGIC {
        return Err(Error::Protocol(format!(
            "expected a control frame, found bytes {:02x?} (is the peer a Tern migration?)",
            &header[0..4]
        )));
    }
    let kind = u16::from_le_bytes([header[4], header[5]]);
    let len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    let most = max_payload(kind)
        .ok_or_else(|| Error::Protocol(format!("unknown kind {kind} of control frame")))?;
    if len > most || header[6..8] != [0, 0] {
        return Err(Error::Protocol(format!(
            "a control frame of kind {kind} with {len} bytes; at most {most} are allowed"
        )));
    }
    Ok((kind, len))
}

/// Most payload bytes of `kind`; `None` for unknown ones.
fn max_payload(kind: u16) -> Option<usize> {
    match kind {
        0 | 32 => Some(4 << 10),
        1 | 8 => Some(1 << 20),
        2 => Some(state::section::MAX_SECTION_BYTES + (64 << 10)),
        34 => Some(256 << 10),
        3..=7 | 33 | 35..=40 => Some(16 << 10),
        _ => None,
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn every_message() -> Vec<Msg> {
        let preamble = Preamble {
            machine: "q35-1".into(),
            cpu_model: "host".into(),
            cpuid: vec![(1, 0, 2, 3, 4, 5)],
            vcpus: 2,
            ram: vec![(0, 1 << 20)],
            devices: vec![],
            topology: None,
            numa: None,
        };
        let section =
            Section { name: "rtc".into(), kind: "rtc".into(), version: 1, payload: vec![1, 2] };
        vec![
            Msg::Hello(Hello::new([7; 16], Role::Ram(3))),
            Msg::Preamble(preamble, 1),
            Msg::Section(section),
            Msg::StateEnd(1),
            Msg::Go,
            Msg::Release,
            Msg::Abort("no".into()),
            Msg::Bye,
            Msg::HelloAck(HelloAck { version: 1, capabilities: vec![] }),
            Msg::Accept,
            Msg::Refuse(vec!["a".into(), "b".into()]),
            Msg::RoundAck(9),
            Msg::Ready(1),
            Msg::Running(2),
            Msg::Failed("x".into()),
            Msg::Released,
            Msg::Resolution(Resolution::Failed("y".into())),
        ]
    }

    #[test]
    fn reads_what_it_writes() {
        let mut bytes = Vec::new();
        for m in every_message() {
            bytes.extend(m.encode().unwrap());
        }
        let mut from = &bytes[..];
        for m in every_message() {
            assert_eq!(Msg::read(&mut from), Ok(Some(m)));
        }
        assert_eq!(Msg::read(&mut from), Ok(None));
    }

    #[test]
    fn takes_the_highest_common_version_and_names_both_sides_otherwise() {
        let mut hello = Hello::new([0; 16], Role::Control);
        hello.versions = vec![1, 99];
        assert_eq!(hello.agree().unwrap().version, 1);
        hello.versions = vec![99];
        let e = hello.agree().unwrap_err();
        assert!(e.contains("[99]") && e.contains("[1]"), "{e}");
    }

    proptest! {
        #[test]
        fn a_changed_bit_is_an_error(which in 0usize..17, bit in 0usize..10_000) {
            let m = &every_message()[which];
            let mut bytes = m.encode().unwrap();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Msg::read(&mut &bytes[..]).is_err());
        }

        #[test]
        fn a_cut_frame_is_an_error(which in 0usize..17, at in 0usize..10_000) {
            let bytes = every_message()[which].encode().unwrap();
            let at = 1 + at % (bytes.len() - 1);
            prop_assert!(Msg::read(&mut &bytes[..at]).is_err());
        }

        #[test]
        fn any_payload_under_a_right_header_is_safe(
            kind in 0u16..48, payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut frame = vec![0; HEADER];
            frame[0..4].copy_from_slice(&MAGIC);
            frame[4..6].copy_from_slice(&kind.to_le_bytes());
            frame[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            let crc = checksum(&frame[..12], &payload);
            frame[12..16].copy_from_slice(&crc.to_le_bytes());
            frame.extend(&payload);
            let _ = Msg::read(&mut &frame[..]);
        }
    }
}
