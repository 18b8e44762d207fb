//! Both sessions in one small world with a network that cuts, machines that can fail, and a lock
//! that only one can hold. Every message is cut in every way.

use std::collections::VecDeque;

use proptest::prelude::*;
use state::{Section, Sections};

use super::{Dest, Source, dest, source};
use crate::wire::{Msg, Resolution, Role};
use crate::{Error, Preamble};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Src,
    Dst,
}

/// What goes wrong, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Everything in flight is lost.
    Cut,
    /// What was under way to the destination still arrives.
    CutAfterToDst,
    /// What was under way to the source still arrives.
    CutAfterToSrc,
    /// Only the source notices at once; the destination hears nothing any more.
    HalfOpen,
    RamCut,
    DestDies,
    Cancel,
    DestCancel,
    /// The destination's patience runs out, however early: the two sides' clocks are their own.
    DestTimeout,
    /// No new connection can be made from now on, or can be again.
    Unreachable,
    Reachable,
    /// The source's operator says cont.
    Insist,
    /// The destination's operator says cont, after the source said that it is in doubt.
    DestRelease,
}

const FAULTS: [Fault; 13] = [
    Fault::Cut,
    Fault::CutAfterToDst,
    Fault::CutAfterToSrc,
    Fault::HalfOpen,
    Fault::RamCut,
    Fault::DestDies,
    Fault::Cancel,
    Fault::DestCancel,
    Fault::DestTimeout,
    Fault::Unreachable,
    Fault::Reachable,
    Fault::Insist,
    Fault::DestRelease,
];

/// What cannot be done, all the time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Broken {
    refuse: bool,
    prepare: bool,
    quiesce: bool,
    save: bool,
    load: bool,
    release_locks: bool,
    locks: bool,
    start: bool,
    /// No new connection can be made.
    unreachable: bool,
}

#[derive(Debug, Default)]
struct Machine {
    running: bool,
    output: bool,
    discarded: bool,
}

struct World {
    src: Source,
    dst: Dest,
    alive: bool,
    /// The destination listens no more: a new connection is refused.
    closed: bool,
    broken: Broken,
    connected: bool,
    to_dst: VecDeque<Msg>,
    to_src: VecDeque<Msg>,
    src_in: VecDeque<source::Input>,
    dst_in: VecDeque<dest::Input>,
    locks: Option<Side>,
    s: Machine,
    d: Machine,
    /// The source may not run again.
    handed_over: bool,
    rounds: u64,
    src_end: Option<crate::Result<()>>,
    src_doubt: Option<Error>,
    insisted: bool,
    /// The source's driver is inside of connecting again.
    connecting: bool,
    dst_end: Option<crate::Result<()>>,
    stranded: bool,
    resume_failed: bool,
    ever_visible_at_dst: bool,
}

fn preamble() -> Preamble {
    Preamble {
        machine: "q35-1".into(),
        cpu_model: "host".into(),
        cpuid: vec![],
        vcpus: 1,
        ram: vec![],
        devices: vec![],
        topology: None,
        numa: None,
    }
}

impl World {
    fn new(broken: Broken) -> Self {
        let mut w = Self {
            src: Source::new([1; 16], preamble(), 1),
            dst: Dest::new(),
            alive: true,
            closed: false,
            broken,
            connected: true,
            to_dst: VecDeque::new(),
            to_src: VecDeque::new(),
            src_in: VecDeque::new(),
            dst_in: VecDeque::new(),
            locks: Some(Side::Src),
            s: Machine { running: true, output: true, discarded: false },
            d: Machine::default(),
            handed_over: false,
            rounds: 0,
            src_end: None,
            src_doubt: None,
            insisted: false,
            connecting: false,
            dst_end: None,
            stranded: false,
            resume_failed: false,
            ever_visible_at_dst: false,
        };
        w.src_in.push_back(source::Input::Connected);
        w
    }

