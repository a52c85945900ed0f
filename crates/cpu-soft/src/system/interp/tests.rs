//! The interpreter against the host CPU: random instructions and states, run by both, compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use proptest::prelude::*;

use super::{integer, native};
use crate::machine::Machine;
use crate::state::{CS, Cpu, Fault, Flow, Frame, Mailbox, flag};
use crate::system::cr;

/// RAM of the test machine.
const RAM: usize = 0x1_0000;

/// A CPU in 64-bit mode with paging off, so that addresses are those of RAM.
pub(crate) fn cpu() -> Box<Frame> {
    let machine = Arc::new(Machine::new(1, cpu::CpuModel::Max));
    let memory =
        cpu::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), RAM)]).expect("memory");
    assert!(machine.set_memory(Arc::new(memory)));
    let mut frame = Frame::new(0, machine, Arc::new(Mailbox::new()));
    let cpu = frame.cpu.get_mut();
    cpu.efer = cr::EFER_LMA | cr::EFER_LME | cr::EFER_SCE;
    cpu.cr0 = cr::CR0_PE;
    cpu.cr4 = cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT | cr::CR4_OSXSAVE;
    cpu.xcr0 = 7;
    cpu.segments[CS].attributes = 0xa09b;
    frame
}

fn write_ram(cpu: &mut Cpu, at: u64, bytes: &[u8]) {
    for (i, chunk) in bytes.chunks(4096).enumerate() {
        cpu.write_bytes(
            at + i as u64 * 4096,
            chunk,
            crate::state::Rights::Supervisor,
        )
        .expect("in RAM");
    }
}

fn read_ram(cpu: &mut Cpu, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    cpu.read_bytes(at, &mut bytes, crate::state::Rights::Supervisor)
        .expect("in RAM");
    bytes
}

/// What is compared: instructions that the integer interpreter claims and the host can run in isolation.
fn comparable(i: &Instruction) -> bool {
    use Mnemonic as M;
    let known = matches!(
        i.mnemonic(),
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Mul
            | M::Imul
            | M::Div
            | M::Idiv
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Movbe
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Crc32
            | M::Adcx
            | M::Adox
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Lea
            | M::Nop
    ) || (i.condition_code() != iced_x86::ConditionCode::None
        && i.flow_control() == iced_x86::FlowControl::Next
        && i.encoding() == iced_x86::EncodingKind::Legacy);
    let plain = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => {
            let r = i.op_register(n);
            (r.is_gpr()) && r.full_register() != Register::RSP
        }
        OpKind::Memory => {
            i.memory_segment() != Register::FS
                && i.memory_segment() != Register::GS
                && i.memory_base().full_register() != Register::RSP
        }
        _ => true,
    });
    // BT with a register index reaches beyond the operand, which the native runner does not know.
    let far_bit = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register;
    let undefined_result = (i.mnemonic() == M::Bswap && i.op0_register().size() == 2)
        // LEA has no memory access and its address form is its point: compared by its own test.
        || (i.mnemonic() == M::Lea);
    known && plain && !far_bit && !undefined_result
}

/// RFLAGS bits not compared after `i` in this state.
fn undefined(i: &Instruction, cpu: &Cpu) -> u64 {
    use Mnemonic as M;
    let mut mask = native::undefined_flags(i);
    let shifts = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if shifts {
        mask |= flag::OF | flag::AF;
        let size = super::operand::size(i, 0);
        let last = i.op_count() - 1;
        let count = if i.op_kind(last) == OpKind::Register {
            cpu.gpr[1]
        } else {
            i.immediate(last)
        } & 63;
        if count & if size == 8 { 63 } else { 31 } >= size as u64 * 8 {
            mask |= flag::CF;
        }
    }
    mask
}

/// A 16-bit double shift by more than 16 has an undefined result.
fn undefined_value(i: &Instruction, cpu: &Cpu) -> bool {
    matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && super::operand::size(i, 0) == 2
        && (if i.op2_kind() == OpKind::Register {
            cpu.gpr[1]
        } else {
            i.immediate(2)
        }) & 31
            > 16
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u64..16).prop_map(|v| v),
        (0u32..64).prop_map(|s| 1u64 << s),
        (0u32..64).prop_map(|s| (1u64 << s).wrapping_sub(1)),
        Just(u64::MAX),
        any::<i8>().prop_map(|v| v as i64 as u64),
        any::<u32>().prop_map(u64::from),
    ]
}

