//! Feature switches of `-device`, by QEMU's names, as bits that are not offered.
//! Source: VIRTIO 1.2, sections 5.1.3, 5.2.3 and 6.

use std::collections::BTreeMap;

use virtio::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, mask};

/// A switch, and all bits that go with it: its own, and those that need it.
type Switch = (&'static str, &'static [u32]);

const RING: &[Switch] =
    &[("event_idx", &[VIRTIO_F_EVENT_IDX]), ("indirect_desc", &[VIRTIO_F_INDIRECT_DESC])];

const NET_MQ: u32 = 22;
const NET: &[Switch] = &[
    ("csum", &[0, 11, 12, 13, 14]),
    ("guest_csum", &[1, 7, 8, 9, 10]),
    ("gso", &[11, 12, 13]),
    ("guest_tso4", &[7]),
    ("guest_tso6", &[8]),
    ("guest_ecn", &[9]),
    ("guest_ufo", &[10]),
    ("host_tso4", &[11]),
    ("host_tso6", &[12]),
    ("host_ecn", &[13]),
    ("host_ufo", &[14]),
    ("mrg_rxbuf", &[15]),
    ("status", &[16, 21]),
    ("ctrl_vq", &[17, 18, 19, 20, 21, NET_MQ, 23]),
    ("ctrl_rx", &[18, 20]),
    ("ctrl_vlan", &[19]),
    ("guest_announce", &[21]),
    ("ctrl_mac_addr", &[23]),
];

const BLK: &[Switch] = &[("config-wce", &[11]), ("discard", &[13]), ("write-zeroes", &[14])];

/// What the NIC does not offer. Several queues need `mq=on`, as in QEMU.
pub fn net(net: &spec::VirtioNet) -> u64 {
    off(&net.features, NET) | if net.mq { 0 } else { mask(NET_MQ) }
}

/// What the disk does not offer.
pub fn blk(blk: &spec::VirtioBlk) -> u64 {
    off(&blk.features, BLK)
}

/// The switches of a device of `kind` ("virtio-net", "virtio-blk") that the bits stand for, or what
/// else they are known by: "discard,write-zeroes,bit 40".
pub fn names(kind: &str, bits: u64) -> String {
    let own: &[Switch] = match kind {
        "virtio-net" => NET,
        "virtio-blk" => BLK,
        _ => &[],
    };
    let more: &[(&str, u32)] = match kind {
        "virtio-net" => &[("mq", NET_MQ)],
        "virtio-blk" => &[("read-only", 5), ("write-cache", 9), ("num-queues", 12)],
        _ => &[],
    };
    let all = more.iter().chain(&[("iommu_platform", 33), ("packed", 34)]).copied();
    // A switch's first bit is its own.
    let switches = own.iter().chain(RING).map(|(name, bits)| (*name, bits[0]));
    let known: Vec<_> = switches.chain(all).collect();
    let name = |bit: u32| match known.iter().find(|(_, b)| *b == bit) {
        Some((name, _)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    };
    let set = (0..64).filter(|bit| bits >> bit & 1 != 0);
    set.map(name).collect::<Vec<_>>().join(",")
}

fn off(given: &BTreeMap<String, bool>, table: &[Switch]) -> u64 {
    let is_off = |name: &str| given.get(name) == Some(&false);
    let switches = table.iter().chain(RING).filter(|(name, _)| is_off(name));
    switches.flat_map(|(_, bits)| *bits).fold(0, |all, bit| all | mask(*bit))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn bits_have_names() {
        assert_eq!(names("virtio-blk", 1 << 5 | 1 << 13 | 1 << 34), "read-only,discard,packed");
        assert_eq!(names("virtio-net", 1 << 0 | 1 << 7 | 1 << 22), "csum,guest_tso4,mq");
        assert_eq!(names("virtio-rng", 1 << 28 | 1 << 60), "indirect_desc,bit 60");
    }

    #[test]
    fn every_switch_of_the_command_line_is_known_here() {
        use qapi::cmdline::device::keys::{BLK_FEATURES, NET_FEATURES};
        for (keys, table) in [(NET_FEATURES, NET), (BLK_FEATURES, BLK)] {
            let taken: BTreeSet<_> = keys.iter().map(|key| key.name).collect();
            assert_eq!(taken, table.iter().map(|(name, _)| *name).collect());
        }
    }

    #[test]
    fn a_feature_goes_with_those_that_need_it() {
        let given = |list: &[(&str, bool)]| -> BTreeMap<String, bool> {
            list.iter().map(|(name, on)| (name.to_string(), *on)).collect()
        };
        assert_eq!(off(&given(&[("csum", true)]), NET), 0);
        assert_eq!(off(&given(&[("guest_tso4", false), ("mrg_rxbuf", false)]), NET), 0x8080);
        assert_eq!(off(&given(&[("csum", false)]), NET), 0x7801);
        assert_eq!(off(&given(&[("discard", false), ("event_idx", false)]), BLK), 0x2000_2000);
        let plain = spec::VirtioNet::default();
        assert_eq!(net(&plain), mask(NET_MQ));
        assert_eq!(net(&spec::VirtioNet { mq: true, ..plain }), 0);
    }
}
