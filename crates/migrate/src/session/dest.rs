//! The receiving side of the protocol.
//!
//! ```text
//!  Start -> Preamble -> Checking -> Preparing -> Receiving -> Loading -> Ready -> Locks -> Starting
//!    any of these: failure, abort, time-out -> discard -> Failed                              |
//!                                                                                             v
//!                                 Released <- (release, or the operator) <--------------- Held
//! ```
//! From Ready on the link may be lost: a source that asks anew gets an answer in every state.

use std::time::Duration;

use state::{Section, Sections};

use super::{ASKED_PATIENCE, HELLO_PATIENCE, STOPPED_PATIENCE};
use crate::wire::{Hello, MAX_RAM_CHANNELS, MAX_STATE_BYTES, Msg, Resolution, Role, SessionId};
use crate::{Error, LateFrame, Preamble, Result};

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A message came on the control connection that is current.
    Msg(Msg),
    /// The control connection ended, or what came on it was malformed.
    ControlLost(Error),
    /// What differs between the source's preamble and this machine.
    Checked(Vec<String>),
    /// The machine is ready to receive.
    Prepared(std::result::Result<(), String>),
    /// All RAM connections delivered all of a round into memory.
    RamSynced { round: u64, last: bool },
    /// A RAM connection failed, or what came on it was malformed.
    RamLost(Error),
    /// The state is loaded. .0: microseconds that it took.
    Loaded(std::result::Result<u64, String>),
    /// The disk locks are held.
    Locked(std::result::Result<(), String>),
    /// The vCPUs run with output held. .0: microseconds since go.
    Started(std::result::Result<u64, String>),
    /// A new control connection asks; it is the current one from now on if the answer is sent.
    Resolve,
    /// [`Dest::patience`] ran out.
    Timeout,
    /// The operator ends it (before go).
    Cancel,
    /// The operator lets a stranded guest go.
    ForceRelease,
}

/// What the driver shall do.
#[derive(Debug, Clone)]
pub enum Output {
    Send(Msg),
    /// Compare: then [`Input::Checked`].
    Check(Box<Preamble>),
    /// Make ready to receive on this many RAM connections: then [`Input::Prepared`].
    Prepare {
        channels: u16,
    },
    /// Load: then [`Input::Loaded`].
    Load(Sections),
    /// Take the disk locks: then [`Input::Locked`].
    AcquireLocks,
    /// Run with output held: then [`Input::Started`].
    RunHeld,
    /// Let output go. The migration is complete.
    ReleaseOutput,
    /// Give the guest frames that came to the source after it had stopped there.
    Deliver(Vec<LateFrame>),
    /// This machine never runs; its locks are free afterwards.
    Discard,
    /// The guest runs held here and the source cannot be heard: tell the operator.
    Stranded,
    /// It is over, though questions may still come and be answered.
    End(Result<()>),
    /// No more questions will come.
    Close,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Start,
    Preamble,
    Checking,
    Preparing,
    Receiving,
    Loading,
    Ready,
    Locks,
    Starting,
    Held,
    Released,
    Failed(String),
}

/// The receiving side.
#[derive(Debug)]
pub struct Dest {
    state: State,
    session: SessionId,
    link: bool,
    channels: u16,
    round: u64,
    ram_done: bool,
    sections: Vec<Section>,
    bytes: usize,
    state_done: bool,
    stranded: bool,
    was_ready: bool,
}

impl Default for Dest {
    fn default() -> Self {
        Self {
            state: State::Start,
            session: [0; 16],
            link: true,
            channels: 0,
            round: 0,
            ram_done: false,
            sections: Vec::new(),
            bytes: 0,
            state_done: false,
            stranded: false,
            was_ready: false,
        }
    }
}

impl Dest {
    /// A session that waits for a source's greeting.
    pub fn new() -> Self {
        Self::default()
    }

    /// The migration that it belongs to, once greeted.
    pub fn session(&self) -> Option<SessionId> {
        (self.state != State::Start).then_some(self.session)
    }

    /// How long this state may last before [`Input::Timeout`] is due.
    pub fn patience(&self) -> Option<Duration> {
        match self.state {
            State::Start | State::Preamble => Some(HELLO_PATIENCE),
            State::Ready if self.link => Some(STOPPED_PATIENCE),
            State::Ready | State::Failed(_) => Some(ASKED_PATIENCE),
            State::Held if !self.stranded => Some(ASKED_PATIENCE),
            // A released one answers until it hears that no more questions will come: if it went
            // away earlier, a source that missed its answer would take its process for dead.
            _ => None,
        }
    }