    /// Does one thing that can happen now, the `pick`th of them; false if nothing can.
    fn tick(&mut self, pick: usize) -> bool {
        let can = [
            !self.src_in.is_empty(),
            !self.dst_in.is_empty(),
            !self.to_dst.is_empty(),
            !self.to_src.is_empty(),
        ];
        let ready: Vec<usize> = (0..4).filter(|i| can[*i]).collect();
        if ready.is_empty() {
            return false;
        }
        match ready[pick % ready.len()] {
            0 => {
                let input = self.src_in.pop_front().unwrap();
                self.src_step(input);
            }
            1 => {
                let input = self.dst_in.pop_front().unwrap();
                self.dst_step(input);
            }
            2 => {
                let m = self.to_dst.pop_front().unwrap();
                self.deliver_to_dst(m);
            }
            _ => {
                let m = self.to_src.pop_front().unwrap();
                self.src_step(source::Input::Msg(m));
            }
        }
        self.check();
        true
    }

    fn deliver_to_dst(&mut self, m: Msg) {
        if !self.alive {
            return;
        }
        match m {
            // As its driver answers for one who cannot have been told go.
            Msg::Hello(h) if h.role == Role::Resolve && !self.dst.may_be_asked() => {
                self.to_src.push_back(Msg::Resolution(Resolution::Unknown));
            }
            Msg::Hello(h) if h.role == Role::Resolve => {
                // The driver replaces the link: what the old one still had to say is dropped.
                self.dst_in.retain(|i| !matches!(i, dest::Input::ControlLost(_)));
                self.dst_step(dest::Input::Resolve);
            }
            m => self.dst_step(dest::Input::Msg(m)),
        }
    }

    fn src_step(&mut self, input: source::Input) {
        for out in self.src.step(input) {
            self.src_do(out);
        }
    }

    fn src_do(&mut self, out: source::Output) {
        use source::{Input, Output, Plan};
        let fail = |broken: bool| if broken { Err("broken".to_owned()) } else { Ok(()) };
        let input = match out {
            Output::Send(m) => {
                if self.connected {
                    self.to_dst.push_back(m);
                }
                return;
            }
            Output::OpenRam => Input::RamUp,
            Output::Round { number, last } => {
                self.rounds = number;
                if self.alive {
                    self.dst_in.push_back(dest::Input::RamSynced { round: number, last });
                }
                Input::RoundSent
            }
            Output::Acked => return,
            Output::Plan => Input::Plan(if self.rounds >= 2 { Plan::Switch } else { Plan::Again }),
            Output::Quiesce => {
                if !self.broken.quiesce {
                    (self.s.running, self.s.output) = (false, false);
                }
                Input::Quiesced(fail(self.broken.quiesce))
            }
            Output::Save if self.broken.save => Input::Saved(Err("broken".into())),
            Output::Save => {
                let s = |n: &str| Section {
                    name: n.into(),
                    kind: "k".into(),
                    version: 1,
                    payload: vec![1],
                };
                Input::Saved(Ok(Sections(vec![s("a"), s("b")])))
            }
            Output::ReleaseLocks => {
                if !self.broken.release_locks {
                    self.locks = None;
                }
                Input::LocksReleased(fail(self.broken.release_locks))
            }
            Output::ForwardFrames => return,
            Output::Reconnect => {
                self.to_dst.clear();
                self.to_src.clear();
                self.connected = false;
                self.connecting = true;
                return self.connect();
            }
            Output::Resume => {
                assert!(!self.handed_over, "the source resumes after it handed over");
                if self.locks.is_none() || self.locks == Some(Side::Src) {
                    self.locks = Some(Side::Src);
                    (self.s.running, self.s.output) = (true, true);
                } else {
                    self.resume_failed = true;
                }
                return;
            }
            Output::HandOver => {
                self.handed_over = true;
                return;
            }
            Output::Doubt(why) => {
                assert!(self.src_doubt.is_none() && !self.s.running);
                self.src_doubt = Some(why);
                return;
            }
            Output::End(r) => {
                assert!(self.src_end.is_none());
                self.src_end = Some(r);
                return;
            }
        };
        self.src_in.push_back(input);
    }

