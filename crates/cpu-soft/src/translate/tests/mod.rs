//! Random instructions, alone and in sequences of up to eight, run by the host itself between a state-load and a state-save, by
//! the translator (chained and one instruction at a time) and by the interpreter: registers, flags, vectors, x87, memory and
//! faults must agree. `BERTH_SEED` and `BERTH_ROUNDS` choose others and more; `BERTH_COVERAGE=1` lists every opcode,
//! `BERTH_SHOW=1` each sequence before it runs.

mod calls;
mod generate;
mod place;
mod rig;

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, Instruction, Mnemonic, RflagsBits};

use super::kind;
use crate::host::Guard;
use crate::state::flag;
use generate::{Random, Sequence};
use rig::{CODE, End, Page, State};

/// RFLAGS bits of iced's flags.
fn architectural(bits: u32) -> u64 {
    [
        (RflagsBits::CF, flag::CF),
        (RflagsBits::PF, flag::PF),
        (RflagsBits::AF, flag::AF),
        (RflagsBits::ZF, flag::ZF),
        (RflagsBits::SF, flag::SF),
        (RflagsBits::OF, flag::OF),
    ]
    .iter()
    .filter(|(b, _)| bits & b != 0)
    .map(|(_, f)| f)
    .sum()
}

fn difference(
    native: &(State, End),
    other: &(State, End),
    ignored: u64,
    mmx: bool,
    gathers: bool,
) -> Option<String> {
    let ((a, end), (b, other_end)) = (native, other);
    if end != other_end {
        return Some(format!("it ended {end:?}, not {other_end:?}"));
    }
    // How much of its registers a gather that faults has loaded is the processor's own business, as long as it can go on.
    let vectors = !gathers || *end == End::Through;
    for n in 0..16 {
        if a.gpr[n] != b.gpr[n] {
            return Some(format!("register {n}: {:x}, not {:x}", a.gpr[n], b.gpr[n]));
        }
        if vectors && a.ymm[n] != b.ymm[n] {
            return Some(format!("ymm{n}: {:x?}, not {:x?}", a.ymm[n], b.ymm[n]));
        }
    }
    // Where a fault stops a block, flags that are dead after it are not kept.
    let ignored = if *end == End::Through {
        ignored
    } else {
        u64::MAX
    };
    if (a.rflags ^ b.rflags) & !ignored != 0 {
        return Some(format!("flags: {:x}, not {:x}", a.rflags, b.rflags));
    }
    if a.mxcsr != b.mxcsr {
        return Some(format!("mxcsr: {:x}, not {:x}", a.mxcsr, b.mxcsr));
    }
    // Processors reset the x87 stack's top on an MMX instruction even where its access then faults.
    if a.x87 != b.x87 && !(mmx && *end != End::Through) {
        return Some(format!(
            "x87:\n {:x?}, not\n {:x?}",
            &a.x87[..160],
            &b.x87[..160]
        ));
    }
    let at = (0..a.data.len()).find(|n| a.data[*n] != b.data[*n])?;
    let end = (at + 8).min(a.data.len());
    Some(format!(
        "memory at {at:x}: {:x?}, not {:x?}",
        &a.data[at..end],
        &b.data[at..end]
    ))
}

/// Flags that the architecture leaves undefined after the sequence; `None` where it uses such flags itself.
fn undefined_flags(text: &[Instruction]) -> Option<u64> {
    let mut undefined = 0u32;
    // What a jump that skips the next instruction leaves undefined.
    let mut skipping = None;
    // A second time, for the flags that the next round of a loop finds.
    for i in text.iter().chain(text) {
        // (A count that may be zero leaves flags alone: as if it used them.)
        if (i.rflags_read() | kind::flags(i).0) & undefined != 0 {
            return None;
        }
        let before = skipping.take();
        undefined &= !(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
        undefined |= i.rflags_undefined();
        if matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
            // A count that is a whole turn: processors differ in OF.
            undefined |= RflagsBits::OF;
        }
        undefined |= before.unwrap_or(0);
        if i.is_jcc_short() {
            skipping = Some(undefined);
        }
    }
    Some(architectural(undefined))
}

/// Results that the architecture leaves undefined.
fn undefined_result(text: &[Instruction]) -> bool {
    text.iter().any(|i| {
        let narrow = i.op0_register().size() == 2 || i.memory_size().size() == 2;
        narrow
            && matches!(
                i.mnemonic(),
                Mnemonic::Shld | Mnemonic::Shrd | Mnemonic::Bswap
            )
    })
}

#[derive(Default)]
struct Tally {
    ran: u64,
    faults: u64,
    covered: BTreeSet<Code>,
    faulted: BTreeSet<Code>,
    wrong: BTreeMap<String, String>,
}