/// Random instructions: prefixes, one of the opcode maps, a ModRM byte that names a register or `[register]`.
fn instruction() -> impl Strategy<Value = Instruction> {
    let prefix = prop::collection::vec(prop::sample::select(vec![0x66u8, 0xf2, 0xf3, 0xf0]), 0..2);
    let map = prop::sample::select(vec![0u8, 0, 0, 1, 1, 2, 3, 4, 5]);
    (
        prefix,
        any::<[u8; 12]>(),
        map,
        any::<u8>(),
        any::<bool>(),
        0u8..16,
    )
        .prop_filter_map(
            "not comparable",
            |(prefix, tail, map, opcode, memory, rex)| {
                let mut code = Vec::new();
                if map < 4 {
                    code.extend(&prefix);
                    code.push(0x40 | rex);
                }
                match map {
                    1 => code.push(0x0f),
                    2 => code.extend([0x0f, 0x38]),
                    3 => code.extend([0x0f, 0x3a]),
                    // VEX: three-byte form of maps 2 and 3.
                    4 => code.extend([0xc4, tail[10] & 0xe0 | 2, tail[11] & 0xfb]),
                    5 => code.extend([0xc4, tail[10] & 0xe0 | 3, tail[11] & 0xfb]),
                    _ => {}
                }
                code.push(opcode);
                let modrm = if memory {
                    tail[0] & 0x3f
                } else {
                    tail[0] | 0xc0
                };
                code.push(modrm);
                code.extend(&tail[1..10]);
                let mut decoder = Decoder::with_ip(64, &code, 0x4000, DecoderOptions::NONE);
                let i = decoder.decode();
                (!i.is_invalid() && comparable(&i)).then_some(i)
            },
        )
}

/// Runs `i` in both ways from the same state; an error says what differs.
fn compare(
    a: &mut Cpu,
    b: &mut Cpu,
    i: &Instruction,
    registers: &[u64; 16],
    flags: u64,
    at: u64,
) -> Result<Option<()>, String> {
    let data: Vec<u8> = registers.iter().flat_map(|r| r.to_le_bytes()).collect();
    for cpu in [&mut *a, &mut *b] {
        cpu.gpr = *registers;
        cpu.rflags = flags & flag::NATIVE & !flag::DF | flag::FIXED;
        cpu.rip = 0x4000;
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory {
            // Whatever the form, the operand starts at `at`, now and then across a page.
            let mut base = i.memory_base();
            if base == Register::None {
                base = i.memory_index();
            }
            if base.is_ip()
                || base == Register::None
                || i.memory_index() == i.memory_base()
                || base.size() != 8
            {
                return Ok(None);
            }
            let Some(place) = super::operand::general(base) else {
                return Ok(None);
            };
            cpu.gpr[place.index] = 0;
            let rest = super::operand::offset(cpu, i);
            let scale = if i.memory_base() == Register::None {
                u64::from(i.memory_index_scale())
            } else {
                1
            };
            if !at.wrapping_sub(rest).is_multiple_of(scale) {
                return Ok(None);
            }
            cpu.gpr[place.index] = at.wrapping_sub(rest) / scale;
            if super::operand::offset(cpu, i) != at {
                return Ok(None);
            }
            write_ram(cpu, at - 32, &data[..128]);
        }
    }
    if undefined_value(i, a) {
        return Ok(None);
    }
    let ignored = undefined(i, a);
    let mine = integer::execute(a, i);
    match mine {
        Err(fault) if fault == Fault::DE || fault == Fault::GP => return Ok(None),
        Err(fault) => return Err(format!("faulted: {fault:?}")),
        Ok(None) => return Err("not known to the interpreter".into()),
        Ok(Some(flow)) => assert_eq!(flow, Flow::Continue),
    }
    match native::execute(b, i) {
        Ok(Some(_)) => {}
        Ok(None) => return Ok(None),
        Err(fault) => return Err(format!("the host faulted: {fault:?}")),
    }
    if a.gpr != b.gpr {
        return Err(format!("registers\n ours {:x?}\n host {:x?}", a.gpr, b.gpr));
    }
    let difference = (a.rflags ^ b.rflags) & !ignored;
    if difference != 0 {
        return Err(format!(
            "flags: ours {:#x}, host {:#x}, ignored {ignored:#x}",
            a.rflags, b.rflags
        ));
    }
    if a.rip != b.rip {
        return Err(format!("rip {:#x} and {:#x}", a.rip, b.rip));
    }
    let (ram_a, ram_b) = (read_ram(a, at - 32, 96), read_ram(b, at - 32, 96));
    if ram_a != ram_b {
        return Err(format!("memory\n ours {ram_a:x?}\n host {ram_b:x?}"));
    }
    Ok(Some(()))
}

