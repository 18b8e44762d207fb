//! When to stop the guest: a policy that sees every round's figures and says "again" or "switch".

use std::time::Duration;

use crate::session::source::Plan;

/// What a policy sees after a round was acknowledged and the dirty logs were read.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Rounds done, from 1.
    pub round: u64,
    /// Pages that are pending now.
    pub pending_pages: u64,
    /// How long the round took.
    pub took: Duration,
    /// Bytes a second that the connections carry, as measured.
    pub bandwidth: u64,
    /// How long everything but the last pages is expected to take: stop, save, load, go.
    pub fixed: Duration,
    /// How long the guest may stand still.
    pub limit: Duration,
    /// Whether the guest runs (and dirties).
    pub running: bool,
}

impl Observation {
    /// How long the guest would stand still if it were stopped now.
    pub fn expected_downtime(&self) -> Duration {
        self.fixed + self.last_round()
    }

    /// How long the pending pages take to send.
    pub fn last_round(&self) -> Duration {
        let bytes = self.pending_pages as f64 * mem::PAGE_SIZE as f64;
        Duration::try_from_secs_f64(bytes / self.bandwidth.max(1) as f64).unwrap_or(Duration::MAX)
    }
}

/// Decides when a migration switches over.
pub trait Policy: Send {
    /// Called after each round.
    fn decide(&mut self, seen: &Observation) -> Plan;
}

/// The plain pre-copy policy: switches when the expected downtime is within the limit, after a
/// few more rounds as long as each still shrinks the last one noticeably (they are short by then,
/// and each makes the pause shorter). Goes on for ever, as QEMU does by default, if the guest
/// dirties faster than the connection carries.
#[derive(Debug, Default)]
pub struct Precopy {
    /// Rounds done beyond the first that would have done.
    extra: u32,
    /// Pages that were pending before that.
    before: u64,
}

/// Most rounds beyond the one that would have done.
const MAX_EXTRA: u32 = 6;
/// A last round this short is not worth another one.
const SHORT: Duration = Duration::from_micros(1500);

impl Policy for Precopy {
    fn decide(&mut self, seen: &Observation) -> Plan {
        if !seen.running || seen.pending_pages == 0 {
            return Plan::Switch;
        }
        // Even a limit below the fixed cost must be reachable by the pages' part of it.
        let budget = seen.limit.saturating_sub(seen.fixed).max(seen.limit / 2);
        if seen.last_round() > budget {
            (self.extra, self.before) = (0, 0);
            return Plan::Again;
        }
        let shrinks = self.extra == 0 || seen.pending_pages * 4 < self.before * 3;
        self.before = seen.pending_pages;
        if seen.last_round() > SHORT && shrinks && self.extra < MAX_EXTRA {
            self.extra += 1;
            return Plan::Again;
        }
        Plan::Switch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pending_pages: u64) -> Observation {
        Observation {
            round: 1,
            pending_pages,
            took: Duration::from_millis(10),
            bandwidth: 1 << 30,
            fixed: Duration::from_millis(10),
            limit: Duration::from_millis(100),
            running: true,
        }
    }

    #[test]
    fn goes_on_while_too_much_is_left_and_switches_when_it_fits() {
        let mut p = Precopy::default();
        for _ in 0..100 {
            assert_eq!(p.decide(&seen(100_000)), Plan::Again);
        }
        assert_eq!(p.decide(&seen(100)), Plan::Switch);
        assert_eq!(Precopy::default().decide(&seen(0)), Plan::Switch);
        let stopped = Observation { running: false, ..seen(100_000) };
        assert_eq!(Precopy::default().decide(&stopped), Plan::Switch);
    }

    #[test]
    fn uses_extra_rounds_only_while_they_help() {
        let mut p = Precopy::default();
        assert_eq!(p.decide(&seen(10_000)), Plan::Again);
        assert_eq!(p.decide(&seen(5_000)), Plan::Again);
        assert_eq!(p.decide(&seen(4_900)), Plan::Switch);
        let mut p = Precopy::default();
        let rounds = (0..100).take_while(|_| p.decide(&seen(10_000)) == Plan::Again).count();
        assert!(rounds <= MAX_EXTRA as usize);
    }

    #[test]
    fn reaches_a_limit_below_the_fixed_cost() {
        let tight = Observation { limit: Duration::from_millis(5), ..seen(100) };
        assert_eq!(Precopy::default().decide(&tight), Plan::Switch);
    }
}
