//! What CPUID shows the guest: what KVM supports, cut to the model, completed per CPU
//! (Intel SDM vol. 2, CPUID; Linux `Documentation/virt/kvm/api.rst`, KVM_GET_SUPPORTED_CPUID).

use cpu::CpuModel;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const X2APIC: u32 = 1 << 21;
/// FMA, AVX and F16C of leaf 1 ECX, and XSAVE with OSXSAVE.
const V3_LEAF1_ECX: u32 = 1 << 12 | 1 << 28 | 1 << 29;
const MOVBE: u32 = 1 << 22;
const XSAVE: u32 = 1 << 26 | 1 << 27;
/// BMI1, AVX2, BMI2 of leaf 7 EBX.
const V3_LEAF7_EBX: u32 = 1 << 3 | 1 << 5 | 1 << 8;
/// AVX-512 and its parts in leaf 7.
const AVX512_EBX: u32 =
    1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
const AVX512_ECX: u32 = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14;
const AVX512_EDX: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23;
/// AMX: its state does not fit the saved XSAVE area, and no model has it.
const AMX_EDX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const AMX_XCR0: u32 = 3 << 17;

/// What KVM's instruction emulator lacks: CMPXCHG16B, POPCNT, XSAVE and all that needs it, of leaf 1 ECX.
const NOT_EMULATED_ECX: u32 = 1 << 13 | 1 << 23 | V3_LEAF1_ECX | XSAVE | 1 << 1 | 1 << 25 | 1 << 30;

/// Cuts what KVM supports to what it can also emulate, on a host where it does nothing else.
pub(crate) fn emulated(supported: &mut CpuId) {
    for entry in supported.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !NOT_EMULATED_ECX,
            7 => (entry.ebx, entry.ecx, entry.edx) = (entry.ebx & (1 << 9), 0, 0),
            0xd => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

/// Entries for the CPU with APIC id `id`, of `count`.
pub(crate) fn of(supported: &CpuId, model: CpuModel, id: u32, count: u32, deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xffff | id << 24 | count.min(255) << 16;
                entry.ecx |= HYPERVISOR | X2APIC;
                if deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                if count > 1 {
                    // HTT: more than one logical processor.
                    entry.edx |= 1 << 28;
                }
                if model == CpuModel::X86_64V2 {
                    entry.ecx &= !(V3_LEAF1_ECX | MOVBE | XSAVE);
                }
            }
            (4, _) if entry.eax & 0x1f != 0 => {
                // Each CPU is a core of its own with caches of its own.
                entry.eax = entry.eax & 0x3fff | (count - 1).min(63) << 26;
            }
            (7, 0) => {
                entry.edx &= !AMX_EDX;
                match model {
                    CpuModel::Max => {}
                    CpuModel::X86_64V3 => without_avx512(entry),
                    CpuModel::X86_64V2 => {
                        without_avx512(entry);
                        entry.ebx &= !V3_LEAF7_EBX;
                        // VAES, VPCLMULQDQ, GFNI
                        entry.ecx &= !(1 << 8 | 1 << 9 | 1 << 10);
                    }
                }
            }
            (7, _) => {
                // AVX-VNNI, AVX512-BF16 and the AMX parts of sub-leaf 1.
                entry.eax &= !(1 << 5 | 1 << 21);
                if model != CpuModel::Max {
                    entry.eax &= !(1 << 4);
                }
            }
            (0xb | 0x1f, index) => {
                // One level of threads of one, one level of cores.
                entry.edx = id;
                match index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 0x100),
                    1 => {
                        let bits = 32 - (count - 1).leading_zeros();
                        (entry.eax, entry.ebx, entry.ecx) = (bits, count, 0x201);
                    }
                    _ => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
                }
            }
            (0xd, 0) => {
                entry.eax &= !AMX_XCR0;
                match model {
                    CpuModel::Max => {}
                    CpuModel::X86_64V3 => entry.eax &= 7,
                    CpuModel::X86_64V2 => {
                        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0)
                    }
                }
            }
            (0xd, 17 | 18) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0xd, _) if model == CpuModel::X86_64V2 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    cpuid
}

fn without_avx512(entry: &mut kvm_cpuid_entry2) {
    entry.ebx &= !AVX512_EBX;
    entry.ecx &= !AVX512_ECX;
    entry.edx &= !AVX512_EDX;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_shows_no_more_than_it_names() {
        let full = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let supported =
            CpuId::from_entries(&[full(1, 0), full(7, 0), full(0xb, 1), full(0xd, 0)]).unwrap();
        let shown = of(&supported, CpuModel::X86_64V2, 3, 4, true);
        let entries = shown.as_slice();
        assert_eq!(entries[0].ebx >> 24, 3);
        assert_eq!(entries[0].ecx & (V3_LEAF1_ECX | XSAVE), 0);
        assert_eq!(entries[1].ebx & (V3_LEAF7_EBX | AVX512_EBX), 0);
        assert_eq!((entries[2].eax, entries[2].ebx, entries[2].edx), (2, 4, 3));
        assert_eq!(entries[3].eax, 0);
        assert_eq!(
            of(&supported, CpuModel::X86_64V3, 0, 1, false).as_slice()[3].eax,
            7
        );
    }
}