    /// What becomes of connecting again. In doubt it ends with the way back, or when the operator
    /// insists.
    fn connect(&mut self) {
        use source::Input;
        if !std::mem::take(&mut self.connecting) {
            return;
        }
        let asks = self.src.in_doubt() && !self.src.is_insisted();
        let input = match () {
            () if asks && self.insisted => Input::Insist,
            () if asks && self.broken.unreachable => {
                self.connecting = true;
                return;
            }
            () if self.broken.unreachable => Input::Timeout,
            () if self.alive && !self.closed => {
                self.connected = true;
                Input::Reconnected
            }
            () => Input::Gone,
        };
        self.src_in.push_back(input);
    }

    fn dst_step(&mut self, input: dest::Input) {
        if self.alive {
            for out in self.dst.step(input) {
                self.dst_do(out);
            }
        }
    }

    fn dst_do(&mut self, out: dest::Output) {
        use dest::{Input, Output};
        let fail = |broken: bool| if broken { Err("broken".to_owned()) } else { Ok(1) };
        let input = match out {
            Output::Send(m) => {
                if self.connected {
                    self.to_src.push_back(m);
                }
                return;
            }
            Output::Check(_) => {
                Input::Checked(if self.broken.refuse { vec!["no".into()] } else { vec![] })
            }
            Output::Prepare { .. } => Input::Prepared(fail(self.broken.prepare).map(drop)),
            Output::Load(_) => Input::Loaded(fail(self.broken.load)),
            Output::AcquireLocks => {
                let free = self.locks.is_none() && !self.broken.locks;
                if free {
                    self.locks = Some(Side::Dst);
                }
                Input::Locked(fail(!free).map(drop))
            }
            Output::RunHeld => {
                self.d.running = !self.broken.start;
                Input::Started(fail(self.broken.start))
            }
            Output::Deliver(_) => return,
            Output::ReleaseOutput => {
                assert!(self.d.running);
                self.d.output = true;
                self.ever_visible_at_dst = true;
                return;
            }
            Output::Discard => {
                assert!(!self.d.running, "a machine that runs was discarded");
                self.d.discarded = true;
                self.free_dst_locks();
                return;
            }
            Output::Stranded => {
                self.stranded = true;
                return;
            }
            Output::End(r) => {
                assert!(self.dst_end.is_none());
                self.dst_end = Some(r);
                return;
            }
            Output::Close => {
                self.closed = true;
                return;
            }
        };
        self.dst_in.push_back(input);
    }

    fn free_dst_locks(&mut self) {
        if self.locks == Some(Side::Dst) {
            self.locks = None;
        }
    }

