//! What CPUID says (SDM vol. 2, CPUID): the model asked for, cut down to what the host executes natively, with the
//! system features that are ours to give.
//!
//! Speculation: guest kernel and guest user code share one host address space, so page-table isolation and
//! retpolines in the guest would cost much and protect nothing; IA32_ARCH_CAPABILITIES says so (see `msr`), and what
//! cannot be said honestly (store bypass) stays visible as vulnerable.

use core::arch::x86_64::{__cpuid, __cpuid_count};

use cpu::CpuModel;
use iced_x86::{CpuidFeature, EncodingKind, Instruction};

use super::cr;
use crate::state::Cpu;

/// XCR0 bits: x87, SSE, AVX.
pub const XCR0_X87: u64 = 1;
pub const XCR0_SSE: u64 = 2;
pub const XCR0_AVX: u64 = 4;
/// Size of the XSAVE area without and with AVX.
pub const XSAVE_SSE: u32 = 576;
pub const XSAVE_AVX: u32 = 832;

/// Leaf 1 ECX.
mod f1c {
    pub const NATIVE: u32 = 1 << 0
        | 1 << 1
        | 1 << 9
        | 1 << 13
        | 1 << 19
        | 1 << 20
        | 1 << 23
        | 1 << 25
        | 1 << 26
        | 1 << 30;
    pub const NATIVE_V3: u32 = 1 << 12 | AVX | 1 << 22 | 1 << 29;
    pub const AVX: u32 = 1 << 28;
    /// PCID, x2APIC, TSC deadline, hypervisor.
    pub const OURS: u32 = 1 << 17 | 1 << 21 | 1 << 24 | 1 << 31;
    pub const XSAVE: u32 = 1 << 26;
    pub const OSXSAVE: u32 = 1 << 27;
}

/// Leaf 1 EDX: FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2 SS.
const F1D: u32 = 1 << 0
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26
    | 1 << 27;

/// Leaf 7 EBX.
mod f7b {
    /// ADX, RDSEED, CLFLUSHOPT, SHA; x87 pointer behaviour as the host has it.
    pub const NATIVE: u32 = 1 << 6 | 1 << 13 | 1 << 18 | 1 << 19 | 1 << 23 | 1 << 29;
    /// BMI1, AVX2, BMI2.
    pub const NATIVE_V3: u32 = 1 << 3 | AVX2 | 1 << 8;
    pub const AVX2: u32 = 1 << 5;
    /// FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID. Not SMAP: the look-aside buffers would have to follow RFLAGS.AC.
    pub const OURS: u32 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 9 | 1 << 10;
}

/// The features of one machine's CPUs.
#[derive(Debug, Clone)]
pub struct Cpuid {
    vcpus: u32,
    tsc_khz: u32,
    v3: bool,
    leaf1_ecx: u32,
    leaf7_ebx: u32,
    leaf7_ecx: u32,
    extended_ecx: u32,
    rdtscp: bool,
    /// Leaf 4 as the host describes its caches: EAX without sharing, EBX, ECX, EDX.
    caches: Vec<[u32; 4]>,
    brand: [u8; 48],
}

impl Cpuid {
    pub fn new(model: CpuModel, vcpus: u32, tsc_hz: u64) -> Cpuid {
        let one = __cpuid(1);
        let seven = if __cpuid(0).eax >= 7 {
            __cpuid_count(7, 0)
        } else {
            __cpuid(0x7fff_ffff)
        };
        let extended = __cpuid(0x8000_0001);
        // The host's operating system must save the upper halves as well.
        let avx_usable = std::arch::is_x86_feature_detected!("avx");
        let v3_host = avx_usable
            && one.ecx & f1c::NATIVE_V3 == f1c::NATIVE_V3
            && seven.ebx & f7b::NATIVE_V3 == f7b::NATIVE_V3
            && extended.ecx & 1 << 5 != 0;
        let v3 = v3_host && model != CpuModel::X86_64V2;
        let mut leaf1_ecx = one.ecx & f1c::NATIVE | f1c::OURS;
        let mut leaf7_ebx = if seven.ebx != 0 {
            seven.ebx & f7b::NATIVE
        } else {
            0
        } | f7b::OURS;
        // LAHF/SAHF, PREFETCHW.
        let mut extended_ecx = extended.ecx & (1 << 0 | 1 << 8);
        if v3 {
            leaf1_ecx |= f1c::NATIVE_V3;
            leaf7_ebx |= f7b::NATIVE_V3;
            extended_ecx |= 1 << 5;
        }
        debug_assert!(v3 || leaf1_ecx & f1c::AVX == 0 && leaf7_ebx & f7b::AVX2 == 0);
        let mut brand = [0u8; 48];
        let name: &[u8] = if v3 {
            b"Berth software CPU (x86-64-v3)"
        } else {
            b"Berth software CPU (x86-64-v2)"
        };
        brand[..name.len()].copy_from_slice(name);
        let rdpid = seven.ecx & 1 << 22;
        Cpuid {
            vcpus: vcpus.max(1),
            tsc_khz: u32::try_from(tsc_hz / 1000).unwrap_or(u32::MAX),
            v3,
            leaf1_ecx,
            leaf7_ebx,
            // UMIP is ours, RDPID the host's.
            leaf7_ecx: 1 << 2 | rdpid,
            extended_ecx,
            rdtscp: extended.edx & 1 << 27 != 0,
            caches: host_caches(),
            brand,
        }
    }

