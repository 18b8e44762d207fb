//! What an earlier process left in an in-flight table, and where its ring goes on.

use std::sync::atomic::Ordering;

use super::{InflightQueue, Pending, VERSION};
use crate::device::{RingPos, RingSetup};
use crate::ring::MAX_QUEUE_SIZE;

fn check_version(version: u16) -> Result<(), String> {
    if version <= VERSION {
        return Ok(());
    }
    Err(format!("the in-flight table has version {version}; versions up to {VERSION} are known"))
}

/// "When reconnecting" of split rings in the specification.
pub fn split(q: &mut InflightQueue, setup: &RingSetup) -> Result<RingPos, String> {
    let at = setup.used.checked_add(2);
    let used = at.and_then(|at| setup.mem.load_u16(at, Ordering::Acquire).ok());
    let used = used.ok_or("the used ring is not in memory")?;
    let table = &mut q.table;
    check_version(table.version())?;
    if table.version() == 0 {
        table.init(VERSION);
        table.set_used(used);
        return Ok(RingPos { avail: used, used });
    }
    // The last batch was shown to the driver, but its marks not cleared.
    let batch = used.wrapping_sub(table.used());
    if batch <= setup.size {
        let mut head = table.batch_head();
        for _ in 0..batch {
            if head >= table.capacity() {
                return Err(format!("the in-flight table links to entry {head}, beyond its end"));
            }
            table.set_inflight(head, false);
            head = table.next(head);
        }
    }
    table.set_used(used);
    table.adopt_batch_head();
    let left = (0..setup.size).filter(|i| table.inflight(*i));
    let mut left: Vec<_> = left.map(|i| (table.counter(i), i)).collect();
    left.sort_unstable();
    q.counter = left.last().map_or(0, |(n, _)| n.wrapping_add(1));
    let pending = |(_, slot)| Pending { slot, id: slot, entries: 1 };
    q.resubmit = left.into_iter().map(pending).collect();
    Ok(RingPos { avail: used.wrapping_add(q.resubmit.len() as u16), used })
}

/// "When reconnecting" of packed rings in the specification.
pub fn packed(q: &mut InflightQueue, setup: &RingSetup) -> Result<RingPos, String> {
    check_version(q.table.version())?;
    let capacity = q.table.capacity();
    q.next = (1..=capacity).collect();
    q.last = (0..capacity).collect();
    if q.table.version() == 0 {
        let pos = setup.pos.unwrap_or(RingPos::PACKED_START);
        for i in 0..capacity {
            q.table.set_inflight(i, false);
            q.table.set_next(i, i + 1);
        }
        q.set_free(0);
        q.table.set_old_free(0);
        q.table.set_used(pos.used);
        q.table.set_old_used(pos.used);
        q.table.init(VERSION);
        return Ok(RingPos { avail: pos.used, used: pos.used });
    }
    roll(q, setup)?;
    let used = q.table.used();
    if used & 0x7fff >= setup.size {
        return Err(format!("the in-flight table's used_idx {:#x} is outside the ring", used));
    }
    clear_free_list(q)?;
    let taken = collect(q, setup.size)?;
    relink(q);
    scrub(setup, used, taken);
    let index = u32::from(used & 0x7fff) + u32::from(taken);
    let size = u32::from(setup.size);
    let wrapped = index >= size;
    let index = if wrapped { index - size } else { index } as u16;
    let avail = index | (used & 0x8000) ^ (u16::from(wrapped) << 15);
    Ok(RingPos { avail, used })
}