    fn fault(&mut self, fault: Fault) {
        let gone = || Error::Lost("cut".into());
        match fault {
            Fault::Cut => {
                self.to_dst.clear();
                self.to_src.clear();
            }
            Fault::CutAfterToDst => {
                self.to_src.clear();
                while let Some(m) = self.to_dst.pop_front() {
                    self.deliver_to_dst(m);
                }
                self.to_src.clear();
            }
            Fault::CutAfterToSrc | Fault::HalfOpen => {
                self.to_dst.clear();
                if fault == Fault::HalfOpen {
                    self.to_src.clear();
                }
                self.connected = false;
                while let Some(m) = self.to_src.pop_front() {
                    self.src_step(source::Input::Msg(m));
                }
            }
            Fault::RamCut => {
                self.src_in.push_back(source::Input::RamLost(gone()));
                self.dst_in.push_back(dest::Input::RamLost(gone()));
                return;
            }
            Fault::DestDies => {
                self.alive = false;
                self.d.running = false;
                self.d.output = false;
                self.dst_in.clear();
                self.to_dst.clear();
                self.free_dst_locks();
                // What it had said may still arrive.
                self.src_in.push_back(source::Input::ControlLost(gone()));
                self.connected = false;
                return;
            }
            Fault::Cancel => {
                self.src_step(source::Input::Cancel);
                return;
            }
            Fault::DestCancel => {
                self.dst_step(dest::Input::Cancel);
                return;
            }
            Fault::DestTimeout => {
                if self.dst.patience().is_some() {
                    self.dst_step(dest::Input::Timeout);
                }
                return;
            }
            Fault::Unreachable => {
                self.broken.unreachable = true;
                return;
            }
            Fault::Reachable => {
                self.broken.unreachable = false;
                return self.connect();
            }
            Fault::Insist => {
                if !self.src.in_doubt() {
                    return;
                }
                self.insisted = true;
                if !self.connecting {
                    return self.src_in.push_back(source::Input::Insist);
                }
                return self.connect();
            }
            Fault::DestRelease => {
                if self.src_doubt.is_some() {
                    self.dst_step(dest::Input::ForceRelease);
                }
                return;
            }
        }
        self.connected = false;
        self.src_in.push_back(source::Input::ControlLost(gone()));
        if fault != Fault::HalfOpen {
            self.dst_in.push_back(dest::Input::ControlLost(gone()));
        }
        self.check();
    }

    /// Lets everything happen that still can, time-outs included.
    fn settle(&mut self, mut pick: impl FnMut() -> usize) {
        for _ in 0..2_000 {
            if self.tick(pick()) {
                continue;
            }
            // In doubt it asks for ever: at rest while there is no way.
            let src = self.src.patience().is_some() && !self.src.ended() && !self.connecting;
            let dst = self.dst.patience().is_some() && self.alive;
            let dst_over = self.dst_end.is_some() || !self.alive || self.stranded;
            if src {
                self.src_step(source::Input::Timeout);
            } else if dst && !dst_over {
                self.dst_step(dest::Input::Timeout);
            } else if !self.src.ended() && self.src_in.is_empty() && !self.connecting {
                // A round has no time-out: a dead peer shows as a lost connection.
                self.src_step(source::Input::ControlLost(Error::Lost("dead".into())));
            } else if self.dst_end.is_none() && self.alive && !self.stranded {
                self.dst_step(dest::Input::ControlLost(Error::Lost("dead".into())));
            } else {
                return;
            }
            self.check();
        }
        panic!("the world does not come to rest");
    }

    fn check(&self) {
        let (s, d) = (self.s.running && self.s.output, self.d.running && self.d.output);
        assert!(!(s && d), "both run with their output released");
        assert!(!self.s.running || self.locks == Some(Side::Src), "source runs without locks");
        assert!(!self.d.running || self.locks == Some(Side::Dst), "dest runs without locks");
        assert!(!(self.d.running && self.d.discarded));
    }

    fn check_end(&self) {
        self.check();
        let src = self.s.running && self.s.output;
        let dst = self.d.running && self.d.output;
        let doubt = self.src_doubt.clone().map(Err);
        let end = self.src_end.clone().or(doubt).expect("the source knows how it ended");
        let unknown = matches!(end, Err(Error::Unknown(_)));
        if !src && !dst {
            // Nobody runs: only if it is said so, or the destination died with a guest that it
            // had been given.
            let said = unknown || self.resume_failed;
            let died_with_it = !self.alive && self.ever_visible_at_dst;
            assert!(said || died_with_it, "the guest is lost and nobody says so: {end:?}");
        }
        if src {
            assert!(end.is_err() && !self.ever_visible_at_dst);
        }
        if dst {
            assert!(!src && (end.is_ok() || unknown), "{end:?}");
        }
        if self.alive && !self.broken.unreachable && !self.insisted {
            assert!(!self.src.in_doubt(), "it does not ask any more");
            // A destination that gave up during the doubt may be gone before it is asked.
            let gone = self.closed && self.src_doubt.is_some();
            assert!(!unknown || gone, "it could have been asked: {end:?}");
            assert!(src ^ dst || gone, "not exactly one: {end:?}");
        }
    }
}

