//! Whole machines with guests of a few instructions, on every CPU back end this host has.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::boot::{BootError, Kernel, Protocol, place};
use vmm::control::Outcome;
use vmm::machine::{CpuChoice, Machine, MachineConfig};

const CODE: u64 = 0x100_0000;
const IDT: u64 = 0x30_0000;
const COUNTER: u64 = 0x31_0000;
const TRAMPOLINE: u64 = 0x1_0000;
const COM1: i32 = 0x3f8;
const EXIT: i32 = 0xf4;
const POWER: i32 = 0x600;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn wait_for(&self, byte: u8) {
        until("the guest to write", || {
            self.0.lock().unwrap().contains(&byte)
        });
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The back ends that can run here.
fn back_ends() -> Vec<CpuChoice> {
    let mut found = vec![CpuChoice::Soft];
    match cpu_kvm::probe() {
        cpu_kvm::Probe::Usable | cpu_kvm::Probe::EmulatedOnly => found.push(CpuChoice::Kvm),
        other => eprintln!("SKIPPED: KVM: {other}"),
    }
    found
}

/// An ELF file that is loaded to [`CODE`] and begins there.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(120, 0);
    file[16] = 2;
    file[18] = 62;
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 1;
    file[64] = 1;
    let len = code.len() as u64;
    for (at, value) in [
        (72, 120),
        (80, CODE),
        (88, CODE),
        (96, len),
        (104, len),
        (112, 1),
    ] {
        file[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    file.extend(code);
    file
}

fn machine(cpu: CpuChoice, cpus: u32, code: &[u8]) -> (Machine, Sink) {
    let sink = Sink::default();
    let config = MachineConfig {
        cpus,
        memory: 64 << 20,
        cpu,
        debug_exit: true,
        ..MachineConfig::default()
    };
    let mut machine = Machine::new(config, Box::new(sink.clone())).unwrap();
    let kernel = Kernel::parse(elf(code), Protocol::Linux64).unwrap();
    let memory = machine.memory.clone();
    machine
        .set_start::<BootError>(|state| {
            place(&memory, &kernel, None, "", 0, Protocol::Linux64, state)?;
            state.idtr.base = IDT;
            state.idtr.limit = 0xfff;
            Ok(())
        })
        .unwrap();
    (machine, sink)
}

fn assemble(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    assembler.assemble(CODE).unwrap()
}

fn out(a: &mut CodeAssembler, port: i32, value: i32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

fn write_msr(a: &mut CodeAssembler, number: i32, low: u32, high: u32) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.mov(eax, low)?;
    a.mov(edx, high)?;
    a.wrmsr()
}

/// The local APIC in x2APIC mode, switched on.
fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    write_msr(a, 0x80f, 0x1ff, 0)
}

fn ends_with(machine: &mut Machine) -> Outcome {
    machine.start().unwrap();
    let outcome = machine.control.wait_for_end_until(Duration::from_secs(20));
    assert!(outcome.is_some(), "the guest did not end");
    machine.wait()
}

#[test]
fn a_guest_prints_and_powers_off() {
    let code = assemble(|a| {
        for byte in *b"hello" {
            out(a, COM1, i32::from(byte))?;
        }
        out(a, POWER, 0x20 | 5 << 2)?;
        a.hlt()
    });
    for cpu in back_ends() {
        let (mut machine, sink) = machine(cpu, 1, &code);
        assert_eq!(ends_with(&mut machine), Outcome::PowerOff, "{cpu:?}");
        assert_eq!(&*sink.0.lock().unwrap(), b"hello");
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    // The table of interrupts is empty.
    let code = assemble(|a| a.ud2());
    for cpu in back_ends() {
        let (mut machine, _) = machine(cpu, 1, &code);
        assert!(
            matches!(ends_with(&mut machine), Outcome::Crash(_)),
            "{cpu:?}"
        );
    }
}

#[test]
fn a_busy_guest_and_a_halted_one_are_paused_and_ended() {
    let busy = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(COUNTER))?;
        a.jmp(again)
    });
    let halted = assemble(|a| {
        a.cli()?;
        a.hlt()
    });
    for cpu in back_ends() {
        for code in [&busy, &halted] {
            let (mut machine, _) = machine(cpu, 2, code);
            machine.start().unwrap();
            std::thread::sleep(Duration::from_millis(5));
            assert!(machine.pause(), "{cpu:?}");
            let count = || {
                machine
                    .memory
                    .read_obj::<u32>(GuestAddress(COUNTER))
                    .unwrap()
            };
            let before = count();
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(count(), before, "{cpu:?} runs while paused");
            assert!(machine.resume());
            if code == &busy {
                until("the guest to go on", || count() != before);
            }
            machine.control.end(Outcome::Killed);
            assert_eq!(machine.wait(), Outcome::Killed);
        }
    }
}

