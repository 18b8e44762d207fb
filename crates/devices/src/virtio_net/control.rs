//! The control queue (VIRTIO 1.2, section 5.1.6.5): commands decoded and carried out.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use net::Mac;
use virtio::Chain;
use virtio::features::has;

use super::config::VIRTIO_NET_F_MQ;
use super::filter::{Filter, MAX_MACS, MODES};
use super::shared::Shared;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const OK: u8 = 0;
const ERR: u8 = 1;

/// Carries the command of `chain` out and writes its acknowledgement. Returns the bytes written;
/// `None` if there is no room for it: the driver broke the rules.
pub(super) fn serve(shared: &Shared, chain: &Chain) -> Option<u32> {
    let ack = if execute(shared, chain).is_some() { OK } else { ERR };
    (chain.write_at(0, &[ack]) == 1).then_some(1)
}

/// `None`: refused.
fn execute(shared: &Shared, chain: &Chain) -> Option<()> {
    let [class, command] = read::<2>(chain, 0)?;
    match (class, command) {
        (CLASS_RX, mode) if mode < MODES => {
            let [on] = read::<1>(chain, 2)?;
            edit(shared, |f| f.set_mode(mode, on != 0));
            Some(())
        }
        (CLASS_MAC, MAC_TABLE_SET) => set_tables(shared, chain),
        (CLASS_MAC, MAC_ADDR_SET) => {
            let mac = read::<6>(chain, 2)?;
            edit(shared, |f| f.mac = mac);
            Some(())
        }
        (CLASS_ANNOUNCE, 0) => {
            shared.announcing.store(false, Ordering::Release);
            Some(())
        }
        (CLASS_MQ, 0) if has(shared.features.load(Ordering::Acquire), VIRTIO_NET_F_MQ) => {
            let pairs = u16::from_le_bytes(read::<2>(chain, 2)?);
            if pairs == 0 || usize::from(pairs) > shared.signals.len() {
                return None;
            }
            shared.active_pairs.store(pairs, Ordering::Release);
            shared.wake_all();
            Some(())
        }
        _ => None,
    }
}

fn edit(shared: &Shared, change: impl FnOnce(&mut Filter)) {
    let mut filter = Filter::clone(&shared.filter.load());
    change(&mut filter);
    shared.filter.store(Arc::new(filter));
}

fn set_tables(shared: &Shared, chain: &Chain) -> Option<()> {
    let (unicast, unicast_overflow, next) = table(chain, 2)?;
    let (multicast, multicast_overflow, _) = table(chain, next)?;
    edit(shared, |f| {
        f.unicast = unicast;
        f.unicast_overflow = unicast_overflow;
        f.multicast = multicast;
        f.multicast_overflow = multicast_overflow;
    });
    Some(())
}

/// The table at byte `at`, whether it was too long to keep, and where the next one is.
fn table(chain: &Chain, at: u32) -> Option<(Vec<Mac>, bool, u32)> {
    let count = u32::from_le_bytes(read::<4>(chain, at)?);
    let first = at + 4;
    let end = first.checked_add(count.checked_mul(6)?)?;
    if end > chain.readable_len() {
        return None;
    }
    if count as usize > MAX_MACS {
        return Some((Vec::new(), true, end));
    }
    let macs = (0..count).map(|i| read::<6>(chain, first + 6 * i)).collect::<Option<_>>()?;
    Some((macs, false, end))
}

fn read<const N: usize>(chain: &Chain, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (chain.read_at(at, &mut bytes) == N).then_some(bytes)
}
