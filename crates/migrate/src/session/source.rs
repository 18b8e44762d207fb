//! The sending side of the protocol.
//!
//! ```text
//!  Start -> Hello -> Preamble -> Ram -> Round <-> Planning -> Quiescing -> Final -> Locks -> Going
//!    any of these: failure or cancel -> (resume if stopped) -> Ended            no way back |
//!                                                                                           v
//!                Ended(handed over) <- Releasing <------------------------ Running ---------+
//!                Ended(resumed)     <- Failed, or the destination's process is gone --------+
//!                in doubt (told to be failed, stays paused, goes on asking) <- no answer in time
//!                    an answer: as above; gone, or the operator insists: Ended(unknown)
//! ```
//! Going and Releasing have a link that is up, down (being connected again), or asking.

use std::time::Duration;

use state::Sections;

use super::{
    ASK_AGAIN, HELLO_PATIENCE, LAST_ASK, PREPARE_PATIENCE, RESOLVE_PATIENCE, STOPPED_PATIENCE,
};
use crate::wire::{Hello, MAX_STATE_BYTES, Msg, Resolution, Role, SessionId};
use crate::{Error, Preamble, Result};

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// The first control connection is up.
    Connected,
    /// A message came on the control connection that is current.
    Msg(Msg),
    /// The control connection ended, or what came on it was malformed.
    ControlLost(Error),
    /// The RAM connections are up.
    RamUp,
    /// A RAM connection failed.
    RamLost(Error),
    /// All of the round, its end mark included, was written.
    RoundSent,
    /// What the planner says after a round.
    Plan(Plan),
    /// The machine stands still, or would not.
    Quiesced(std::result::Result<(), String>),
    /// The machine's state.
    Saved(std::result::Result<Sections, String>),
    /// The disk locks are free.
    LocksReleased(std::result::Result<(), String>),
    /// A new control connection to the same address is up.
    Reconnected,
    /// The address refuses connections: the destination's process is gone.
    Gone,
    /// [`Source::patience`] ran out.
    Timeout,
    /// The machine at this end failed (reading dirty logs).
    MachineFailed(String),
    /// The operator wants it to end.
    Cancel,
    /// The operator wants the guest here, while it is in doubt where it is.
    Insist,
}

/// What the planner wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// One more round while the guest runs.
    Again,
    /// Stop the guest and finish.
    Switch,
}

/// What the driver shall do.
#[derive(Debug, Clone)]
pub enum Output {
    Send(Msg),
    /// Connect the RAM channels: then [`Input::RamUp`] or [`Input::RamLost`].
    OpenRam,
    /// Send every pending page as round .0; `last` when the guest stands still. Returns at once;
    /// [`Input::RoundSent`] comes when it is written.
    Round {
        number: u64,
        last: bool,
    },
    /// The round was acknowledged: its pages are clean unless dirtied again.
    Acked,
    /// Ask the planner: then [`Input::Plan`].
    Plan,
    /// Stop the machine: then [`Input::Quiesced`].
    Quiesce,
    /// Save the machine: then [`Input::Saved`].
    Save,
    /// Send what came for the guest since it stopped here.
    ForwardFrames,
    /// Give up the disk locks: then [`Input::LocksReleased`].
    ReleaseLocks,
    /// Connect the control channel again: within [`RESOLVE_PATIENCE`] of the first loss, in doubt
    /// for as long as it takes, within [`LAST_ASK`] if the operator insists. Then
    /// [`Input::Reconnected`], [`Input::Gone`] or [`Input::Timeout`]; in doubt [`Input::Insist`]
    /// may end it.
    Reconnect,
    /// Tell the operator why it is not known where the guest is. It is asked on.
    Doubt(Error),
    /// Let the machine go on here.
    Resume,
    /// The machine is the other side's for good.
    HandOver,
    /// It is over.
    End(Result<()>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    Down,
    Asking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Hello,
    Preamble,
    Ram,
    Round { number: u64, sent: bool, acked: bool },
    Planning { next: u64 },
    Quiescing { next: u64 },
    Final { ram: bool, saved: bool },
    Locks,
    Going(Link),
    Releasing(Link),
    Ended,
}

/// The sending side.
#[derive(Debug)]
pub struct Source {
    state: State,
    session: SessionId,
    preamble: Option<Preamble>,
    channels: u16,
    stopped: bool,
    losses: u32,
    /// The destination could not be asked in time, and the operator knows.
    doubt: bool,
    /// The operator wants the guest here unless the destination says at once that it has it.
    insisted: bool,
}

const GOING_DOUBT: &str = "the connection was lost at the hand-over and the destination does not \
    say whether the guest runs there. The guest stays paused here. Only if it does not run there, \
    let it go on here with cont";
const RELEASING_DOUBT: &str = "the guest was handed over, but the destination did not confirm that \
    it lets the guest's output out, and does not answer. The guest never runs here again by \
    itself; look at the destination. Only if it certainly does not run there, let it go on here, \
    from where it was stopped, with cont";

/// Losses of the control connection after go that are borne before it is in doubt.
const MAX_LOSSES: u32 = 16;
/// The same once the operator insists.
const LAST_LOSSES: u32 = 3;

impl Source {
    /// A session that will send `preamble` and use `channels` RAM connections.
    pub fn new(session: SessionId, preamble: Preamble, channels: u16) -> Self {
        let preamble = Some(preamble);
        Self {
            state: State::Start,
            session,
            preamble,
            channels,
            stopped: false,
            losses: 0,
            doubt: false,
            insisted: false,
        }
    }