/// A guest that says `r` when it is ready, counts the interrupts of vector 0x41, ends each, and exits with 7
/// after `count`.
fn counts_interrupts(count: i32) -> (Vec<u8>, u64) {
    counts_interrupts_after(count, |_| Ok(()))
}

/// As [`counts_interrupts`]; it does `first` before it waits.
fn counts_interrupts_after(
    count: i32,
    first: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> (Vec<u8>, u64) {
    let mut handler_at = 0;
    let code = assemble(|a| {
        enable_apic(a)?;
        out(a, COM1, i32::from(b'r'))?;
        a.sti()?;
        first(a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)?;
        handler_at = a.instructions().len();
        let mut done = a.create_label();
        a.inc(dword_ptr(COUNTER))?;
        a.mov(eax, dword_ptr(COUNTER))?;
        a.cmp(eax, count)?;
        a.je(done)?;
        write_msr(a, 0x80b, 0, 0)?;
        a.iretq()?;
        a.set_label(&mut done)?;
        out(a, EXIT, 7)?;
        a.hlt()
    });
    let decoded: Vec<_> = iced_x86::Decoder::with_ip(64, &code, CODE, 0)
        .iter()
        .map(|i| i.ip())
        .collect();
    (code, decoded[handler_at])
}

/// What the guest has counted to.
fn counted(machine: &Machine) -> u32 {
    let counter = machine.memory.read_obj(GuestAddress(COUNTER));
    counter.unwrap()
}

fn set_gate(machine: &Machine, vector: u64, handler: u64) {
    let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    machine
        .memory
        .write_obj(gate, GuestAddress(IDT + vector * 16))
        .unwrap();
    machine
        .memory
        .write_obj(handler >> 32, GuestAddress(IDT + vector * 16 + 8))
        .unwrap();
}

fn program_pin(machine: &Machine, pin: u32, entry: u64) {
    for (register, value) in [
        (0x11 + 2 * pin, (entry >> 32) as u32),
        (0x10 + 2 * pin, entry as u32),
    ] {
        machine.mmio.write(0xfec0_0000, &register.to_le_bytes());
        machine.mmio.write(0xfec0_0010, &value.to_le_bytes());
    }
}

#[test]
fn a_held_level_interrupt_comes_again_after_its_end() {
    let (code, handler) = counts_interrupts(3);
    for cpu in back_ends() {
        if cpu == CpuChoice::Kvm && cpu_kvm::probe() == cpu_kvm::Probe::EmulatedOnly {
            eprintln!(
                "SKIPPED: KVM without virtualization does not report the end of level interrupts"
            );
            continue;
        }
        let (mut machine, sink) = machine(cpu, 1, &code);
        set_gate(&machine, 0x41, handler);
        program_pin(&machine, 16, 0x8041);
        machine.start().unwrap();
        sink.wait_for(b'r');
        let line = machine.ioapic.line(16);
        line.set(true);
        let outcome = machine.control.wait_for_end_until(Duration::from_secs(20));
        assert_eq!(outcome, Some(Outcome::DebugExit(7)), "{cpu:?}");
    }
}

#[test]
fn a_message_wakes_a_halted_guest() {
    let (code, handler) = counts_interrupts(1);
    for cpu in back_ends() {
        let (mut machine, sink) = machine(cpu, 1, &code);
        set_gate(&machine, 0x41, handler);
        machine.start().unwrap();
        sink.wait_for(b'r');
        machine.vm.signal_msi(0xfee0_0000, 0x41).unwrap();
        let outcome = machine.control.wait_for_end_until(Duration::from_secs(20));
        assert_eq!(outcome, Some(Outcome::DebugExit(7)), "{cpu:?}");
    }
}

#[test]
fn a_line_of_the_hosts_kernel_interrupts_without_a_call_and_sends_what_it_was_told_last() {
    let (code, handler) = counts_interrupts(2);
    let mut tried = false;
    for cpu in back_ends() {
        let (mut machine, sink) = machine(cpu, 1, &code);
        let Some(lines) = machine.vm.message_lines() else {
            continue;
        };
        tried = true;
        let line = lines.open_line().unwrap();
        let other = lines.open_line().unwrap();
        other.set_message(0xfee0_0000, 0x99).unwrap();
        line.set_message(0xfee0_0000, 0x99).unwrap();
        line.set_message(0xfee0_0000, 0x41).unwrap();
        drop(other);
        set_gate(&machine, 0x41, handler);
        machine.start().unwrap();
        sink.wait_for(b'r');
        for count in 1..=2 {
            rustix::io::write(line.event(), &1u64.to_ne_bytes()).unwrap();
            until("the interrupt", || counted(&machine) == count);
        }
        let outcome = machine.control.wait_for_end_until(Duration::from_secs(20));
        assert_eq!(outcome, Some(Outcome::DebugExit(7)), "{cpu:?}");
        drop(line);
    }
    if !tried {
        eprintln!("SKIPPED: no back end of this host has interrupt lines (KVM_IRQFD)");
    }
}

/// The slot 1 device's configuration space through ECAM.
struct Config<'a>(&'a Machine);

