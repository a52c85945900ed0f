//! Paging, exceptions, interrupts, and the instructions around them, on a small machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpu::x86::{Activity, RAX, RCX, RDX, RSP, Segment, TableRegister};
use iced_x86::{Decoder, DecoderOptions};

use super::interp::tests::cpu;
use super::paging::{error, walk};
use super::*;
use crate::state::{Access, CS, Frame, Mailbox, Rights, SS};

const PML4: u64 = 0x1000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;

fn put(cpu: &mut Cpu, at: u64, value: u64) {
    cpu.physical_write::<u64>(at, value);
}

fn get(cpu: &mut Cpu, at: u64) -> u64 {
    cpu.physical_read::<u64>(at)
}

fn run(cpu: &mut Cpu, code: &[u8]) -> Result<Flow, Fault> {
    let ip = cpu.rip;
    let i = Decoder::with_ip(64, code, ip, DecoderOptions::NONE).decode();
    execute(cpu, &i)
}

/// 64-bit mode with paging: va 0..0x10000 maps to itself, supervisor, writable; 0x20_0000 is a user page at 0x9000,
/// 0x20_1000 a read-only user page there.
fn paged() -> Box<Frame> {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    put(cpu, PML4, 0x2007);
    put(cpu, 0x2000, 0x3007);
    put(cpu, 0x3000, 0x4007);
    put(cpu, 0x3008, 0x5007);
    for n in 0..16 {
        put(cpu, 0x4000 + n * 8, n << 12 | 3);
    }
    put(cpu, 0x5000, 0x9007);
    put(cpu, 0x5008, 0x9005);
    put(cpu, 0x5010, 0x8000_0000_0000_9007);
    cpu.cr3 = PML4;
    cpu.cr0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_WP | cr::CR0_ET | cr::CR0_NE;
    cpu.cr4 |= cr::CR4_PAE;
    cpu.efer |= cr::EFER_NXE;
    // Null, kernel code, kernel data, user data, user code.
    for (n, d) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        put(cpu, GDT + n as u64 * 8, d);
    }
    cpu.gdtr = TableRegister {
        base: GDT,
        limit: 0x27,
    };
    cpu.idtr = TableRegister {
        base: IDT,
        limit: 0xfff,
    };
    cpu.tr = Segment {
        base: TSS,
        limit: 0x67,
        selector: 0x30,
        attributes: 0x8b,
        unusable: false,
    };
    // No bitmap of ports.
    put(cpu, TSS + 0x60, 0x68 << 48);
    put(cpu, TSS + 4, 0xb000);
    put(cpu, TSS + 0x24, 0xc000);
    cpu.segments[CS] = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        attributes: 0xa09b,
        unusable: false,
    };
    cpu.segments[SS] = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        attributes: 0xc093,
        unusable: false,
    };
    cpu.gpr[RSP] = 0xa000;
    cpu.rip = 0x4_0000;
    frame
}

/// Sets an interrupt gate to `target`.
fn gate(cpu: &mut Cpu, vector: u64, target: u64, ist: u64, dpl: u64) {
    put(
        cpu,
        IDT + vector * 16,
        (target & 0xffff)
            | 8 << 16
            | ist << 32
            | (0x8e00 | dpl << 13) << 32
            | (target >> 16 & 0xffff) << 48,
    );
    put(cpu, IDT + vector * 16 + 8, target >> 32);
}

fn to_user(cpu: &mut Cpu) {
    cpu.cpl = 3;
    cpu.segments[CS] = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x23,
        attributes: 0xa0fb,
        unusable: false,
    };
    cpu.segments[SS] = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x1b,
        attributes: 0xc0f3,
        unusable: false,
    };
    cpu.gpr[RSP] = 0x20_0800;
}

#[test]
fn a_write_sets_accessed_and_dirty_and_a_read_only_accessed() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    let found = walk(cpu, 0x20_0123, Access::Read, Rights::User).expect("mapped");
    assert_eq!(
        (found.gpa, found.writable, found.user),
        (0x9123, false, true)
    );
    assert_eq!(get(cpu, 0x5000) & 0x60, 0x20);
    assert_eq!(get(cpu, PML4) & 0x20, 0x20);
    let found = walk(cpu, 0x20_0123, Access::Write, Rights::User).expect("mapped");
    assert!(found.writable);
    assert_eq!(get(cpu, 0x5000) & 0x60, 0x60);
}