    /// Whether the source has said what machine it has.
    pub fn has_preamble(&self) -> bool {
        self.channels > 0
    }

    /// Whether memory may have been written.
    pub fn receiving(&self) -> bool {
        !matches!(self.state, State::Start | State::Preamble | State::Checking)
    }

    /// Whether the source may have sent go, and so may ask again how this side stands.
    pub fn may_be_asked(&self) -> bool {
        self.was_ready
    }

    /// Takes in what happened; says what to do.
    pub fn step(&mut self, input: Input) -> Vec<Output> {
        if let Input::Resolve = input {
            return self.resolve();
        }
        match self.state {
            State::Released | State::Failed(_) => self.over(input),
            State::Ready => self.ready(input),
            State::Locks | State::Starting | State::Held => self.gone(input),
            _ => self.before_ready(input),
        }
    }

    fn before_ready(&mut self, input: Input) -> Vec<Output> {
        match (&self.state, input) {
            (_, Input::Cancel) => self.fail(Error::Cancelled),
            (_, Input::Msg(Msg::Abort(why))) => self.discard(Error::Peer(why)),
            (_, Input::ControlLost(e) | Input::RamLost(e)) => self.fail(e),
            (_, Input::Timeout) => {
                self.fail(Error::Lost("the source did not go on in time".into()))
            }
            (State::Start, Input::Msg(Msg::Hello(hello))) => self.hello(&hello),
            (State::Preamble, Input::Msg(Msg::Preamble(p, channels))) => {
                if channels == 0 || channels > MAX_RAM_CHANNELS {
                    return self.fail(Error::Protocol(format!(
                        "{channels} memory connections; expected 1 to {MAX_RAM_CHANNELS}"
                    )));
                }
                self.state = State::Checking;
                self.channels = channels;
                vec![Output::Check(Box::new(p))]
            }
            (State::Checking, Input::Checked(why)) if !why.is_empty() => self.refuse(why),
            (State::Checking, Input::Checked(_)) => {
                self.state = State::Preparing;
                vec![Output::Prepare { channels: self.channels }]
            }
            (State::Preparing, Input::Prepared(Ok(()))) => {
                self.state = State::Receiving;
                vec![Output::Send(Msg::Accept)]
            }
            (State::Preparing, Input::Prepared(Err(e))) => self.fail(Error::Machine(e)),
            (State::Receiving, Input::RamSynced { round, last }) => self.synced(round, last),
            (State::Receiving, Input::Msg(Msg::Section(s))) if !self.state_done => self.section(s),
            (State::Receiving, Input::Msg(Msg::StateEnd(count))) if !self.state_done => {
                if count as usize != self.sections.len() {
                    let have = self.sections.len();
                    return self.fail(Error::Protocol(format!(
                        "{count} sections were announced and {have} came"
                    )));
                }
                self.state_done = true;
                self.load()
            }
            (State::Loading, Input::Loaded(Ok(us))) => {
                self.state = State::Ready;
                self.was_ready = true;
                vec![Output::Send(Msg::Ready(us))]
            }
            (State::Loading, Input::Loaded(Err(e))) => self.fail(Error::Machine(e)),
            (_, Input::Msg(m)) => self.fail(unexpected(&m)),
            _ => vec![],
        }
    }

    fn hello(&mut self, hello: &Hello) -> Vec<Output> {
        if hello.role != Role::Control {
            return self.fail(Error::Protocol("the first connection is not the control's".into()));
        }
        match hello.agree() {
            Ok(ack) => {
                self.session = hello.session;
                self.state = State::Preamble;
                vec![Output::Send(Msg::HelloAck(ack))]
            }
            Err(why) => self.refuse(vec![why]),
        }
    }

    fn refuse(&mut self, why: Vec<String>) -> Vec<Output> {
        self.state = State::Failed(why.join("; "));
        let end = Output::End(Err(Error::Refused(why.clone())));
        vec![Output::Send(Msg::Refuse(why)), Output::Discard, end]
    }

    fn synced(&mut self, round: u64, last: bool) -> Vec<Output> {
        if round != self.round + 1 || self.ram_done {
            let want = self.round + 1;
            return self.fail(Error::Protocol(format!("round {round} came instead of {want}")));
        }
        self.round = round;
        if last {
            self.ram_done = true;
            return self.load();
        }
        vec![Output::Send(Msg::RoundAck(round))]
    }

    fn section(&mut self, section: Section) -> Vec<Output> {
        self.bytes += section.payload.len() + section.name.len() + section.kind.len();
        if self.bytes > MAX_STATE_BYTES || self.sections.len() >= state::section::MAX_SECTIONS {
            return self.fail(Error::Protocol("the device state is larger than allowed".into()));
        }
        self.sections.push(section);
        vec![]
    }