impl Config<'_> {
    fn read(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.0.mmio.read(0xe800_0000 + (1 << 15) + at, &mut word);
        u32::from_le_bytes(word)
    }
    fn write(&self, at: u64, bytes: &[u8]) {
        self.0.mmio.write(0xe800_0000 + (1 << 15) + at, bytes);
    }
    fn capability(&self, id: u32) -> u64 {
        let mut at = u64::from(self.read(0x34) & 0xff);
        while self.read(at) & 0xff != id {
            at = u64::from(self.read(at) >> 8 & 0xff);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at
    }
}

#[test]
fn a_guest_rings_a_virtio_device_and_is_interrupted_when_it_is_done() {
    const RING: u64 = 0x32_0000;
    const DATA: u64 = 0x33_0000;
    // The first device's BAR: the window's start.
    const BAR: u64 = 0xc000_0000;
    let (code, handler) = counts_interrupts_after(1, |a| {
        a.mov(rbx, BAR + 0x3000)?;
        a.mov(word_ptr(rbx), 0)
    });
    for cpu in back_ends() {
        let (mut machine, sink) = machine(cpu, 1, &code);
        set_gate(&machine, 0x41, handler);
        machine
            .add_virtio("rng0", Arc::new(vmm::virtio::rng::Rng))
            .unwrap();
        let config = Config(&machine);
        assert_eq!(u64::from(config.read(0x10) & !0xf), BAR);
        config.write(4, &[6, 0]);
        let table = u64::from(config.read(0x20) & !0xf);
        let msix = config.capability(0x11);
        // Masked, and so kept, until the guest can take it: a slow host may serve the queue before.
        config.write(msix + 2, &0xc000u16.to_le_bytes());
        machine.mmio.write(table, &0xfee0_0000u64.to_le_bytes());
        machine.mmio.write(table + 8, &0x41u64.to_le_bytes());
        let set = |offset: u64, bytes: &[u8]| assert!(machine.mmio.write(BAR + offset, bytes));
        set(20, &[3]);
        set(8, &1u32.to_le_bytes());
        set(12, &1u32.to_le_bytes());
        set(20, &[11]);
        set(24, &16u16.to_le_bytes());
        set(26, &0u16.to_le_bytes());
        for (at, ring) in [(32, RING), (40, RING + 0x100), (48, RING + 0x200)] {
            set(at, &ring.to_le_bytes());
        }
        set(28, &1u16.to_le_bytes());
        let write = |at: u64, bytes: &[u8]| machine.dma.write(at, bytes).unwrap();
        write(RING, &DATA.to_le_bytes());
        write(RING + 8, &(64u64 | 2 << 32).to_le_bytes());
        set(20, &[15]);
        // Announced only now: it is the guest's ring that the device hears.
        std::thread::sleep(Duration::from_millis(5));
        write(RING + 0x102, &1u16.to_le_bytes());
        machine.start().unwrap();
        sink.wait_for(b'r');
        Config(&machine).write(msix + 2, &0x8000u16.to_le_bytes());
        let outcome = machine.control.wait_for_end_until(Duration::from_secs(20));
        assert_eq!(outcome, Some(Outcome::DebugExit(7)), "{cpu:?}");
        assert_eq!(machine.dma.read_u16(RING + 0x202).unwrap(), 1);
        let mut random = [0; 64];
        machine.dma.read(DATA, &mut random).unwrap();
        assert_ne!(random, [0; 64]);
    }
}

