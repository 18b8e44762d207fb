//! Where a vCPU sits, and the APIC id that says so (Intel SDM volume 3, 10.9; AMD's APM volume 3,
//! appendix E.5).

/// How many of what: the machine has `sockets * dies * cores * threads` vCPUs at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    pub sockets: u32,
    /// Per socket.
    pub dies: u32,
    /// Per die.
    pub cores: u32,
    /// Per core.
    pub threads: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self { sockets: 1, dies: 1, cores: 1, threads: 1 }
    }
}

/// Bits that hold 0..n.
fn width(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

impl Topology {
    /// All numbers at least 1 and at most 1024 each, so that APIC ids fit their 32 bits.
    pub(super) fn is_sound(&self) -> bool {
        [self.sockets, self.dies, self.cores, self.threads].iter().all(|n| (1..=1024).contains(n))
            && u64::from(self.sockets) * u64::from(self.per_socket()) <= 1 << 20
    }

    /// vCPUs in a socket.
    pub fn per_socket(&self) -> u32 {
        self.dies.saturating_mul(self.cores).saturating_mul(self.threads)
    }

    /// Lowest APIC id bit of the core's number.
    pub(super) fn core_shift(&self) -> u32 {
        width(self.threads)
    }

    /// Lowest APIC id bit of the die's number.
    pub(super) fn die_shift(&self) -> u32 {
        self.core_shift() + width(self.cores)
    }

    /// Lowest APIC id bit of the socket's number.
    pub(super) fn socket_shift(&self) -> u32 {
        self.die_shift() + width(self.dies)
    }
}

/// The (x2)APIC id of vCPU `vcpu` (0-based; threads vary fastest, then cores, dies, sockets).
/// With sizes that are no powers of two, ids have gaps.
pub fn apic_id(topo: &Topology, vcpu: u32) -> u32 {
    let (threads, cores, dies) = (topo.threads.max(1), topo.cores.max(1), topo.dies.max(1));
    let thread = vcpu % threads;
    let core = vcpu / threads % cores;
    let die = vcpu / threads / cores % dies;
    let socket = vcpu / threads / cores / dies;
    let shifted = |n: u32, by: u32| n.checked_shl(by).unwrap_or(0);
    thread
        | shifted(core, topo.core_shift())
        | shifted(die, topo.die_shift())
        | shifted(socket, topo.socket_shift())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_have_gaps_where_sizes_are_no_powers_of_two() {
        let t = Topology { sockets: 2, dies: 1, cores: 3, threads: 2 };
        let ids: Vec<_> = (0..12).map(|i| apic_id(&t, i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    proptest! {
        #[test]
        fn ids_are_unique_and_ascend(s in 1u32..5, d in 1u32..4, c in 1u32..9, t in 1u32..4) {
            let topo = Topology { sockets: s, dies: d, cores: c, threads: t };
            let ids: Vec<_> = (0..s * d * c * t).map(|i| apic_id(&topo, i)).collect();
            prop_assert!(ids.windows(2).all(|w| w[0] < w[1]));
        }
    }
}