#[test]
fn page_faults_say_why() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    let code =
        |r: Result<paging::Translation, Fault>| r.expect_err("faults").error.expect("with a code");
    assert_eq!(
        code(walk(cpu, 0x40_0000, Access::Read, Rights::User)),
        error::USER
    );
    assert_eq!(
        code(walk(cpu, 0x1000, Access::Write, Rights::User)),
        error::PRESENT | error::WRITE | error::USER
    );
    assert_eq!(
        code(walk(cpu, 0x20_1000, Access::Write, Rights::Supervisor)),
        error::PRESENT | error::WRITE
    );
    assert_eq!(
        code(walk(cpu, 0x20_2000, Access::Fetch, Rights::User)),
        error::PRESENT | error::USER | error::FETCH
    );
    cpu.cr0 &= !cr::CR0_WP;
    assert!(walk(cpu, 0x20_1000, Access::Write, Rights::Supervisor).is_ok());
    cpu.efer &= !cr::EFER_NXE;
    assert_eq!(
        code(walk(cpu, 0x20_2000, Access::Read, Rights::User)),
        error::PRESENT | error::USER | error::RESERVED
    );
    assert_eq!(
        walk(cpu, 1 << 60, Access::Read, Rights::User),
        Err(Fault::GP)
    );
}

#[test]
fn smap_keeps_a_supervisor_off_user_pages_unless_ac_is_set() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    cpu.cr4 |= cr::CR4_SMAP | cr::CR4_SMEP;
    assert!(walk(cpu, 0x20_0000, Access::Read, Rights::Current).is_err());
    assert_eq!(run(cpu, &[0x0f, 0x01, 0xcb]), Ok(Flow::EndBlock));
    assert!(walk(cpu, 0x20_0000, Access::Read, Rights::Current).is_ok());
    assert!(walk(cpu, 0x20_0000, Access::Fetch, Rights::Current).is_err());
}

#[test]
fn an_exception_in_user_code_goes_to_the_stack_of_the_tss_and_iretq_returns() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    gate(cpu, 14, 0xffff_8000_1234_5678, 0, 0);
    to_user(cpu);
    cpu.rflags |= flag::IF;
    deliver(cpu, Fault::page(0x1234, 6)).expect("delivered");
    assert_eq!(
        (cpu.cpl, cpu.cr2, cpu.rip),
        (0, 0x1234, 0xffff_8000_1234_5678)
    );
    assert_eq!(cpu.rflags & flag::IF, 0);
    assert_eq!(cpu.gpr[RSP], 0xb000 - 48);
    let frame: Vec<u64> = (0..6).map(|n| get(cpu, 0xb000 - 48 + n * 8)).collect();
    assert_eq!(frame[..3], [6, 0x4_0000, 0x23]);
    assert_eq!(frame[4..], [0x20_0800, 0x1b]);
    assert_ne!(frame[3] & flag::RF, 0);
    cpu.gpr[RSP] += 8;
    run(cpu, &[0x48, 0xcf]).expect("iretq");
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[RSP]), (3, 0x4_0000, 0x20_0800));
    assert_ne!(cpu.rflags & flag::IF, 0);
}

#[test]
fn a_page_fault_that_cannot_be_delivered_is_a_double_fault_on_its_own_stack_then_a_triple_fault() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    gate(cpu, 14, 0x1_0000, 0, 0);
    gate(cpu, 8, 0x2_0000, 1, 0);
    // A stack that is not there.
    cpu.gpr[RSP] = 0x7000_0000;
    deliver(cpu, Fault::page(0x1234, 0)).expect("a double fault");
    assert_eq!(cpu.rip, 0x2_0000);
    assert_eq!(cpu.gpr[RSP], 0xc000 - 48);
    put(cpu, TSS + 0x24, 0x7000_0000);
    cpu.gpr[RSP] = 0x7000_0000;
    assert_eq!(deliver(cpu, Fault::page(0x1234, 0)), Err(TripleFault));
}

#[test]
fn software_interrupts_need_the_privilege_of_their_gate() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    gate(cpu, 0x80, 0x1_0000, 0, 3);
    gate(cpu, 0x81, 0x1_0000, 0, 0);
    to_user(cpu);
    assert_eq!(run(cpu, &[0xcd, 0x81]), Err(Fault::gp(0x81 * 8 + 2)));
    assert_eq!(cpu.rip, 0x4_0000);
    run(cpu, &[0xcd, 0x80]).expect("allowed");
    assert_eq!((cpu.cpl, cpu.rip), (0, 0x1_0000));
    assert_eq!(get(cpu, cpu.gpr[RSP]), 0x4_0002);
}