#[test]
fn a_second_cpu_starts_where_it_is_told() {
    let code = assemble(|a| {
        enable_apic(a)?;
        // INIT, then start-up at page 0x10, to APIC id 1.
        write_msr(a, 0x830, 0x4500, 1)?;
        write_msr(a, 0x830, 0x4600 | (TRAMPOLINE >> 12) as u32, 1)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.pause()?;
        a.jmp(again)
    });
    let mut trampoline = CodeAssembler::new(16).unwrap();
    trampoline.mov(al, 9).unwrap();
    trampoline.out(EXIT, al).unwrap();
    trampoline.hlt().unwrap();
    let trampoline = trampoline.assemble(0).unwrap();
    for cpu in back_ends() {
        let (mut machine, _) = machine(cpu, 2, &code);
        machine
            .memory
            .write_slice(&trampoline, GuestAddress(TRAMPOLINE))
            .unwrap();
        assert_eq!(ends_with(&mut machine), Outcome::DebugExit(9), "{cpu:?}");
    }
}

/// Saves a paused machine and makes another on `cpu` that has its memory and its state.
fn moved(first: &Machine, cpu: CpuChoice, code: &[u8]) -> (Machine, Sink) {
    let state = serde_json::to_string(&first.save().unwrap()).unwrap();
    let (mut second, sink) = machine(cpu, 1, code);
    for region in first.memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        first
            .memory
            .read_slice(&mut bytes, region.start_addr())
            .unwrap();
        second
            .memory
            .write_slice(&bytes, region.start_addr())
            .unwrap();
    }
    second
        .restore(&serde_json::from_str(&state).unwrap())
        .unwrap();
    (second, sink)
}

/// Each way from one back end of this host to one: the same and another.
fn ways() -> Vec<(CpuChoice, CpuChoice)> {
    let found = back_ends();
    found
        .iter()
        .flat_map(|from| found.iter().map(|to| (*from, *to)))
        .collect()
}