#[test]
fn integer_instructions_do_what_the_host_cpu_does() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, TestRunner};
    let (mut a, mut b) = (cpu(), cpu());
    let (a, b) = (a.cpu.get_mut(), b.cpu.get_mut());
    let mut runner = TestRunner::new(Config::default());
    let strategy = (
        instruction(),
        prop::array::uniform16(value()),
        any::<u64>(),
        prop::sample::select(vec![0x1000u64, 0x1fd0, 0x1ffc, 0x2008]),
    );
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let mut wrong = BTreeMap::new();
    for _ in 0..60_000 {
        let Ok(tree) = strategy.new_tree(&mut runner) else {
            continue;
        };
        let (i, mut registers, flags, at) = tree.current();
        // Counts and small divisors come up often enough to matter.
        registers[4] = 0x8000;
        let name = format!("{:?}", i.code());
        match compare(a, b, &i, &registers, flags, at) {
            Ok(Some(())) => *seen.entry(name).or_default() += 1,
            Ok(None) => {}
            Err(what) => {
                _ = wrong
                    .entry(name)
                    .or_insert_with(|| format!("{:?}: {what}", i.code()))
            }
        }
    }
    eprintln!("{} forms of instructions compared", seen.len());
    assert!(
        wrong.is_empty(),
        "{} forms differ:\n{}",
        wrong.len(),
        wrong.values().cloned().collect::<Vec<_>>().join("\n")
    );
    assert!(seen.len() > 250, "only {} forms were compared", seen.len());
}

fn decode(code: &[u8], bits: u32) -> Instruction {
    Decoder::with_ip(bits, code, 0x4000, DecoderOptions::NONE).decode()
}

#[test]
fn a_vector_addition_of_memory_in_a_device_is_run_on_the_host() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    cpu.ymm[1] = [1, 2, 0, 0];
    write_ram(
        cpu,
        0x1000,
        &[5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
    );
    cpu.gpr[0] = 0x1000;
    // paddq xmm1, [rax]
    let i = decode(&[0x66, 0x0f, 0xd4, 0x08], 64);
    assert_eq!(crate::system::execute(cpu, &i), Ok(Flow::Continue));
    assert_eq!(cpu.ymm[1][..2], [6, 9]);
    assert_eq!(cpu.gpr[0], 0x1000);
}

#[test]
fn an_unmasked_division_by_zero_raises_a_simd_exception_and_changes_nothing() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    cpu.mxcsr = 0x1f80 & !(1 << 9);
    cpu.ymm[0] = [1.0f64.to_bits(), 0, 0, 0];
    cpu.ymm[1] = [0; 4];
    // divsd xmm0, xmm1
    let i = decode(&[0xf2, 0x0f, 0x5e, 0xc1], 64);
    assert_eq!(crate::system::execute(cpu, &i), Err(Fault::XM));
    assert_eq!(cpu.ymm[0][0], 1.0f64.to_bits());
    assert_eq!(cpu.mxcsr & 4, 4);
}

