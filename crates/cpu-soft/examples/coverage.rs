//! Prints which instructions of a 64-bit ELF file the interpreter knows: every distinct opcode of its executable
//! sections is executed once.
//!
//!     cargo run -p cpu-soft --example coverage -- vmlinux [more files]

use std::collections::BTreeMap;
use std::sync::Arc;

use cpu_soft::machine::Machine;
use cpu_soft::state::{CS, Fault, Frame, Mailbox};
use cpu_soft::system;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

fn main() {
    let mut seen: BTreeMap<String, (Instruction, u64)> = BTreeMap::new();
    for path in std::env::args().skip(1) {
        match std::fs::read(&path) {
            Ok(file) => collect(&file, &mut seen),
            Err(error) => eprintln!("{path}: {error}"),
        }
    }
    let machine = Arc::new(Machine::new(1, cpu::CpuModel::Max));
    let memory =
        cpu::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).expect("memory");
    machine.set_memory(Arc::new(memory));
    let (mut known, mut unknown, mut refused) = (0, Vec::new(), Vec::new());
    let mut executed = [0u64; 2];
    for (name, (instruction, count)) in &seen {
        let mut frame = Frame::new(0, machine.clone(), Arc::new(Mailbox::new()));
        let cpu = frame.cpu.get_mut();
        cpu.efer = 0xd01;
        cpu.cr0 = 0x33;
        cpu.cr4 = 0x5_0620;
        cpu.xcr0 = 7;
        cpu.segments[CS].attributes = 0xa09b;
        cpu.gpr = [0x8000; 16];
        cpu.rip = instruction.ip();
        let model = cpu.system.cpuid.clone();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            system::execute(cpu, instruction)
        }));
        match outcome {
            Ok(Err(Fault::UD)) if must_be_undefined(&model, instruction) => {
                refused.push(name.clone())
            }
            Ok(Err(Fault::UD)) | Err(_) => {
                executed[1] += count;
                unknown.push(format!("{name} ({count})"));
            }
            Ok(_) => {
                executed[0] += count;
                known += 1;
            }
        }
    }
    println!(
        "{} opcodes: {known} known, {} undefined on this CPU model, {} unknown",
        seen.len(),
        refused.len(),
        unknown.len()
    );
    println!("{} occurrences known, {} unknown", executed[0], executed[1]);
    println!("undefined on purpose: {}", refused.join(" "));
    println!("unknown: {}", unknown.join(" "));
}

/// Instructions of features that CPUID does not show, and those that are there to fault.
fn must_be_undefined(model: &cpu_soft::system::cpuid::Cpuid, i: &Instruction) -> bool {
    use Mnemonic as M;
    !model.offers(i)
        || matches!(
            i.mnemonic(),
            M::Ud0 | M::Ud1 | M::Ud2 | M::Sysret | M::Sysretq | M::Sysexit | M::Sysexitq
        )
}

/// Adds the instructions of the file's executable sections.
fn collect(file: &[u8], seen: &mut BTreeMap<String, (Instruction, u64)>) {
    let at = |offset: usize, len: usize| -> u64 {
        let mut word = [0u8; 8];
        if let Some(bytes) = file.get(offset..offset + len) {
            word[..len].copy_from_slice(bytes);
        }
        u64::from_le_bytes(word)
    };
    let (headers, size, count) = (
        at(0x28, 8) as usize,
        at(0x3a, 2) as usize,
        at(0x3c, 2) as usize,
    );
    for header in (0..count).map(|n| headers + n * size) {
        let (kind, flags) = (at(header + 4, 4), at(header + 8, 8));
        let (address, offset, len) = (
            at(header + 16, 8),
            at(header + 24, 8) as usize,
            at(header + 32, 8) as usize,
        );
        if kind != 1 || flags & 4 == 0 {
            continue;
        }
        let Some(code) = file.get(offset..offset + len) else {
            continue;
        };
        for instruction in &mut Decoder::with_ip(64, code, address, DecoderOptions::NONE) {
            if !instruction.is_invalid() {
                seen.entry(format!("{:?}", instruction.code()))
                    .or_insert((instruction, 0))
                    .1 += 1;
            }
        }
    }
}
