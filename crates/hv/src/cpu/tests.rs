//! The table for a made-up host, and for this one where there is KVM.

use super::features::{W1_ECX, W7_EBX};
use super::*;

/// A host that supports everything that has a name.
fn generous() -> Vec<CpuidEntry> {
    let mut out: Vec<CpuidEntry> = Vec::new();
    for word in features::words() {
        if !out.iter().any(|e| e.function == word.leaf && e.index == word.index) {
            let (function, index) = (word.leaf, word.index);
            let all = u32::MAX;
            let (eax, ebx, ecx, edx) = (all, all, all, all);
            out.push(CpuidEntry { function, index, indexed: true, eax, ebx, ecx, edx });
        }
    }
    out.push(CpuidEntry { function: 0xd, eax: 0x602ff, indexed: true, ..Default::default() });
    for (index, eax, ebx) in
        [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)]
    {
        let (function, indexed) = (0xd, true);
        out.push(CpuidEntry { function, index, indexed, eax, ebx, ..Default::default() });
    }
    out
}

fn on(list: &[(&str, bool)]) -> BTreeMap<String, bool> {
    list.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect()
}

fn get(table: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
    *table.iter().find(|e| e.function == function && e.index == index).unwrap()
}

fn make(model: &str, wanted: &[(&str, bool)]) -> Result<Vec<CpuidEntry>, Error> {
    build(&generous(), model, &on(wanted), &Topology::default(), 0)
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    let e = make("Haswel", &[]).unwrap_err().to_string();
    assert_eq!(
        e,
        "there is no CPU model 'Haswel' (did you mean 'Haswell'?) (-cpu help lists what is)"
    );
    let e = make("host", &[("avx22", true)]).unwrap_err().to_string();
    assert!(e.contains("avx22") && e.contains("did you mean"), "{e}");
    assert!(make(&"x".repeat(10_000), &[]).is_err());
    assert!(matches!(make("host", &[("vmx", true)]), Err(Error::NotMigratable(_))));
    assert!(make("host", &[("vmx", false)]).is_ok());
    let topo = Topology { threads: 0, ..Default::default() };
    assert!(build(&generous(), "host", &on(&[]), &topo, 0).is_err());
}

#[test]
fn every_model_builds_and_has_no_duplicate_leaf() {
    for model in models() {
        let table = make(model, &[]).unwrap();
        for (i, a) in table.iter().enumerate() {
            let twin = table[..i].iter().any(|b| (a.function, a.index) == (b.function, b.index));
            assert!(!twin, "{model}: leaf {:#x}.{}", a.function, a.index);
        }
        assert!(table.len() < 80, "{model}");
        assert!(get(&table, 0x4000_0000, 0).ebx == u32::from_le_bytes(*b"KVMK"));
    }
}

#[test]
fn features_follow_the_switches_and_the_host() {
    let avx2 = 1 << 5;
    let table = make("Haswell", &[]).unwrap();
    assert!(get(&table, 7, 0).ebx & avx2 != 0);
    let table = make("Haswell", &[("avx2", false)]).unwrap();
    assert!(get(&table, 7, 0).ebx & avx2 == 0);
    let mut host = generous();
    host.iter_mut().filter(|e| e.function == 7).for_each(|e| e.ebx &= !avx2);
    let table = build(&host, "Haswell", &on(&[]), &Topology::default(), 0).unwrap();
    assert!(get(&table, 7, 0).ebx & avx2 == 0);
    let missing = missing(&host, "Haswell", &on(&[])).unwrap();
    assert_eq!(missing, ["CPUID.07H:EBX.avx2 [bit 5]"]);
    let e = build(&host, "Haswell", &on(&[("enforce", true)]), &Topology::default(), 0);
    assert!(e.unwrap_err().to_string().contains("avx2"));
    assert!(make("host", &[("kvm", false)]).unwrap().iter().all(|e| e.function >> 30 != 1));
}

#[test]
fn what_cannot_move_is_hidden() {
    let table = make("host", &[]).unwrap();
    let vmx = 1 << 5;
    assert_eq!(get(&table, W1_ECX.leaf, 0).ecx & vmx, 0);
    assert_eq!(get(&table, 0x8000_0001, 0).ecx & (1 << 2), 0);
    assert_eq!(get(&table, 0x8000_0007, 0).edx, 0);
    let table = make("host", &[("invtsc", true)]).unwrap();
    assert_eq!(get(&table, 0x8000_0007, 0).edx, 1 << 8);
}

#[test]
fn xsave_is_as_large_as_the_features_need() {
    let size = |model: &str, wanted: &[(&str, bool)]| {
        let table = make(model, wanted).unwrap();
        table.iter().find(|e| e.function == 0xd && e.index == 0).map(|e| (e.eax, e.ecx))
    };
    assert_eq!(size("Haswell", &[]), Some((7, 832)));
    assert_eq!(size("Icelake-Server", &[]), Some((0x2e7, 2696)));
    assert_eq!(size("Nehalem", &[]), None);
    let table = make("host", &[("xsave", false)]).unwrap();
    assert!(table.iter().all(|e| e.function != 0xd));
    let avx512f = 1 << 16;
    assert_eq!(get(&table, W7_EBX.leaf, 0).ebx & avx512f, 0, "no AVX without XSAVE");
}

#[test]
fn topology_leaves_agree_with_the_apic_id() {
    let topo = Topology { sockets: 2, dies: 2, cores: 3, threads: 2 };
    for vcpu in 0..24 {
        let table = build(&generous(), "EPYC-Rome", &on(&[]), &topo, vcpu).unwrap();
        let id = apic_id(&topo, vcpu);
        assert_eq!(get(&table, 1, 0).ebx >> 24, id);
        assert_eq!(get(&table, 0x8000_001e, 0).eax, id);
        for (leaf, sub, shift, count) in
            [(0xb, 0, 1, 2), (0xb, 1, 4, 12), (0x1f, 0, 1, 2), (0x1f, 1, 3, 6), (0x1f, 2, 4, 12)]
        {
            let e = get(&table, leaf, sub);
            assert_eq!((e.eax, e.ebx, e.edx), (shift, count, id), "leaf {leaf:#x}.{sub}");
        }
        assert!(get(&table, 0, 0).eax >= 0x1f);
    }
}

#[test]
fn this_hosts_kvm_takes_every_model() {
    use crate::{KvmVm, Vm};
    let vm = match KvmVm::new(std::path::Path::new(crate::kvm::DEFAULT_PATH)) {
        Ok(vm) => vm,
        Err(e) => return eprintln!("skipped: {e}"),
    };
    let host = vm.supported_cpuid().unwrap();
    let topo = Topology { sockets: 1, dies: 1, cores: 2, threads: 2 };
    for (id, model) in models().into_iter().enumerate() {
        let table = build(&host, model, &BTreeMap::new(), &topo, 1).unwrap();
        let mut vcpu = vm.create_vcpu(id as u32).unwrap();
        vcpu.set_cpuid(&table).unwrap_or_else(|e| panic!("{model}: {e}"));
    }
}