#[test]
fn the_stack_pointer_can_be_what_a_vector_instruction_with_a_memory_operand_writes() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    write_ram(cpu, 0x2000, &1234.0f64.to_le_bytes());
    (cpu.gpr[4], cpu.gpr[1]) = (0x1000, 0x200);
    // cvtsd2si esp, [rsp + rcx*8]
    let i = decode(&[0xf2, 0x0f, 0x2d, 0x24, 0xcc], 64);
    assert_eq!(crate::system::execute(cpu, &i), Ok(Flow::Continue));
    assert_eq!((cpu.gpr[4], cpu.gpr[1], cpu.gpr[0]), (1234, 0x200, 0));
    // cvtsd2si rsp, xmm0
    cpu.ymm[0] = [(-5.0f64).to_bits(), 0, 0, 0];
    let i = decode(&[0xf2, 0x48, 0x0f, 0x2d, 0xe0], 64);
    assert_eq!(crate::system::execute(cpu, &i), Ok(Flow::Continue));
    assert_eq!(cpu.gpr[4] as i64, -5);
}

#[test]
fn a_repeated_move_with_overlap_repeats_the_pattern() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    write_ram(cpu, 0x1000, b"ab");
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (5000, 0x1000, 0x1002);
    // rep movsb
    let i = decode(&[0xf3, 0xa4], 64);
    assert_eq!(crate::system::execute(cpu, &i), Ok(Flow::Continue));
    assert_eq!(
        (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]),
        (0, 0x1000 + 5000, 0x1002 + 5000)
    );
    let all = read_ram(cpu, 0x1000, 4096);
    assert!(all.chunks(2).all(|c| c == b"ab"));
}

#[test]
fn a_scan_for_a_byte_stops_behind_it() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    write_ram(cpu, 0x1ff0, b"0123456789abcdef0123x");
    (cpu.gpr[0], cpu.gpr[1], cpu.gpr[7]) = (u64::from(b'x'), u64::MAX, 0x1ff0);
    // repne scasb
    let i = decode(&[0xf2, 0xae], 64);
    assert_eq!(crate::system::execute(cpu, &i), Ok(Flow::Continue));
    assert_eq!(cpu.gpr[7], 0x1ff0 + 21);
    assert_ne!(cpu.rflags & flag::ZF, 0);
}

#[test]
fn real_mode_code_switches_to_protected_mode_and_pushes_there() {
    let mut frame = cpu();
    let cpu = frame.cpu.get_mut();
    cpu.efer = 0;
    crate::system::save::initialize(cpu);
    crate::system::save::start_up(cpu, 1);
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x0f, 0x01, 0x16, 0x40, 0x00,             // lgdt [0x40] (ds is set below)
        0x66, 0xb8, 0x01, 0x00, 0x00, 0x00,       // mov eax, 1
        0x0f, 0x22, 0xc0,                         // mov cr0, eax
        0x66, 0xea, 0x20, 0x10, 0, 0, 0x08, 0,    // jmp 8:0x1020
    ];
    write_ram(cpu, 0x1000, code);
    #[rustfmt::skip]
    let flat: &[u8] = &[
        0x66, 0xb8, 0x10, 0x00,                   // mov ax, 0x10
        0x8e, 0xd0,                               // mov ss, ax
        0xbc, 0x00, 0x30, 0, 0,                   // mov esp, 0x3000
        0x68, 0x78, 0x56, 0x34, 0x12,             // push 0x12345678
    ];
    write_ram(cpu, 0x1020, flat);
    write_ram(cpu, 0x1040, &[0x17, 0, 0x50, 0x10, 0, 0]);
    for (n, descriptor) in [0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        write_ram(cpu, 0x1050 + n as u64 * 8, &descriptor.to_le_bytes());
    }
    cpu.segments[3].base = 0x1000;
    for _ in 0..8 {
        crate::system::interpret(cpu).unwrap_or_else(|f| panic!("{f:?} at {:#x}", cpu.rip));
    }
    assert_eq!(cpu.gpr[4], 0x2ffc);
    assert_eq!(read_ram(cpu, 0x2ffc, 4), 0x1234_5678u32.to_le_bytes());
    assert_eq!(crate::system::segment::bitness(cpu), 32);
}