#[test]
fn system_calls_go_there_and_back() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    for (number, value) in [
        (msr::STAR, 0x0013_0008_0000_0000),
        (msr::LSTAR, 0xffff_8000_0000_1000),
        (msr::SFMASK, 0x4_7700),
    ] {
        (cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX]) =
            (u64::from(number), value & 0xffff_ffff, value >> 32);
        run(cpu, &[0x0f, 0x30]).expect("wrmsr");
    }
    to_user(cpu);
    cpu.rip = 0x4_0000;
    cpu.rflags |= flag::IF;
    run(cpu, &[0x0f, 0x05]).expect("syscall");
    assert_eq!(
        (cpu.cpl, cpu.rip, cpu.gpr[RCX]),
        (0, 0xffff_8000_0000_1000, 0x4_0002)
    );
    assert_eq!(
        (
            cpu.segments[CS].selector,
            cpu.segments[SS].selector,
            cpu.rflags & flag::IF
        ),
        (8, 0x10, 0)
    );
    run(cpu, &[0x48, 0x0f, 0x07]).expect("sysretq");
    assert_eq!((cpu.cpl, cpu.rip), (3, 0x4_0002));
    assert_eq!(
        (cpu.segments[CS].selector, cpu.segments[SS].selector),
        (0x23, 0x1b)
    );
    assert_ne!(cpu.rflags & flag::IF, 0);
}

#[test]
fn privileged_instructions_fault_in_user_code() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    to_user(cpu);
    // cli, hlt, mov cr3 rax, wrmsr, lgdt [rax], invlpg [rax], in al dx, swapgs, wbinvd, ltr ax
    for code in [
        &[0xfa][..],
        &[0xf4],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x30],
        &[0x0f, 0x01, 0x10],
        &[0x0f, 0x01, 0x38],
        &[0xec],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x09],
        &[0x0f, 0x00, 0xd8],
    ] {
        assert_eq!(run(cpu, code), Err(Fault::GP), "{code:x?}");
        assert_eq!(cpu.rip, 0x4_0000);
    }
}

#[test]
fn control_registers_refuse_what_cannot_be() {
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    // Paging off in 64-bit mode; PAE off in long mode; a reserved bit of CR4; CR3 beyond the physical address bits.
    assert_eq!(
        registers::set_cr0(cpu, cpu.cr0 & !cr::CR0_PG),
        Err(Fault::GP)
    );
    assert_eq!(
        registers::set_cr4(cpu, cpu.cr4 & !cr::CR4_PAE),
        Err(Fault::GP)
    );
    assert_eq!(registers::set_cr4(cpu, cpu.cr4 | 1 << 12), Err(Fault::GP));
    assert_eq!(registers::set_cr3(cpu, 1 << 50), Err(Fault::GP));
    assert_eq!(registers::set_efer(cpu, 0), Err(Fault::GP));
    assert_eq!(msr::read(cpu, 0x1234_5678), Err(Fault::GP));
    assert_eq!(msr::write(cpu, msr::LSTAR, 1 << 60), Err(Fault::GP));
    assert_eq!(msr::write(cpu, msr::PAT, 2), Err(Fault::GP));
}

/// A machine with two CPUs that know each other.
fn two() -> [Box<Frame>; 2] {
    let machine = Arc::new(Machine::new(2, cpu::CpuModel::Max));
    let memory =
        cpu::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 0x10000)]).expect("memory");
    assert!(machine.set_memory(Arc::new(memory)));
    [0, 1].map(|id| {
        let mailbox = Arc::new(Mailbox::new());
        machine
            .mailboxes
            .lock()
            .expect("lock")
            .push(mailbox.clone());
        let mut frame = Frame::new(id, machine.clone(), mailbox);
        let cpu = frame.cpu.get_mut();
        apic::publish(cpu);
        msr::write(
            cpu,
            msr::APIC_BASE,
            cpu.system.apic.base | apic::BASE_X2APIC,
        )
        .expect("x2APIC");
        apic::msr_write(cpu, 0x80f, 0x1ff).expect("SVR");
        frame
    })
}