    /// How long this state may last before [`Input::Timeout`] is due.
    pub fn patience(&self) -> Option<Duration> {
        match self.state {
            State::Hello | State::Ram => Some(HELLO_PATIENCE),
            State::Preamble => Some(PREPARE_PATIENCE),
            State::Final { .. } => Some(STOPPED_PATIENCE),
            State::Going(Link::Asking) | State::Releasing(Link::Asking) if self.insisted => {
                Some(LAST_ASK)
            }
            State::Going(Link::Asking) | State::Releasing(Link::Asking) if self.doubt => {
                Some(ASK_AGAIN)
            }
            State::Going(_) | State::Releasing(_) => Some(RESOLVE_PATIENCE),
            _ => None,
        }
    }

    /// Whether it is not known where the guest is, though it is still asked.
    pub fn in_doubt(&self) -> bool {
        self.doubt && !self.ended()
    }

    /// Whether go was sent: from then on it cannot be cancelled.
    pub fn past_go(&self) -> bool {
        matches!(self.state, State::Going(_) | State::Releasing(_))
    }

    /// Whether it is over.
    pub fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether the operator wants the guest here.
    pub fn is_insisted(&self) -> bool {
        self.insisted
    }

    /// Takes in what happened; says what to do.
    pub fn step(&mut self, input: Input) -> Vec<Output> {
        match self.state {
            State::Ended => vec![],
            State::Going(link) => self.going(link, input),
            State::Releasing(link) => self.releasing(link, input),
            _ => self.before_go(input),
        }
    }

    fn before_go(&mut self, input: Input) -> Vec<Output> {
        match (self.state, input) {
            (_, Input::Cancel) => self.abort(Error::Cancelled),
            (_, Input::ControlLost(e) | Input::RamLost(e)) => self.abort(e),
            (_, Input::MachineFailed(e)) => self.abort(Error::Machine(e)),
            (_, Input::Timeout) => self.abort(self.timeout()),
            (_, Input::Msg(Msg::Abort(why) | Msg::Failed(why))) => self.abort(Error::Peer(why)),
            (State::Hello | State::Preamble, Input::Msg(Msg::Refuse(why))) => {
                self.abort(Error::Refused(why))
            }
            (State::Start, Input::Connected) => {
                self.state = State::Hello;
                vec![Output::Send(Msg::Hello(Hello::new(self.session, Role::Control)))]
            }
            (State::Hello, Input::Msg(Msg::HelloAck(_))) => self.send_preamble(),
            (State::Preamble, Input::Msg(Msg::Accept)) => {
                self.state = State::Ram;
                vec![Output::OpenRam]
            }
            (State::Ram, Input::RamUp) => self.round(1),
            (State::Round { number, acked, .. }, Input::RoundSent) => {
                self.round_part(number, true, acked)
            }
            (State::Round { number, sent, acked: false }, Input::Msg(Msg::RoundAck(n)))
                if n == number =>
            {
                self.round_part(number, sent, true)
            }
            (State::Planning { next }, Input::Plan(Plan::Again)) => self.round(next),
            (State::Planning { next }, Input::Plan(Plan::Switch)) => {
                self.state = State::Quiescing { next };
                self.stopped = true;
                vec![Output::Quiesce]
            }
            (State::Quiescing { next }, Input::Quiesced(Ok(()))) => {
                self.state = State::Final { ram: false, saved: false };
                vec![Output::Round { number: next, last: true }, Output::Save]
            }
            (State::Quiescing { .. }, Input::Quiesced(Err(e))) => self.abort(Error::Machine(e)),
            (State::Final { saved, .. }, Input::RoundSent) => {
                self.state = State::Final { ram: true, saved };
                vec![]
            }
            (State::Final { ram, .. }, Input::Saved(Ok(sections))) => {
                self.state = State::Final { ram, saved: true };
                self.send_state(sections)
            }
            (State::Final { .. }, Input::Saved(Err(e))) => self.abort(Error::Machine(e)),
            // Ready can overtake our own RoundSent, for the peer has read before we looked.
            (State::Final { saved: true, .. }, Input::Msg(Msg::Ready(_))) => {
                self.state = State::Locks;
                vec![Output::Acked, Output::ReleaseLocks]
            }
            (State::Locks, Input::LocksReleased(Ok(()))) => {
                self.state = State::Going(Link::Up);
                vec![Output::Send(Msg::Go)]
            }
            (State::Locks, Input::LocksReleased(Err(e))) => self.abort(Error::Machine(e)),
            (State::Locks, Input::RoundSent) => vec![],
            (_, Input::Msg(m)) => self.abort(unexpected(&m)),
            _ => vec![],
        }
    }

