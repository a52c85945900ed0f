//! Writes a filter from its end to its beginning, so that the distance of every jump is known when it is written.

use std::collections::BTreeMap;

use super::Instruction;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A test of one argument: `(argument & mask) comparison value`, on 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    pub index: u8,
    pub comparison: Comparison,
    pub mask: u64,
    pub value: u64,
}

/// If all tests hold, the result is this.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Alternative {
    pub tests: Vec<Test>,
    pub result: u32,
}

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// A place in the reversed code: the index of an instruction counted from the program's end.
type Place = usize;

/// The program so far, last instruction first.
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    returns: BTreeMap<u32, Place>,
    default: u32,
    foreign: u32,
}

impl Assembler {
    /// `default`: the result for calls no rule names; `foreign`: for architectures no block is for.
    pub fn new(default: u32, foreign: u32) -> Assembler {
        Assembler {
            reversed: Vec::new(),
            returns: BTreeMap::new(),
            default,
            foreign,
        }
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Place {
        self.reversed.push(Instruction { code, jt, jf, k });
        self.reversed.len() - 1
    }

    fn result(&mut self, result: u32) -> Place {
        if let Some(place) = self.returns.get(&result) {
            return *place;
        }
        let place = self.push(RETURN, 0, 0, result);
        self.returns.insert(result, place);
        place
    }

    /// A conditional jump to two places further on, by way of a plain jump where one is too far.
    fn branch(&mut self, code: u16, k: u32, mut yes: Place, mut no: Place) -> Place {
        // Two plain jumps at most come between this instruction and its targets.
        let far = |at: Place, target: Place| at - target > 252;
        if far(self.reversed.len(), yes) {
            let distance = self.reversed.len() - yes - 1;
            yes = self.push(JUMP, 0, 0, distance as u32);
        }
        if far(self.reversed.len(), no) {
            let distance = self.reversed.len() - no - 1;
            no = self.push(JUMP, 0, 0, distance as u32);
        }
        let at = self.reversed.len();
        self.push(code, (at - yes - 1) as u8, (at - no - 1) as u8, k)
    }

    /// The code that decides a call by its argument tests.
    fn leaf(&mut self, alternatives: &[Alternative]) -> Place {
        let mut next = None;
        for alternative in alternatives.iter().rev() {
            let result = self.result(alternative.result);
            let fallback = match next {
                Some(place) => place,
                None => {
                    let default = self.default;
                    self.result(default)
                }
            };
            let mut place = result;
            for test in alternative.tests.iter().rev() {
                place = self.test(test, place, fallback);
            }
            next = Some(place);
        }
        match next {
            Some(place) => place,
            None => {
                let default = self.default;
                self.result(default)
            }
        }
    }

    fn test(&mut self, test: &Test, yes: Place, no: Place) -> Place {
        use Comparison as C;
        let (yes, no, comparison) = match test.comparison {
            C::NotEqual => (no, yes, C::Equal),
            C::Less => (no, yes, C::GreaterOrEqual),
            C::LessOrEqual => (no, yes, C::Greater),
            other => (yes, no, other),
        };
        let (low_value, high_value) = (test.value as u32, (test.value >> 32) as u32);
        let low_code = match comparison {
            C::Greater => JUMP_GREATER,
            C::GreaterOrEqual => JUMP_GREATER_OR_EQUAL,
            _ => JUMP_EQUAL,
        };
        // struct seccomp_data: nr, arch, instruction pointer, six 64-bit arguments (little-endian hosts).
        let offset = 16 + 8 * u32::from(test.index);
        self.branch(low_code, low_value, yes, no);
        self.mask(test.mask as u32);
        let low = self.push(LOAD, 0, 0, offset);
        let equal = self.branch(JUMP_EQUAL, high_value, low, no);
        if comparison != C::Equal {
            self.branch(JUMP_GREATER, high_value, yes, equal);
        }
        self.mask((test.mask >> 32) as u32);
        self.push(LOAD, 0, 0, offset + 4)
    }

    fn mask(&mut self, mask: u32) {
        if mask != u32::MAX {
            self.push(AND, 0, 0, mask);
        }
    }

    /// The code for one architecture, from the call's number on. `stub`: the result from a number on that no rule
    /// names; `forbidden`: the number from which calls belong to another architecture.
    pub fn block(
        &mut self,
        calls: &BTreeMap<u32, &[Alternative]>,
        stub: Option<(u32, u32)>,
        forbidden: Option<u32>,
    ) -> Place {
        let mut leaves: BTreeMap<&[Alternative], Place> = BTreeMap::new();
        let default = self.default;
        let unnamed = self.result(default);
        let stubbed = stub.map(|(from, result)| (from, self.result(result)));
        let x32 = 0x4000_0000;
        let otherwise = |number: u32| match stubbed {
            Some((from, place)) if (number & !x32) >= from && (number & !x32) < 0xf_0000 => place,
            _ => unnamed,
        };
        // Where each stretch of numbers with one answer begins.
        let mut starts: Vec<(u32, Place)> = vec![(0, otherwise(0))];
        let begin = |starts: &mut Vec<(u32, Place)>, number: u32, place: Place| {
            if let Some(last) = starts.last_mut().filter(|last| last.0 == number) {
                last.1 = place;
            } else if starts.last().is_none_or(|last| last.1 != place) {
                starts.push((number, place));
            }
        };
        let mut marks: Vec<u32> = calls
            .keys()
            .flat_map(|number| [*number, number + 1])
            .collect();
        if let Some((from, _)) = stub {
            marks.extend([from, 0xf_0000, x32, x32 + from, x32 + 0xf_0000]);
        }
        marks.sort_unstable();
        marks.dedup();
        for number in marks {
            let place = match calls.get(&number) {
                Some(alternatives) => match leaves.get(*alternatives) {
                    Some(place) => *place,
                    None => {
                        let place = self.leaf(alternatives);
                        leaves.insert(alternatives, place);
                        place
                    }
                },
                None => otherwise(number),
            };
            begin(&mut starts, number, place);
        }
        if let Some(from) = forbidden {
            let foreign = self.foreign;
            let place = self.result(foreign);
            starts.retain(|start| start.0 < from);
            begin(&mut starts, from, place);
        }
        // Merged once more: two neighbours may answer alike now.
        starts.dedup_by(|later, earlier| later.1 == earlier.1);
        if let [(_, place)] = starts[..] {
            return place;
        }
        self.search(&starts);
        self.push(LOAD, 0, 0, 0)
    }

    /// A binary search for the stretch a number is in.
    fn search(&mut self, starts: &[(u32, Place)]) -> Place {
        if let [(_, place)] = starts {
            return *place;
        }
        let middle = starts.len() / 2;
        let above = self.search(&starts[middle..]);
        let below = self.search(&starts[..middle]);
        self.branch(JUMP_GREATER_OR_EQUAL, starts[middle].0, above, below)
    }

    /// The whole program: the choice of the block by architecture, in front of everything.
    pub fn finish(mut self, blocks: &[(u32, Place)]) -> Vec<Instruction> {
        let foreign = self.foreign;
        let mut next = self.result(foreign);
        for (audit, place) in blocks.iter().rev() {
            next = self.branch(JUMP_EQUAL, *audit, *place, next);
        }
        self.push(LOAD, 0, 0, 4);
        self.reversed.reverse();
        self.reversed
    }
}
