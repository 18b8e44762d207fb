//! VLANs of a port: which frames it lets in and out, and what happens to their tag on the way out.
//! Source: IEEE 802.1Q-2018, clauses 6.9 and 9.6.
//!
//! | port | untagged frames | tagged frames |
//! |---|---|---|
//! | (neither) | VLAN 0 | any VLAN |
//! | `vlan=ID` | VLAN ID | dropped |
//! | `trunk=A+B` | dropped | A and B |
//! | `vlan=ID,trunk=A+B` | VLAN ID | A and B |
//!
//! A tag of VLAN 0 carries only a priority: such a frame counts as untagged.

/// Largest VLAN number.
pub const MAX_VLAN: u16 = 4094;

/// The VLANs whose tagged frames a port carries.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tagged {
    None,
    All,
    Some(Box<[u64; 64]>),
}

/// A port's VLANs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vlans {
    /// Where untagged frames belong.
    untagged: Option<u16>,
    tagged: Tagged,
}

/// What is done to a frame's tag when it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// Nothing.
    Keep,
    /// The tag is taken out.
    Strip,
    /// A tag with this control information is put in.
    Insert(u16),
    /// The tag's control information becomes this.
    Replace(u16),
}

impl Default for Vlans {
    fn default() -> Self {
        Self::new(None, &[])
    }
}

impl Vlans {
    /// From a port's options: `vlan=`, 1 to 4094, and `trunk=`.
    pub fn new(vlan: Option<u16>, trunk: &[u16]) -> Self {
        if !trunk.is_empty() {
            let mut bits = Box::new([0; 64]);
            for v in trunk {
                bits[usize::from(v >> 6) & 63] |= 1 << (v & 63);
            }
            return Self { untagged: vlan, tagged: Tagged::Some(bits) };
        }
        match vlan {
            Some(_) => Self { untagged: vlan, tagged: Tagged::None },
            None => Self { untagged: Some(0), tagged: Tagged::All },
        }
    }

    #[inline]
    fn carries_tagged(&self, vlan: u16) -> bool {
        match &self.tagged {
            Tagged::None => false,
            Tagged::All => true,
            Tagged::Some(bits) => bits[usize::from(vlan >> 6) & 63] >> (vlan & 63) & 1 != 0,
        }
    }

    /// The VLAN of a frame that comes in with tag control information `tci`, or `None` if the port
    /// does not let it in.
    #[inline]
    pub fn ingress(&self, tci: Option<u16>) -> Option<u16> {
        match tci.map_or(0, |t| t & 0xfff) {
            0 => self.untagged,
            vlan => self.carries_tagged(vlan).then_some(vlan),
        }
    }

    /// Whether frames of `vlan` leave here.
    #[inline]
    pub fn carries(&self, vlan: u16) -> bool {
        self.untagged == Some(vlan) || (vlan != 0 && self.carries_tagged(vlan))
    }

    /// What to do to a frame of `vlan` that came in with `tci`, or `None` if it may not leave here.
    #[inline]
    pub fn egress(&self, vlan: u16, tci: Option<u16>) -> Option<Edit> {
        if self.untagged == Some(vlan) {
            return Some(match tci {
                Some(t) if t & 0xfff != 0 => Edit::Strip,
                _ => Edit::Keep,
            });
        }
        if vlan == 0 || !self.carries_tagged(vlan) {
            return None;
        }
        Some(match tci {
            None => Edit::Insert(vlan),
            Some(t) if t & 0xfff == 0 => Edit::Replace(t & 0xf000 | vlan),
            Some(_) => Edit::Keep,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_trunk_both_neither() {
        let access = Vlans::new(Some(5), &[]);
        assert_eq!((access.ingress(None), access.ingress(Some(5))), (Some(5), None));
        assert_eq!(access.ingress(Some(0xe000)), Some(5));
        assert_eq!(access.egress(5, Some(5)), Some(Edit::Strip));
        assert_eq!(access.egress(5, None), Some(Edit::Keep));
        assert_eq!(access.egress(6, Some(6)), None);
        let trunk = Vlans::new(None, &[1, 2, 4094]);
        assert_eq!((trunk.ingress(None), trunk.ingress(Some(2))), (None, Some(2)));
        assert_eq!(trunk.ingress(Some(0x6000 | 4094)), Some(4094));
        assert_eq!((trunk.ingress(Some(3)), trunk.egress(3, None)), (None, None));
        assert_eq!(trunk.egress(2, None), Some(Edit::Insert(2)));
        assert_eq!(trunk.egress(2, Some(0xa000)), Some(Edit::Replace(0xa002)));
        assert_eq!(trunk.egress(2, Some(0x2002)), Some(Edit::Keep));
        let native = Vlans::new(Some(7), &[1]);
        assert_eq!((native.ingress(None), native.ingress(Some(1))), (Some(7), Some(1)));
        assert_eq!(native.ingress(Some(7)), None);
        assert_eq!(native.egress(7, None), Some(Edit::Keep));
        let all = Vlans::default();
        assert_eq!((all.ingress(None), all.ingress(Some(9))), (Some(0), Some(9)));
        assert_eq!(
            (all.egress(0, None), all.egress(9, None)),
            (Some(Edit::Keep), Some(Edit::Insert(9)))
        );
        assert!(all.carries(0) && all.carries(4000) && !access.carries(0));
    }
}