    fn send_preamble(&mut self) -> Vec<Output> {
        self.state = State::Preamble;
        let preamble = self.preamble.take();
        preamble.map(|p| vec![Output::Send(Msg::Preamble(p, self.channels))]).unwrap_or_default()
    }

    fn round(&mut self, number: u64) -> Vec<Output> {
        self.state = State::Round { number, sent: false, acked: false };
        vec![Output::Round { number, last: false }]
    }

    fn round_part(&mut self, number: u64, sent: bool, acked: bool) -> Vec<Output> {
        if sent && acked {
            self.state = State::Planning { next: number + 1 };
            return vec![Output::Acked, Output::Plan];
        }
        self.state = State::Round { number, sent, acked };
        vec![]
    }

    fn send_state(&mut self, sections: Sections) -> Vec<Output> {
        let bytes: usize = sections.0.iter().map(|s| s.payload.len() + s.name.len()).sum();
        if bytes > MAX_STATE_BYTES || sections.0.len() > state::section::MAX_SECTIONS {
            return self.abort(Error::Machine(format!(
                "the device state has {} sections with {bytes} bytes; at most {} and \
                 {MAX_STATE_BYTES} can be sent",
                sections.0.len(),
                state::section::MAX_SECTIONS
            )));
        }
        let count = sections.0.len() as u32;
        let mut out: Vec<_> =
            sections.0.into_iter().map(|s| Output::Send(Msg::Section(s))).collect();
        out.push(Output::Send(Msg::StateEnd(count)));
        out
    }

    fn timeout(&self) -> Error {
        let what = match self.state {
            State::Hello => "answer the greeting",
            State::Preamble => "say whether this machine fits",
            State::Ram => "take the memory connections",
            _ => "take over the last pages and the device state",
        };
        let seconds = self.patience().unwrap_or_default().as_secs();
        Error::Lost(format!("the destination did not {what} within {seconds} s"))
    }

    /// Ends before go: the guest stays here.
    fn abort(&mut self, why: Error) -> Vec<Output> {
        let told = matches!(why, Error::Peer(_) | Error::Refused(_)) || self.state == State::Start;
        self.state = State::Ended;
        let mut out = Vec::new();
        if self.stopped {
            out.push(Output::Resume);
        }
        if !told {
            out.push(Output::Send(Msg::Abort(why.to_string())));
        }
        out.push(Output::End(Err(why)));
        out
    }