    /// The bits XCR0 may have.
    pub fn xcr0_mask(&self) -> u64 {
        if self.v3 {
            XCR0_X87 | XCR0_SSE | XCR0_AVX
        } else {
            XCR0_X87 | XCR0_SSE
        }
    }

    pub fn xsave(&self) -> bool {
        self.leaf1_ecx & f1c::XSAVE != 0
    }

    /// The bits CR4 may have.
    pub fn cr4_mask(&self) -> u64 {
        let known = cr::CR4_TSD
            | cr::CR4_DE
            | cr::CR4_PSE
            | cr::CR4_PAE
            | cr::CR4_MCE
            | cr::CR4_PGE
            | cr::CR4_PCE
            | cr::CR4_OSFXSR
            | cr::CR4_OSXMMEXCPT
            | cr::CR4_UMIP
            | cr::CR4_FSGSBASE
            | cr::CR4_PCIDE
            | cr::CR4_SMEP;
        if self.xsave() {
            known | cr::CR4_OSXSAVE
        } else {
            known
        }
    }

    /// Whether the guest is shown what an instruction needs. What is not shown is #UD, whatever the host could do.
    pub fn offers(&self, i: &Instruction) -> bool {
        use CpuidFeature as F;
        let one = |bit: u32| self.leaf1_ecx >> bit & 1 != 0;
        let seven = |bit: u32| self.leaf7_ebx >> bit & 1 != 0;
        i.encoding() != EncodingKind::EVEX
            && i.cpuid_features().iter().all(|feature| match feature {
                F::X64
                | F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486 => true,
                F::CPUID
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::CMOV
                | F::CX8
                | F::FXSR => true,
                F::MSR
                | F::TSC
                | F::SEP
                | F::SYSCALL
                | F::CLFSH
                | F::PAUSE
                | F::MULTIBYTENOP
                | F::INVPCID
                | F::SERIALIZE => true,
                F::FSGSBASE | F::PREFETCHW | F::CET_IBT => true,
                F::SSE3 => one(0),
                F::PCLMULQDQ => one(1),
                F::SSSE3 => one(9),
                F::FMA => one(12),
                F::CMPXCHG16B => one(13),
                F::SSE4_1 => one(19),
                F::SSE4_2 => one(20),
                F::MOVBE => one(22),
                F::POPCNT => one(23),
                F::AES => one(25),
                F::XSAVE | F::XSAVEC | F::XSAVEOPT => one(26),
                F::AVX => one(28),
                F::F16C => one(29),
                F::RDRAND => one(30),
                F::BMI1 => seven(3),
                F::AVX2 => seven(5),
                F::BMI2 => seven(8),
                F::RDSEED => seven(18),
                F::ADX => seven(19),
                F::CLFLUSHOPT => seven(23),
                F::SHA => seven(29),
                F::LZCNT => self.extended_ecx & 1 << 5 != 0,
                F::RDPID => self.leaf7_ecx & 1 << 22 != 0,
                F::RDTSCP => self.rdtscp,
                _ => false,
            })
    }