/// The first descriptor of a batch is shown last. If the process died before that, the others
/// already look used, and the driver would come upon them too early: they get back the look of
/// descriptors that are with the device.
fn scrub(setup: &RingSetup, used: u16, taken: u16) {
    let (mut index, mut wrap) = (used & 0x7fff, used & 0x8000 != 0);
    for _ in 0..taken {
        let flags: u16 = if wrap { 1 << 7 } else { 1 << 15 };
        // In memory: the ring's addresses were checked, or will be before it is used.
        let at = setup.desc.saturating_add(16 * u64::from(index) + 14);
        let _ = setup.mem.store_u16(at, flags, Ordering::Release);
        index += 1;
        if index == setup.size {
            (index, wrap) = (0, !wrap);
        }
    }
}

/// Completes a batch that the driver has seen, or takes back one that it has not.
fn roll(q: &mut InflightQueue, setup: &RingSetup) -> Result<(), String> {
    let t = &q.table;
    let old = t.old_used();
    if t.used() != old {
        let index = u64::from(old & 0x7fff);
        let flags = setup.desc.checked_add(16 * index + 14);
        let flags = flags.filter(|_| index < u64::from(setup.size));
        let flags = flags.and_then(|at| setup.mem.load_u16(at, Ordering::Acquire).ok());
        let flags = flags.ok_or("the in-flight table's old_used_idx is outside the ring")?;
        let wrap = old & 0x8000 != 0;
        let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
        if avail == wrap && used == wrap {
            t.set_old_free(t.free());
            t.set_old_used(t.used());
        }
    }
    t.set_free(t.old_free());
    t.set_used(t.old_used());
    Ok(())
}

/// Whatever is free is not in flight.
fn clear_free_list(q: &mut InflightQueue) -> Result<(), String> {
    let capacity = q.table.capacity();
    let mut at = q.table.free();
    for _ in 0..=capacity {
        if at >= capacity {
            return Ok(());
        }
        q.table.set_inflight(at, false);
        at = q.table.next(at);
    }
    Err("the in-flight table's list of free entries loops".into())
}

/// Finds what is in flight, with its chain; returns how many ring entries that takes.
fn collect(q: &mut InflightQueue, size: u16) -> Result<u16, String> {
    let capacity = q.table.capacity();
    let mut left: Vec<_> =
        (0..capacity).filter(|i| q.table.inflight(*i)).map(|i| (q.table.counter(i), i)).collect();
    left.sort_unstable();
    let mut taken = 0_u16;
    let mut seen = vec![false; capacity.into()];
    for (counter, slot) in left {
        let (_, entries) = q.table.chain(slot);
        taken = taken.checked_add(entries).filter(|n| entries > 0 && *n <= size).ok_or_else(|| {
            format!("entry {slot} of the in-flight table has {entries} descriptors: too many or none")
        })?;
        debug_assert!(size <= MAX_QUEUE_SIZE);
        let (mut at, mut last) = (slot, slot);
        for _ in 0..entries {
            let Some(s) = seen.get_mut(usize::from(at)).filter(|s| !**s) else {
                return Err(format!("entry {slot} of the in-flight table has a broken chain"));
            };
            *s = true;
            last = at;
            at = q.table.next(at);
            q.next[usize::from(last)] = at;
        }
        q.last[usize::from(slot)] = last;
        let id = q.table.desc(last).at12;
        q.resubmit.push_back(Pending { slot, id, entries });
        q.counter = counter.wrapping_add(1);
    }
    // Free entries are linked anew by `relink`, which tells them by this mark.
    for (i, seen) in seen.into_iter().enumerate() {
        if !seen {
            q.next[i] = u16::MAX;
        }
    }
    Ok(taken)
}

/// Makes the list of free entries anew, whatever it was.
fn relink(q: &mut InflightQueue) {
    let free: Vec<u16> =
        (0..q.table.capacity()).filter(|i| q.next[usize::from(*i)] == u16::MAX).collect();
    let end = q.table.capacity();
    for (n, slot) in free.iter().enumerate() {
        q.set_next(*slot, free.get(n + 1).copied().unwrap_or(end));
    }
    let first = free.first().copied().unwrap_or(end);
    q.set_free(first);
    q.table.set_old_free(first);
}
