//! vCPUs from the description: topology, APIC ids, CPUID.

use hv::cpu::{self, Topology};
use hv::{CpuidEntry, Vcpu, Vm};

/// The vCPUs, vCPU 0's CPUID, and each APIC id.
pub type Created = (Vec<Box<dyn Vcpu>>, Vec<CpuidEntry>, Vec<u32>);

/// Makes the vCPUs of `spec`.
///
/// # Errors
/// Sentences that name -cpu or -smp.
pub fn create(spec: &spec::Machine, vm: &dyn Vm) -> Result<Created, String> {
    let smp = &spec.smp;
    let topology =
        Topology { sockets: smp.sockets, dies: smp.dies, cores: smp.cores, threads: smp.threads };
    let host = vm.supported_cpuid().map_err(|e| e.to_string())?;
    let wrong = |e: cpu::Error| format!("-cpu {}: {e}", spec.cpu.model);
    let check = spec.cpu.features.get("check") != Some(&false);
    let missing = cpu::missing(&host, &spec.cpu.model, &spec.cpu.features).map_err(wrong)?;
    for feature in missing.iter().filter(|_| check) {
        crate::tell!("tern: warning: host doesn't support requested feature: {feature}");
    }
    let mut vcpus = Vec::new();
    let mut first = Vec::new();
    let mut apic_ids = Vec::new();
    for id in 0..smp.cpus {
        let apic_id = cpu::apic_id(&topology, id);
        let mut vcpu = vm.create_vcpu_as(id, apic_id).map_err(|e| format!("-smp: {e}"))?;
        let cpuid =
            cpu::build(&host, &spec.cpu.model, &spec.cpu.features, &topology, id).map_err(wrong)?;
        vcpu.set_cpuid(&cpuid).map_err(|e| format!("-cpu {}: {e}", spec.cpu.model))?;
        if id == 0 {
            first = cpuid;
        }
        vcpus.push(vcpu);
        apic_ids.push(apic_id);
    }
    Ok((vcpus, first, apic_ids))
}
