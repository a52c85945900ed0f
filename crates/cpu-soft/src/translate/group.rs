//! Accesses by one base register are checked together: the first of a group checks the whole stretch, the others go by the
//! host address it left in r10. Where the stretch is not in one page of plain memory, or a fault comes up, the first
//! instruction runs alone instead, so that faults stay precise.

use iced_x86::{Code as C, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::Request;
use super::instruction::{in_memory, number};
use super::kind::{self, Way};

/// Bytes a group spans at most: longer ones cross pages too often.
const SPAN: i64 = 128;

/// An instruction's part in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Checks `span` bytes from `base + low` on; its own operand is `offset` bytes in.
    Lead {
        base: u8,
        low: i32,
        span: u32,
        write: bool,
        offset: i32,
    },
    /// Its operand is `offset` bytes into the group.
    Follow { offset: i32 },
}

/// What an instruction does to a group.
enum Role {
    /// An access at this offset from the base as the group found it.
    Access { offset: i64, size: i64, write: bool },
    /// None of the group's business.
    Neutral,
    /// The group cannot go on over it.
    Stop,
}

struct Planner<'a> {
    request: &'a Request<'a>,
    base: Register,
    /// The base register's value now, against the one the group found.
    delta: i64,
    /// The base register is lost after this instruction.
    lost: bool,
}

/// The base register of an access that may lead a group.
fn base_of(i: &Instruction, way: Way) -> Option<Register> {
    match i.code() {
        C::Push_r64 | C::Pushq_imm8 | C::Pushq_imm32 | C::Pop_r64 => Some(Register::RSP),
        _ if way == Way::Native && plain(i) => Some(i.memory_base()),
        _ => None,
    }
}

/// A memory operand by one 64-bit register that does not live in memory.
fn plain(i: &Instruction) -> bool {
    kind::touches(i)
        && i.memory_index() == Register::None
        && i.memory_base().is_gpr64()
        && in_memory(i.memory_base()).is_none()
        && !matches!(i.memory_segment(), Register::FS | Register::GS)
        && !kind::bit_string(i)
        && !kind::locked(i)
}

fn names_scratch(i: &Instruction) -> bool {
    (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && in_memory(i.op_register(n)).is_some())
        || in_memory(i.memory_base()).is_some()
        || in_memory(i.memory_index()).is_some()
}

impl Planner<'_> {
    fn role(&mut self, i: &Instruction, way: Way) -> Role {
        if way == Way::Nothing {
            return Role::Neutral;
        }
        if names_scratch(i) {
            return Role::Stop;
        }
        let stack = self.base == Register::RSP;
        let flow = i.flow_control() != FlowControl::Next;
        if way == Way::Own && stack && !(flow && self.request.counted) {
            match i.code() {
                C::Push_r64 | C::Pushq_imm8 | C::Pushq_imm32 | C::Call_rel32_64 => {
                    // PUSH RSP is the value before.
                    self.delta -= 8;
                    return Role::Access {
                        offset: self.delta,
                        size: 8,
                        write: true,
                    };
                }
                C::Pop_r64 if i.op0_register() != Register::RSP => {
                    self.delta += 8;
                    return Role::Access {
                        offset: self.delta - 8,
                        size: 8,
                        write: false,
                    };
                }
                C::Retnq => {
                    return Role::Access {
                        offset: self.delta,
                        size: 8,
                        write: false,
                    };
                }
                _ => return Role::Stop,
            }
        }
        if way != Way::Native {
            return Role::Stop;
        }
        let k = kind::kind(i);
        let writes_base = kind::writes(i, &k, self.base);
        let role = if !kind::touches(i) {
            Role::Neutral
        } else if plain(i) && i.memory_base() == self.base {
            Role::Access {
                offset: self.delta + i.memory_displacement64() as i64,
                size: i.memory_size().size() as i64,
                write: k.writes,
            }
        } else {
            return Role::Stop;
        };
        if writes_base {
            let step = match i.mnemonic() {
                Mnemonic::Add | Mnemonic::Sub
                    if i.op0_register() == self.base && kind::immediate(i, 1) =>
                {
                    i.immediate(1) as i64
                }
                _ => {
                    self.lost = true;
                    return role;
                }
            };
            self.delta += if i.mnemonic() == Mnemonic::Add {
                step
            } else {
                -step
            };
            self.lost |= self.delta.abs() > 4096;
        }
        role
    }
}

/// Finds the groups of a block: `parts[n]` is the part of instruction n.
pub fn plan(
    request: &Request<'_>,
    decoded: &[Instruction],
    ways: &[Way],
    parts: &mut Vec<Option<Part>>,
) {
    parts.clear();
    parts.resize(decoded.len(), None);
    let mut first = 0;
    while first < decoded.len() {
        first = group(request, decoded, ways, parts, first);
    }
}

/// Tries a group that begins at instruction `first`; answers where to go on.
fn group(
    request: &Request<'_>,
    decoded: &[Instruction],
    ways: &[Way],
    parts: &mut [Option<Part>],
    first: usize,
) -> usize {
    if names_scratch(&decoded[first]) {
        return first + 1;
    }
    let Some(base) = base_of(&decoded[first], ways[first]) else {
        return first + 1;
    };
    let mut planner = Planner {
        request,
        base,
        delta: 0,
        lost: false,
    };
    let (mut low, mut high, mut write) = (i64::MAX, i64::MIN, false);
    let mut members: [(usize, i64); 48] = [(0, 0); 48];
    let mut count = 0;
    let mut next = first + 1;
    for (n, i) in decoded.iter().enumerate().skip(first) {
        match planner.role(i, ways[n]) {
            Role::Access {
                offset,
                size,
                write: writes,
            } => {
                let (l, h) = (low.min(offset), high.max(offset + size));
                if h - l > SPAN || offset.abs() > 0x4000_0000 || count == members.len() {
                    break;
                }
                (low, high) = (l, h);
                write |= writes;
                members[count] = (n, offset);
                count += 1;
                next = n + 1;
            }
            Role::Neutral => {}
            Role::Stop => break,
        }
        if planner.lost {
            break;
        }
    }
    if count < 2 {
        return first + 1;
    }
    for (at, (n, offset)) in members[..count].iter().enumerate() {
        let offset = (offset - low) as i32;
        parts[*n] = Some(if at == 0 {
            Part::Lead {
                base: number(base),
                low: low as i32,
                span: (high - low) as u32,
                write,
                offset,
            }
        } else {
            Part::Follow { offset }
        });
    }
    next
}