#[test]
fn a_cpu_starts_by_init_and_a_start_up_message() {
    let [mut a, mut b] = two();
    let (a, b) = (a.cpu.get_mut(), b.cpu.get_mut());
    assert_eq!(b.system.activity, Activity::WaitForSipi);
    assert!(!wakes(b));
    apic::msr_write(a, 0x830, 1 << 32 | 0xc500).expect("INIT");
    apic::msr_write(a, 0x830, 1 << 32 | 0x8500).expect("INIT de-assert");
    apic::msr_write(a, 0x830, 1 << 32 | 0x4698).expect("SIPI");
    assert_eq!(poll_interrupts(b), Ok(true));
    assert!(wakes(b));
    assert_eq!(
        (b.segments[CS].base, b.segments[CS].selector, b.rip),
        (0x9_8000, 0x9800, 0)
    );
    assert_eq!(segment::bitness(b), 16);
}

#[test]
fn messages_reach_the_cpus_they_name_in_the_order_of_their_priority() {
    let [mut a, mut b] = two();
    let (a, b) = (a.cpu.get_mut(), b.cpu.get_mut());
    b.system.activity = Activity::Halted;
    signal_msi(&a.machine.clone(), 0xfee0_1000, 0x41);
    signal_msi(&a.machine.clone(), 0xfee0_1000, 0x8052);
    apic::msr_write(a, 0x830, 3 << 18 | 0x61).expect("everyone else");
    assert!(!a.mailbox.has_mail());
    apic::take_mail(b);
    assert!(apic::waits(b));
    assert!(!wakes(b), "IF is clear");
    b.rflags |= flag::IF;
    assert!(wakes(b));
    assert_eq!(apic::accept(b), Some(0x61));
    assert_eq!(apic::accept(b), None, "0x52 is not above 0x61");
    apic::msr_write(b, 0x80b, 0).expect("EOI");
    assert_eq!(apic::accept(b), Some(0x52));
    // Level-triggered: the TMR says so.
    assert_eq!(apic::msr_read(b, 0x818 + 2), Ok(1 << 0x12));
    apic::set_task_priority(b, 5);
    apic::msr_write(b, 0x80b, 0).expect("EOI");
    assert_eq!(apic::accept(b), None, "0x41 is below the task priority");
    apic::set_task_priority(b, 0);
    assert_eq!(apic::accept(b), Some(0x41));
    assert_ne!(b.attention.load(Ordering::SeqCst), 0);
}

#[test]
fn the_deadline_timer_fires_once_when_its_time_has_come() {
    let [mut a, _b] = two();
    let a = a.cpu.get_mut();
    apic::msr_write(a, 0x832, 2 << 17 | 0xec).expect("LVT");
    apic::set_deadline(a, u64::MAX / 2);
    apic::tick(a);
    assert_eq!(apic::accept(a), None);
    assert_eq!(msr::read(a, msr::TSC_DEADLINE), Ok(u64::MAX / 2));
    apic::set_deadline(a, 1);
    assert_eq!(msr::read(a, msr::TSC_DEADLINE), Ok(0));
    assert_eq!(apic::accept(a), Some(0xec));
    assert_eq!(apic::next_deadline(a), None);
}

#[test]
fn cpuid_is_consistent_with_itself() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    for model in [
        cpu::CpuModel::Max,
        cpu::CpuModel::X86_64V2,
        cpu::CpuModel::X86_64V3,
    ] {
        let id = cpuid::Cpuid::new(model, 3, 2_000_000_000);
        let avx = id.query(cpu, 1, 0)[2] >> 28 & 1;
        assert_eq!(avx, id.query(cpu, 7, 0)[1] >> 5 & 1, "AVX2 comes with AVX");
        assert_eq!(u64::from(avx), id.xcr0_mask() >> 2, "and with its state");
        if id.xsave() {
            let size = id.query(cpu, 0xd, 0)[2];
            assert_eq!(size, if avx != 0 { 832 } else { 576 });
        }
        let [d, n, crystal, _] = id.query(cpu, 0x15, 0);
        assert_eq!(
            u64::from(crystal) * u64::from(n) / u64::from(d),
            2_000_000_000
        );
        assert_eq!(id.query(cpu, 0xb, 1)[1], 3);
        assert_eq!(id.query(cpu, 0x4000_0000, 0)[1].to_le_bytes(), *b"KVMK");
        if model == cpu::CpuModel::X86_64V2 {
            assert_eq!(avx, 0);
        }
    }
}

