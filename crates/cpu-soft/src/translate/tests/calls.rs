//! SYSCALL and SYSRET, which translated code does without Rust where it can, against the Rust code that defines them.

use cpu::x86::Segment;

use super::generate::Random;
use super::rig::{self, CODE, END};
use crate::host::Guard;
use crate::state::{CS, Fault, SS, flag};
use crate::system::branch::flat;
use crate::system::{self, segment};

/// What a system call or return leaves.
#[derive(Debug, PartialEq)]
struct Outcome {
    fault: Option<Fault>,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    cs: Segment,
    ss: Segment,
    cpl: u8,
}

#[test]
fn system_calls_and_returns_do_the_same_in_blocks_as_in_the_interpreter() {
    let Some(mut rig) = rig::rig() else { return };
    let (frame, range, fault) = rig.vcpu.cpu().place_of_code();
    let _guard = Guard::new(frame, range, fault).expect("guard");
    let mut random = Random(9);
    for round in 0..4000 {
        let call = random.one_in(2);
        let start = CODE + 0x10 * random.below(16);
        let bytes: &[u8] = if call { &[0x0f, 5] } else { &[0x48, 0x0f, 7] };
        let mut gpr: [u64; 16] = std::array::from_fn(|_| random.next());
        let (star, sfmask) = (random.next(), random.next() & 0x3f_ffff);
        let rflags = random.next() & (flag::NATIVE | flag::IF | flag::IOPL | flag::NT | flag::ID)
            | flag::FIXED;
        let waits = u32::from(random.one_in(8));
        let cpl = if call || random.one_in(32) { 3 } else { 0 };
        if !call {
            gpr[1] = match random.below(16) {
                0 => 1 << 47 | END,
                1 => END | 0xffff_8000_0000_0000,
                _ => END,
            };
            for rare in [flag::TF, flag::AC] {
                if !random.one_in(8) {
                    gpr[11] &= !rare;
                }
            }
        }
        rig.load(bytes, start);
        let [translated, interpreted] = [true, false].map(|translated| {
            let cpu = rig.vcpu.cpu();
            (cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip) = (gpr, rflags, cpl, start);
            (cpu.interrupt_waits, cpu.interrupt_shadow) = (waits, false);
            let kinds = if cpl == 3 {
                (flat::CODE64_USER, flat::DATA_USER)
            } else {
                (flat::CODE64, flat::DATA)
            };
            cpu.segments[CS] = segment::flat(0x30 | u16::from(cpl), kinds.0);
            cpu.segments[SS] = segment::flat(0x28 | u16::from(cpl), kinds.1);
            let msr = &mut cpu.system.msr;
            (msr.star, msr.lstar, msr.sfmask) = (star, END, sfmask);
            cpu.x87_load();
            let target = if call { END } else { gpr[1] };
            let fault = if translated {
                cpu.run_to(target, false)
            } else {
                system::interpret(cpu).err()
            };
            cpu.x87_store();
            Outcome {
                fault,
                gpr: cpu.gpr,
                rip: cpu.rip,
                // Of a fault, flags that nobody reads in the block are not kept.
                rflags: if fault.is_none() { cpu.rflags } else { 0 },
                cs: cpu.segments[CS],
                ss: cpu.segments[SS],
                cpl: cpu.cpl,
            }
        });
        assert_eq!(translated, interpreted, "round {round}, {bytes:02x?}");
    }
}