#[test]
fn translator_and_interpreter_do_what_the_host_does() {
    let Some(mut rig) = rig::rig() else { return };
    let (frame, range, fault) = rig.vcpu.cpu().place_of_code();
    let _guard = Guard::new(frame, range, fault).expect("guard");
    let number = |name: &str, usual: u64| {
        std::env::var(name)
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or(usual)
    };
    let mut random = Random(number("BERTH_SEED", 1));
    let rounds = number("BERTH_ROUNDS", 10_000);
    let mut tally = Tally::default();
    while tally.ran < rounds && tally.wrong.len() < 12 {
        let mut state = generate::state(&mut random);
        let start = CODE
            + match random.below(8) {
                0 => 0x1000 - random.below(40),
                _ => random.below(0x800),
            };
        let made = if random.one_in(2) {
            generate::alone(&mut random, &mut state, start)
        } else {
            generate::sequence(&mut random, &mut state, start)
        };
        let Some(sequence) = made else { continue };
        let cpuid = std::sync::Arc::clone(&rig.vcpu.cpu().system.cpuid);
        if !sequence.text.iter().all(|i| cpuid.offers(i)) || undefined_result(&sequence.text) {
            continue;
        }
        let Some(ignored) = undefined_flags(&sequence.text) else {
            continue;
        };
        let page = match random.below(8) {
            0 => Page::Absent,
            1 => Page::ReadOnly,
            _ => Page::Writable,
        };
        round(&mut rig, &sequence, &state, page, ignored, &mut tally);
    }
    eprintln!(
        "{} sequences, {} ended in a fault, {} opcodes covered, {} of them faulting",
        tally.ran,
        tally.faults,
        tally.covered.len(),
        tally.faulted.len()
    );
    if std::env::var_os("BERTH_COVERAGE").is_some() {
        for code in &tally.covered {
            eprintln!("{code:?}");
        }
    }
    assert!(
        tally.wrong.is_empty(),
        "{}",
        tally
            .wrong
            .values()
            .cloned()
            .collect::<Vec<_>>()
            .join("\n\n")
    );
    assert!(
        rounds < 10_000 || tally.covered.len() > 1000,
        "only {} opcodes",
        tally.covered.len()
    );
}

#[test]
fn an_address_relative_to_eip_is_the_guests_and_has_32_bits() {
    let Some(mut rig) = rig::rig() else { return };
    let (frame, range, fault) = rig.vcpu.cpu().place_of_code();
    let _guard = Guard::new(frame, range, fault).expect("guard");
    let state = generate::state(&mut Random(1));
    let start = CODE + 0x40;
    for (code, length) in [(&[0x67, 0x8d, 0x05][..], 7), (&[0x67, 0x48, 0x8d, 0x05], 8)] {
        for displacement in [0x123u32, 0x8000_0000, u32::MAX - 0x5f_ffff] {
            let bytes = [code, &displacement.to_le_bytes()].concat();
            let wanted = u64::from(
                (start as u32)
                    .wrapping_add(length)
                    .wrapping_add(displacement),
            );
            for (name, (after, _)) in [
                (
                    "blocks",
                    rig.translated(&bytes, start, &state, false, Page::Writable),
                ),
                (
                    "single",
                    rig.translated(&bytes, start, &state, true, Page::Writable),
                ),
                (
                    "interpreter",
                    rig.interpreted(&bytes, start, &state, Page::Writable),
                ),
            ] {
                assert_eq!(after.gpr[0], wanted, "{name}: {bytes:02x?}");
            }
        }
    }
}

fn round(
    rig: &mut rig::Rig,
    sequence: &Sequence,
    state: &State,
    page: Page,
    ignored: u64,
    tally: &mut Tally,
) {
    let Sequence {
        bytes,
        text,
        start,
        segments,
    } = sequence;
    let mut results = Vec::new();
    if std::env::var_os("BERTH_SHOW").is_some() {
        let lines: Vec<String> = text.iter().map(|i| format!("{i}")).collect();
        eprintln!("{start:x}: {} {bytes:02x?}", lines.join("; "));
    }
    if !segments {
        results.push(("host", rig.natively(bytes, text, *start, state, page)));
    }
    results.push((
        "translator",
        rig.translated(bytes, *start, state, false, page),
    ));
    results.push((
        "translator, single",
        rig.translated(bytes, *start, state, true, page),
    ));
    results.push(("interpreter", rig.interpreted(bytes, *start, state, page)));
    tally.ran += 1;
    tally.covered.extend(text.iter().map(Instruction::code));
    if let End::Fault(_, at) = results[0].1.1 {
        tally.faults += 1;
        tally.faulted.extend(
            text.iter()
                .filter(|i| i.ip() - start == at)
                .map(Instruction::code),
        );
    }
    let (first, rest) = results.split_first().expect("several");
    for (name, result) in rest {
        let mmx = text
            .iter()
            .any(|i| (0..i.op_count()).any(|n| i.op_register(n).is_mm()));
        let gathers = text.iter().any(Instruction::is_vsib);
        let Some(what) = difference(&first.1, result, ignored, mmx, gathers) else {
            continue;
        };
        let lines: Vec<String> = text
            .iter()
            .map(|i| format!("{:x}: {i}", i.ip() - start))
            .collect();
        let key = format!("{name} {:?}", text[text.len() - 1].code());
        tally.wrong.entry(key).or_insert_with(|| {
            format!(
                "{} against {name}: {what}\n  {}\n  bytes {bytes:02x?} at {start:x} page {page:?}\n  gpr {:x?} flags {:x} mxcsr {:x}",
                first.0,
                lines.join("; "),
                state.gpr,
                state.rflags,
                state.mxcsr,
            )
        });
    }
}