    fn load(&mut self) -> Vec<Output> {
        if !(self.ram_done && self.state_done) {
            return vec![];
        }
        self.state = State::Loading;
        vec![Output::Load(Sections(std::mem::take(&mut self.sections)))]
    }

    /// Everything is here; go has not come.
    fn ready(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::Msg(Msg::Go) => {
                self.state = State::Locks;
                vec![Output::AcquireLocks]
            }
            Input::Msg(Msg::Abort(why)) => self.discard(Error::Peer(why)),
            Input::Cancel => self.fail(Error::Cancelled),
            Input::ControlLost(_) => {
                self.link = false;
                vec![]
            }
            Input::Timeout if self.link => {
                self.link = false;
                vec![]
            }
            Input::Timeout => self.discard(Error::Lost(
                "the source was lost before go and did not come back; the guest is not run here"
                    .into(),
            )),
            Input::Msg(m) => self.fail(unexpected(&m)),
            _ => vec![],
        }
    }

    /// After go.
    fn gone(&mut self, input: Input) -> Vec<Output> {
        match (&self.state, input) {
            (State::Locks, Input::Locked(Ok(()))) => {
                self.state = State::Starting;
                vec![Output::RunHeld]
            }
            (State::Locks, Input::Locked(Err(e))) | (State::Starting, Input::Started(Err(e))) => {
                self.cannot_run(e)
            }
            (State::Starting, Input::Started(Ok(us))) => {
                self.state = State::Held;
                vec![Output::Send(Msg::Running(us))]
            }
            (State::Held, Input::Msg(Msg::Release)) => {
                self.state = State::Released;
                self.link = true;
                vec![Output::ReleaseOutput, Output::Send(Msg::Released), Output::End(Ok(()))]
            }
            (State::Held, Input::ForceRelease) if self.stranded => {
                self.state = State::Released;
                vec![Output::ReleaseOutput, Output::End(Ok(()))]
            }
            (State::Held, Input::Timeout) if !self.stranded => {
                self.stranded = true;
                vec![Output::Stranded]
            }
            (_, Input::ControlLost(_)) => {
                self.link = false;
                vec![]
            }
            _ => vec![],
        }
    }

    /// Nothing changes any more; questions are still answered.
    fn over(&mut self, input: Input) -> Vec<Output> {
        match (&self.state, input) {
            (State::Released, Input::Msg(Msg::Release)) => vec![Output::Send(Msg::Released)],
            (State::Released, Input::Msg(Msg::Frames(frames))) => vec![Output::Deliver(frames)],
            (State::Failed(why), Input::Msg(Msg::Go)) => {
                vec![Output::Send(Msg::Failed(why.clone()))]
            }
            (_, Input::Msg(Msg::Bye) | Input::Timeout) => vec![Output::Close],
            _ => vec![],
        }
    }

    fn resolve(&mut self) -> Vec<Output> {
        let answer = match &self.state {
            State::Ready => Resolution::NotGone,
            State::Locks | State::Starting => Resolution::Going,
            State::Held => Resolution::Running,
            State::Released => Resolution::Released,
            State::Failed(why) => Resolution::Failed(why.clone()),
            // The source asks only after go, and go comes only after ready.
            _ => return vec![],
        };
        self.link = true;
        self.stranded = false;
        vec![Output::Send(Msg::Resolution(answer))]
    }

    /// Locks or vCPUs would not: the guest is the source's, and the locks must be free before it
    /// hears so.
    fn cannot_run(&mut self, why: String) -> Vec<Output> {
        self.state = State::Failed(why.clone());
        let end = Output::End(Err(Error::Machine(why.clone())));
        vec![Output::Discard, Output::Send(Msg::Failed(why)), end]
    }

    /// Ends before go, and tells the source.
    fn fail(&mut self, why: Error) -> Vec<Output> {
        let mut out = self.discard(why.clone());
        let told = if self.round > 0 || self.state_done || self.channels > 0 {
            Msg::Abort(why.to_string())
        } else {
            Msg::Refuse(vec![why.to_string()])
        };
        out.insert(0, Output::Send(told));
        out
    }

    /// Ends before go.
    fn discard(&mut self, why: Error) -> Vec<Output> {
        self.state = State::Failed(why.to_string());
        vec![Output::Discard, Output::End(Err(why))]
    }
}

fn unexpected(m: &Msg) -> Error {
    Error::Protocol(format!("the source sent '{}' out of order", m.name()))
}