    fn going(&mut self, link: Link, input: Input) -> Vec<Output> {
        match (link, input) {
            (Link::Up, Input::Msg(Msg::Running(_)))
            | (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Running))) => {
                self.state = State::Releasing(Link::Up);
                vec![Output::HandOver, Output::Send(Msg::Release)]
            }
            // The operator there has let it go, as only one may whose source is in doubt.
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Released))) => self.handed_over(),
            // A destination that aborts has discarded its machine: go changes nothing there.
            (Link::Up, Input::Msg(Msg::Failed(why) | Msg::Abort(why)))
            | (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Failed(why)))) => {
                self.take_back(Error::Peer(why))
            }
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::NotGone))) if self.insisted => {
                let why = Error::Cancelled;
                let mut out = vec![Output::Send(Msg::Abort(why.to_string()))];
                out.extend(self.take_back(why));
                out
            }
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::NotGone))) => {
                self.state = State::Going(Link::Up);
                vec![Output::Send(Msg::Go)]
            }
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Going))) => {
                self.state = State::Going(Link::Up);
                vec![]
            }
            (Link::Down, Input::Reconnected) => {
                self.state = State::Going(Link::Asking);
                self.ask()
            }
            // In doubt its operator may have let the guest go before the process ended.
            (Link::Down, Input::Gone) if !self.doubt => self.take_back(Error::Lost(
                "the destination's process ended before the guest was handed over; the guest \
                 goes on here"
                    .into(),
            )),
            (Link::Down, Input::Gone) => self.unknown(
                "the connection was lost at the hand-over, and the destination's process has \
                 ended without an answer. The guest stays paused here. If nobody let it go on \
                 there meanwhile, let it go on here with cont",
            ),
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Unknown))) => {
                self.unknown(GOING_DOUBT)
            }
            (Link::Down | Link::Asking, Input::Timeout) => {
                self.unanswered(State::Going(Link::Down), GOING_DOUBT)
            }
            (_, Input::Insist) => self.insist(link, State::Going(Link::Down)),
            (Link::Up, Input::Timeout)
            | (Link::Up | Link::Asking, Input::ControlLost(_) | Input::Msg(_)) => {
                self.lost(State::Going(Link::Down), GOING_DOUBT)
            }
            _ => vec![],
        }
    }

    fn releasing(&mut self, link: Link, input: Input) -> Vec<Output> {
        match (link, input) {
            (Link::Up, Input::Msg(Msg::Released))
            | (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Released))) => {
                self.handed_over()
            }
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Running))) => {
                self.state = State::Releasing(Link::Up);
                vec![Output::Send(Msg::Release)]
            }
            (Link::Down, Input::Reconnected) => {
                self.state = State::Releasing(Link::Asking);
                self.ask()
            }
            (Link::Down, Input::Gone) => self.unknown(
                "the guest was handed over, but the destination's process ended before it \
                 confirmed that the guest's output flows. The guest runs nowhere now, and not \
                 here by itself, for it may have written to its disks there. If that is borne, \
                 let it go on here, from where it was stopped, with cont",
            ),
            (Link::Asking, Input::Msg(Msg::Resolution(Resolution::Unknown))) => {
                self.unknown(RELEASING_DOUBT)
            }
            (Link::Down | Link::Asking, Input::Timeout) => {
                self.unanswered(State::Releasing(Link::Down), RELEASING_DOUBT)
            }
            (_, Input::Insist) => self.insist(link, State::Releasing(Link::Down)),
            (Link::Up, Input::Timeout)
            | (Link::Up | Link::Asking, Input::ControlLost(_) | Input::Msg(_)) => {
                self.lost(State::Releasing(Link::Down), RELEASING_DOUBT)
            }
            _ => vec![],
        }
    }

    /// The guest runs there, and its output flows.
    fn handed_over(&mut self) -> Vec<Output> {
        self.state = State::Ended;
        // Said again, for a doubt has kept the last word for the operator.
        let mut out = if self.doubt { vec![Output::HandOver] } else { vec![] };
        out.extend([Output::ForwardFrames, Output::Send(Msg::Bye), Output::End(Ok(()))]);
        out
    }

    fn ask(&self) -> Vec<Output> {
        vec![Output::Send(Msg::Hello(Hello::new(self.session, Role::Resolve)))]
    }

    /// The control connection is of no use any more: a new one.
    fn lost(&mut self, down: State, doubt: &str) -> Vec<Output> {
        self.losses += 1;
        if self.losses > MAX_LOSSES {
            return self.unanswered(down, doubt);
        }
        self.state = down;
        vec![Output::Reconnect]
    }

    /// No answer can be had for now. One that is asked for longer than an operator waits is in
    /// doubt, but asked on: it may only be stopped, or out of reach for a while.
    fn unanswered(&mut self, down: State, doubt: &str) -> Vec<Output> {
        if self.insisted {
            return self.unknown(doubt);
        }
        self.state = down;
        self.losses = 0;
        let mut out = vec![Output::Reconnect];
        if !self.doubt {
            self.doubt = true;
            out.insert(0, Output::Doubt(Error::Unknown(doubt.into())));
        }
        out
    }

    /// The operator wants the guest here: the destination is asked once more, on a new connection
    /// unless it has just answered on this one.
    fn insist(&mut self, link: Link, down: State) -> Vec<Output> {
        if !self.doubt || self.insisted {
            return vec![];
        }
        self.insisted = true;
        self.losses = MAX_LOSSES - LAST_LOSSES;
        if link == Link::Up {
            return vec![];
        }
        self.state = down;
        vec![Output::Reconnect]
    }

    fn take_back(&mut self, why: Error) -> Vec<Output> {
        self.state = State::Ended;
        vec![Output::Resume, Output::End(Err(why))]
    }

    fn unknown(&mut self, why: &str) -> Vec<Output> {
        self.state = State::Ended;
        vec![Output::End(Err(Error::Unknown(why.into())))]
    }
}

fn unexpected(m: &Msg) -> Error {
    Error::Protocol(format!("the destination sent '{}' out of order", m.name()))
}