/// One run: `faults` happen before the given ticks.
fn run(broken: Broken, faults: &[(usize, Fault)], order: usize) -> World {
    let mut w = World::new(broken);
    let mut tick = 0;
    let mut next = 0;
    loop {
        while next < faults.len() && faults[next].0 == tick {
            w.fault(faults[next].1);
            next += 1;
        }
        // Three fixed orders: source first, network first, and a mixture.
        let pick = match order {
            0 => 0,
            1 => 3,
            _ => tick * 7 + tick / 3,
        };
        if !w.tick(pick) {
            break;
        }
        tick += 1;
    }
    w.settle(|| order);
    w.check_end();
    w
}

/// Ticks in an undisturbed run, with a margin.
fn length(order: usize) -> usize {
    let mut w = World::new(Broken::default());
    let mut n = 0;
    while w.tick(match order {
        0 => 0,
        1 => 3,
        _ => n * 7 + n / 3,
    }) {
        n += 1;
    }
    n + 6
}

fn each_broken() -> Vec<Broken> {
    let b = Broken::default();
    vec![
        b,
        Broken { refuse: true, ..b },
        Broken { prepare: true, ..b },
        Broken { quiesce: true, ..b },
        Broken { save: true, ..b },
        Broken { load: true, ..b },
        Broken { release_locks: true, ..b },
        Broken { locks: true, ..b },
        Broken { start: true, ..b },
        Broken { unreachable: true, ..b },
        Broken { locks: true, unreachable: true, ..b },
    ]
}

#[test]
fn without_faults_the_guest_runs_at_the_destination() {
    for order in 0..3 {
        let w = run(Broken::default(), &[], order);
        assert!(w.d.running && w.d.output && w.handed_over);
        assert_eq!(w.src_end, Some(Ok(())));
        assert_eq!(w.dst_end, Some(Ok(())));
        assert_eq!(w.locks, Some(Side::Dst));
    }
}

#[test]
fn what_cannot_be_done_leaves_the_guest_at_the_source() {
    for broken in &each_broken()[1..9] {
        for order in 0..3 {
            let w = run(*broken, &[], order);
            assert!(w.s.running && w.locks == Some(Side::Src), "{broken:?}");
            assert!(w.src_end.as_ref().unwrap().is_err());
        }
    }
}

#[test]
fn one_fault_at_every_moment() {
    for broken in each_broken() {
        for order in 0..3 {
            for at in 0..length(order) {
                for fault in FAULTS {
                    run(broken, &[(at, fault)], order);
                }
            }
        }
    }
}

#[test]
fn two_faults_at_every_two_moments() {
    for order in 0..3 {
        for at in 0..length(order) {
            for then in at..length(order) + 8 {
                for first in FAULTS {
                    for second in FAULTS {
                        run(Broken::default(), &[(at, first), (then, second)], order);
                    }
                }
            }
        }
    }
}

#[test]
fn cancel_before_go_leaves_the_guest_running_and_after_it_changes_nothing() {
    for order in 0..3 {
        for at in 0..length(order) {
            let w = run(Broken::default(), &[(at, Fault::Cancel)], order);
            match w.src_end.as_ref().unwrap() {
                Ok(()) => assert!(w.d.running && w.d.output),
                Err(e) => {
                    assert_eq!(*e, Error::Cancelled);
                    assert!(w.s.running && !w.d.running);
                }
            }
        }
    }
}