#[test]
fn saved_state_comes_back_the_same() {
    let [mut a, mut b] = two();
    let (a, b) = (a.cpu.get_mut(), b.cpu.get_mut());
    apic::msr_write(a, 0x832, 2 << 17 | 0xec).expect("LVT");
    apic::set_deadline(a, u64::MAX / 2);
    signal_msi(&a.machine.clone(), 0xfee0_0000, 0x77);
    msr::write(a, msr::LSTAR, 0x1234).expect("LSTAR");
    let mut state = cpu::x86::CpuState::default();
    save(a, &mut state);
    state.apic[2] = 1;
    restore(b, &state).expect("usable");
    let mut again = cpu::x86::CpuState::default();
    save(b, &mut again);
    let clock = |s: &mut cpu::x86::CpuState| {
        s.tsc = 0;
        s.msrs.retain(|(n, _)| *n != 0x4b56_4dff);
        s.apic[0xd] = 0;
    };
    clock(&mut state);
    clock(&mut again);
    assert_eq!(state, again);
    assert_eq!(b.system.apic.pending(), Some(0x77));
}

#[test]
fn xsave_and_xrstor_carry_x87_and_vectors() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    cpu.xcr0 = cpu.system.cpuid.xcr0_mask();
    run(cpu, &[0xdb, 0xe3]).expect("fninit");
    cpu.rip = 0;
    run(cpu, &[0xd9, 0xeb]).expect("fldpi");
    cpu.ymm[3] = [1, 2, 3, 4];
    (cpu.gpr[RAX], cpu.gpr[RDX], cpu.gpr[3]) = (u64::MAX, u64::MAX, 0x1000);
    run(cpu, &[0x0f, 0xae, 0x23]).expect("xsave [rbx]");
    let before = get(cpu, 0x1020);
    assert_eq!(before, 0xc90f_daa2_2168_c235, "pi's significand");
    cpu.ymm[3] = [0; 4];
    run(cpu, &[0xdb, 0xe3]).expect("fninit");
    run(cpu, &[0x0f, 0xae, 0x2b]).expect("xrstor [rbx]");
    let avx = cpu.xcr0 & 4 != 0;
    assert_eq!(cpu.ymm[3], if avx { [1, 2, 3, 4] } else { [1, 2, 0, 0] });
    // An initial component comes back as zeros; a header with unknown bits is refused.
    put(cpu, 0x1200, 1);
    run(cpu, &[0x0f, 0xae, 0x2b]).expect("xrstor [rbx]");
    assert_eq!(cpu.ymm[3], [0; 4]);
    put(cpu, 0x1200, 1 << 9);
    assert_eq!(run(cpu, &[0x0f, 0xae, 0x2b]), Err(Fault::GP));
    run(cpu, &[0xdb, 0xe3]).expect("fninit");
}

#[test]
fn random_bytes_never_panic_the_interpreter() {
    use proptest::strategy::{Strategy, ValueTree};
    use proptest::test_runner::{Config, TestRunner};
    let mut frame = paged();
    let cpu = frame.cpu.get_mut();
    let mut runner = TestRunner::new(Config::default());
    let strategy = (
        proptest::array::uniform16(proptest::num::u8::ANY),
        proptest::array::uniform16(proptest::num::u64::ANY),
        0u32..4,
    );
    let strategy = strategy.boxed();
    for _ in 0..20_000 {
        let Ok(tree) = strategy.new_tree(&mut runner) else {
            continue;
        };
        let (code, registers, mode) = tree.current();
        cpu.gpr = registers.map(|r| if r & 1 == 0 { r & 0xffff } else { r });
        cpu.gpr[RCX] &= 0xfff;
        cpu.rip = 0x9000;
        cpu.cpl = if mode & 1 != 0 { 3 } else { 0 };
        cpu.segments[CS].attributes = if mode & 2 != 0 { 0xc09b } else { 0xa09b };
        for (n, byte) in code.iter().enumerate() {
            cpu.physical_write::<u8>(0x9000 + n as u64, *byte);
        }
        let bits = segment::bitness(cpu);
        let i = Decoder::with_ip(bits, &code, 0x9000, DecoderOptions::NONE).decode();
        // The tables must survive for the next round.
        let (cr0, cr3, cr4, efer) = (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer);
        let _ = execute(cpu, &i);
        (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) = (cr0, cr3, cr4, efer);
    }
    fpu::reset_host();
}
