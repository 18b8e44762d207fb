//! Saving and restoring PIC, IOAPIC and PIT.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use minicbor::{Decode, Encode};
use state::{SavedState, Section};

use super::plain::{from_bytes, to_bytes};
use super::state::unit;
use super::vm::Shared;

/// The machine's interrupt controllers and timer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct IrqchipState {
    /// `struct kvm_irqchip` of the master PIC.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) pic_master: Vec<u8>,
    /// `struct kvm_irqchip` of the slave PIC.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) pic_slave: Vec<u8>,
    /// `struct kvm_irqchip` of the IOAPIC.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pit: Vec<u8>,
}

impl SavedState for IrqchipState {
    const KIND: &'static str = "kvm-irqchip";
    const VERSION: u16 = 1;
}

fn get(vm: &Shared, name: &str, chip_id: u32) -> state::Result<Vec<u8>> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd.get_irqchip(&mut chip).map_err(|e| unit(name, e))?;
    Ok(to_bytes(&chip))
}

fn set(vm: &Shared, name: &str, chip_id: u32, chip: &kvm_irqchip) -> state::Result<()> {
    let chip = kvm_irqchip { chip_id, ..*chip };
    vm.fd.set_irqchip(&chip).map_err(|e| unit(name, e))
}

pub(super) fn save(vm: &Shared, name: &str) -> state::Result<Section> {
    let pit = vm.fd.get_pit2().map_err(|e| unit(name, e))?;
    let state = IrqchipState {
        pic_master: get(vm, name, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: get(vm, name, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get(vm, name, KVM_IRQCHIP_IOAPIC)?,
        pit: to_bytes(&pit),
    };
    Section::encode(name, &state)
}

pub(super) fn restore(vm: &Shared, section: &Section) -> state::Result<()> {
    let name = section.name.as_str();
    let IrqchipState { pic_master, pic_slave, ioapic, pit } = section.decode()?;
    // All decoded before the first is set.
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, from_bytes("pic_master", &pic_master)?),
        (KVM_IRQCHIP_PIC_SLAVE, from_bytes("pic_slave", &pic_slave)?),
        (KVM_IRQCHIP_IOAPIC, from_bytes("ioapic", &ioapic)?),
    ];
    let pit: kvm_pit_state2 = from_bytes("pit", &pit)?;
    for (id, chip) in &chips {
        set(vm, name, *id, chip)?;
    }
    vm.fd.set_pit2(&pit).map_err(|e| unit(name, e))
}