#[test]
fn a_machine_goes_on_in_another_on_either_cpu_after_save_and_restore() {
    // Counts in a register and shows it in memory until the host raises a flag, then exits with 1 where both agree and a
    // vector register, the x87 stack, a model-specific register and the carry flag are as they were before.
    let flag = COUNTER + 64;
    let program = |vectors: bool| assemble(|a| counts_and_compares(a, flag, vectors));
    for (from, to) in ways() {
        // KVM without virtualization interprets, and knows neither.
        let emulated = cpu_kvm::probe() == cpu_kvm::Probe::EmulatedOnly
            && [from, to].contains(&CpuChoice::Kvm);
        let code = program(!emulated);
        let (mut first, _) = machine(from, 1, &code);
        first.start().unwrap();
        until("the guest to count", || counted(&first) > 100);
        assert!(first.pause());
        // It must have counted at least as far as it had when saved.
        first
            .memory
            .write_obj(counted(&first), GuestAddress(COUNTER + 4))
            .unwrap();
        let (mut second, _) = moved(&first, to, &code);
        drop(first);
        second.memory.write_obj(1u32, GuestAddress(flag)).unwrap();
        assert_eq!(
            ends_with(&mut second),
            Outcome::DebugExit(1),
            "{from:?} to {to:?}"
        );
    }
}

fn counts_and_compares(a: &mut CodeAssembler, flag: u64, vectors: bool) -> Result<(), IcedError> {
    let (mut again, mut wrong) = (a.create_label(), a.create_label());
    write_msr(a, 0xc000_0102u32 as i32, 0x1234_5678, 0x7f)?;
    if vectors {
        // OSFXSR.
        a.mov(rax, cr4)?;
        a.or(eax, 0x200)?;
        a.mov(cr4, rax)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.movq(xmm5, rax)?;
        a.fldpi()?;
    }
    a.xor(ebx, ebx)?;
    a.stc()?;
    a.set_label(&mut again)?;
    // INC, MOV and the comparison by JRCXZ leave the carry alone.
    a.inc(ebx)?;
    a.mov(dword_ptr(COUNTER), ebx)?;
    a.mov(ecx, dword_ptr(flag))?;
    a.jrcxz(again)?;
    a.jnc(wrong)?;
    a.cmp(ebx, dword_ptr(COUNTER + 4))?;
    a.jb(wrong)?;
    if vectors {
        a.movq(rax, xmm5)?;
        a.mov(rdx, 0x1122_3344_5566_7788u64)?;
        a.cmp(rax, rdx)?;
        a.jne(wrong)?;
        a.fldpi()?;
        a.fcompp()?;
        a.fnstsw(ax)?;
        a.and(eax, 0x4500)?;
        a.cmp(eax, 0x4000)?;
        a.jne(wrong)?;
    }
    a.mov(ecx, 0xc000_0102u32)?;
    a.rdmsr()?;
    a.cmp(eax, 0x1234_5678)?;
    a.jne(wrong)?;
    out(a, EXIT, 1)?;
    a.hlt()?;
    a.set_label(&mut wrong)?;
    out(a, EXIT, 2)?;
    a.hlt()
}

#[test]
fn a_halted_machine_with_a_timer_wakes_in_another_on_either_cpu() {
    // The APIC's timer in its periodic mode; vector 0x41 is counted, and the third ends the machine. It is moved after the first.
    let (code, handler) = counts_interrupts_after(3, |a| {
        write_msr(a, 0x83e, 0xb, 0)?;
        write_msr(a, 0x832, 0x2_0041, 0)?;
        write_msr(a, 0x838, 200_000_000, 0)
    });
    for (from, to) in ways() {
        let (mut first, sink) = machine(from, 1, &code);
        set_gate(&first, 0x41, handler);
        first.start().unwrap();
        sink.wait_for(b'r');
        until("the timer", || counted(&first) == 1);
        assert!(first.pause());
        let (mut second, _) = moved(&first, to, &code);
        drop(first);
        assert_eq!(
            ends_with(&mut second),
            Outcome::DebugExit(7),
            "{from:?} to {to:?}"
        );
    }
}