    /// EAX, EBX, ECX, EDX of one leaf.
    pub fn query(&self, cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
        let id = cpu.id;
        match leaf {
            // "GenuineIntel": Linux takes the crystal frequency and deadline timer from it without measuring.
            0 => [
                0x16,
                u32::from_le_bytes(*b"Genu"),
                u32::from_le_bytes(*b"ntel"),
                u32::from_le_bytes(*b"ineI"),
            ],
            1 => {
                let mut ecx = self.leaf1_ecx;
                if cpu.cr4 & cr::CR4_OSXSAVE != 0 {
                    ecx |= f1c::OSXSAVE;
                }
                let mut edx = F1D;
                if self.vcpus > 1 {
                    edx |= 1 << 28;
                }
                if !cpu.system.apic.enabled() {
                    edx &= !(1 << 9);
                }
                [
                    SIGNATURE,
                    id << 24 | (self.vcpus.next_power_of_two() & 0xff) << 16 | 8 << 8,
                    ecx,
                    edx,
                ]
            }
            // 0xff: caches by leaf 4.
            2 => [0x00fe_ff01, 0, 0, 0],
            4 => self.cache(subleaf),
            // The APIC timer runs in every idle state.
            6 => [1 << 2, 0, 0, 0],
            // BHI_CTRL: the kernel sets a bit once instead of clearing branch history at each system call.
            7 if subleaf == 2 => [0, 0, 0, 1 << 4],
            7 if subleaf == 0 => [
                2,
                self.leaf7_ebx,
                self.leaf7_ecx,
                // SERIALIZE (14) spares Linux an IRET for each place it patches.
                1 << 4 | 1 << 14 | 1 << 26 | 1 << 29,
            ],
            0xb => match subleaf {
                0 => [0, 1, 1 << 8, id],
                1 => [
                    self.vcpus.next_power_of_two().trailing_zeros(),
                    self.vcpus,
                    2 << 8 | 1,
                    id,
                ],
                n => [0, 0, n & 0xff, id],
            },
            0xd if self.xsave() => match subleaf {
                0 => {
                    let size = |mask: u64| {
                        if mask & XCR0_AVX != 0 {
                            XSAVE_AVX
                        } else {
                            XSAVE_SSE
                        }
                    };
                    [
                        self.xcr0_mask() as u32,
                        size(cpu.xcr0),
                        size(self.xcr0_mask()),
                        0,
                    ]
                }
                // XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
                1 => [
                    7,
                    if cpu.xcr0 & XCR0_AVX != 0 {
                        XSAVE_AVX
                    } else {
                        XSAVE_SSE
                    },
                    0,
                    0,
                ],
                2 if self.v3 => [256, 576, 0, 0],
                _ => [0; 4],
            },
            // TSC = crystal * EBX / EAX.
            0x15 => [1_000_000, self.tsc_khz, super::apic::TIMER_HZ as u32, 0],
            0x16 => [self.tsc_khz / 1000, self.tsc_khz / 1000, 100, 0],
            0x4000_0000 => [
                0x4000_0010,
                u32::from_le_bytes(*b"KVMK"),
                u32::from_le_bytes(*b"VMKV"),
                u32::from_le_bytes(*b"M\0\0\0"),
            ],
            // Both clock MSR pairs, no I/O delays, stable clock.
            0x4000_0001 => [1 << 0 | 1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0],
            0x4000_0010 => [self.tsc_khz, (super::apic::TIMER_HZ / 1000) as u32, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            // SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
            0x8000_0001 => {
                let rdtscp = if self.rdtscp { 1 << 27 } else { 0 };
                [
                    0,
                    0,
                    self.extended_ecx,
                    1 << 11 | 1 << 20 | 1 << 26 | 1 << 29 | rdtscp,
                ]
            }
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    let b = &self.brand[at + i * 4..][..4];
                    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
                })
            }
            0x8000_0006 => [0, 0, 1024 << 16 | 8 << 12 | 64, 0],
            // Invariant TSC.
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => [super::paging::PHYSICAL_BITS | 48 << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }

    fn cache(&self, subleaf: u32) -> [u32; 4] {
        let Some(&[eax, ebx, ecx, edx]) = self.caches.get(subleaf as usize) else {
            return [0; 4];
        };
        let level = eax >> 5 & 7;
        let sharing = if level >= 3 {
            self.vcpus.next_power_of_two() - 1
        } else {
            0
        };
        let cores = (self.vcpus.next_power_of_two() - 1).min(63);
        [
            eax & 0x3fff | sharing.min(0xfff) << 14 | cores << 26,
            ebx,
            ecx,
            edx,
        ]
    }
}

/// Family 6, model 0x8f, stepping 8: what Linux knows no erratum for that our CPUs could have.
const SIGNATURE: u32 = 0x0008_06f8;

fn host_caches() -> Vec<[u32; 4]> {
    let zero = __cpuid(0);
    let amd = zero.ebx == u32::from_le_bytes(*b"Auth");
    let leaf = if amd && __cpuid(0x8000_0000).eax >= 0x8000_001d {
        0x8000_001d
    } else {
        4
    };
    let mut found = Vec::new();
    if leaf != 4 || zero.eax >= 4 {
        for subleaf in 0..8 {
            let c = __cpuid_count(leaf, subleaf);
            if c.eax & 31 == 0 {
                break;
            }
            found.push([c.eax, c.ebx, c.ecx, c.edx]);
        }
    }
    if found.is_empty() {
        // 32 KiB data and code, 1 MiB, 16 MiB.
        found = vec![
            [0x121, 7 << 22 | 63, 63, 0],
            [0x122, 7 << 22 | 63, 63, 0],
            [0x143, 15 << 22 | 63, 1023, 0],
            [0x163, 15 << 22 | 63, 16383, 0],
        ];
    }
    found
}