#[test]
fn a_doubt_ends_when_the_destination_can_be_asked_again() {
    let (mut there, mut here) = (0, 0);
    for at in 0..length(0) {
        let broken = Broken { unreachable: true, ..Broken::default() };
        let mut w = run(broken, &[(at, Fault::Cut)], 0);
        if w.src_doubt.is_none() {
            continue;
        }
        assert!(w.src.in_doubt() && !w.s.running);
        w.fault(Fault::Reachable);
        w.settle(|| 0);
        w.check_end();
        there += u32::from(w.d.output);
        here += u32::from(w.s.running);
        assert!(w.d.output || w.s.running || w.closed);
    }
    assert!(there > 1, "{there} {here}");
}

#[test]
fn who_insists_hears_from_a_destination_that_can_be_asked_and_is_free_otherwise() {
    let mut seen = [0; 2];
    for at in 0..length(0) {
        for back in [false, true] {
            let broken = Broken { unreachable: true, ..Broken::default() };
            let mut w = run(broken, &[(at, Fault::Cut)], 0);
            if w.src_doubt.is_none() {
                continue;
            }
            // Back, but its driver has not noticed yet.
            w.broken.unreachable = !back;
            w.fault(Fault::Insist);
            w.settle(|| 0);
            w.check_end();
            seen[usize::from(back)] += 1;
            match w.src_end.unwrap() {
                Ok(()) => assert!(back && w.d.output),
                Err(Error::Unknown(_)) => assert!(!back || w.closed),
                Err(e) => assert!(back && w.s.running, "{e}"),
            }
        }
    }
    assert!(seen[0] > 1 && seen[1] > 1, "{seen:?}");
}

#[test]
fn a_destination_whose_source_never_comes_back_stays_held_and_says_so() {
    let mut seen = 0;
    for at in 0..length(0) {
        let broken = Broken { unreachable: true, ..Broken::default() };
        let w = run(broken, &[(at, Fault::Cut)], 0);
        if w.stranded {
            seen += 1;
            assert!(w.d.running && !w.d.output && !w.s.running);
            assert!(matches!(w.src_doubt, Some(Error::Unknown(_))) && w.src.in_doubt());
        }
    }
    assert!(seen > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn any_order_with_any_faults(
        picks in proptest::collection::vec(0usize..24, 0..120),
        faults in proptest::collection::vec((0usize..80, 0usize..FAULTS.len()), 0..5),
        broken in 0usize..11,
    ) {
        let mut w = World::new(each_broken()[broken]);
        for (tick, pick) in picks.iter().enumerate() {
            for (_, fault) in faults.iter().filter(|f| f.0 == tick) {
                w.fault(FAULTS[*fault]);
            }
            w.tick(*pick);
        }
        let mut i = 0;
        w.settle(|| { i += 1; picks.get(i % picks.len().max(1)).copied().unwrap_or(0) });
        w.check_end();
    }

    /// Messages that no honest peer would send, at any time.
    #[test]
    fn nonsense_never_panics_or_doubles_the_guest(
        picks in proptest::collection::vec((0usize..24, 0usize..40), 0..80),
    ) {
        let mut w = World::new(Broken::default());
        for (pick, nonsense) in picks {
            let m = match nonsense {
                0 => Msg::Accept,
                1 => Msg::RoundAck(1),
                2 => Msg::Ready(0),
                3 => Msg::HelloAck(crate::wire::HelloAck { version: 1, capabilities: vec![] }),
                4 => Msg::Preamble(preamble(), 0),
                5 => Msg::StateEnd(7),
                6 => Msg::Hello(crate::wire::Hello::new([2; 16], Role::Ram(0))),
                7 => Msg::Refuse(vec![]),
                _ => { w.tick(pick); continue; }
            };
            if nonsense % 2 == 0 { w.src_step(source::Input::Msg(m)) } else {
                w.dst_step(dest::Input::Msg(m))
            }
        }
        w.settle(|| 0);
        w.check();
    }
}
