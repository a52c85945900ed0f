//! Integer arithmetic with flags (SDM vol. 1, appendix A). Undefined flags follow the formula of the defined case.

use super::operand::{mask, sign_extend};
use crate::state::{Cpu, flag};

/// CF, PF, AF, ZF, SF, OF.
pub const STATUS: u64 = flag::CF | flag::PF | flag::AF | flag::ZF | flag::SF | flag::OF;

/// A result and the flags it sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub value: u64,
    pub flags: u64,
    /// Which flags are set from `flags`; the others stay.
    pub changed: u64,
}

impl Outcome {
    /// Puts the flags into RFLAGS.
    pub fn set(self, cpu: &mut Cpu) {
        cpu.rflags = cpu.rflags & !self.changed | self.flags & self.changed;
    }
}

fn bit(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

/// ZF, SF and PF of a result.
fn common(value: u64, size: usize) -> u64 {
    bit(value == 0, flag::ZF)
        | bit(value >> (size * 8 - 1) & 1 != 0, flag::SF)
        | bit((value as u8).count_ones().is_multiple_of(2), flag::PF)
}

fn sign(value: u64, size: usize) -> bool {
    value >> (size * 8 - 1) & 1 != 0
}

/// ADD and ADC.
pub fn add(a: u64, b: u64, carry: u64, size: usize) -> Outcome {
    let (a, b) = (a & mask(size), b & mask(size));
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let value = wide as u64 & mask(size);
    let flags = common(value, size)
        | bit(wide >> (size * 8) != 0, flag::CF)
        | bit((a ^ b ^ value) & 0x10 != 0, flag::AF)
        | bit(sign((a ^ value) & (b ^ value), size), flag::OF);
    Outcome {
        value,
        flags,
        changed: STATUS,
    }
}

/// SUB, SBB, CMP.
pub fn sub(a: u64, b: u64, borrow: u64, size: usize) -> Outcome {
    let (a, b) = (a & mask(size), b & mask(size));
    let value = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let flags = common(value, size)
        | bit(u128::from(a) < u128::from(b) + u128::from(borrow), flag::CF)
        | bit((a ^ b ^ value) & 0x10 != 0, flag::AF)
        | bit(sign((a ^ b) & (a ^ value), size), flag::OF);
    Outcome {
        value,
        flags,
        changed: STATUS,
    }
}

/// AND, OR, XOR, TEST: the result's flags, CF and OF clear.
pub fn logic(value: u64, size: usize) -> Outcome {
    let value = value & mask(size);
    Outcome {
        value,
        flags: common(value, size),
        changed: STATUS,
    }
}

/// INC: CF stays.
pub fn inc(a: u64, size: usize) -> Outcome {
    Outcome {
        changed: STATUS & !flag::CF,
        ..add(a, 1, 0, size)
    }
}

/// DEC: CF stays.
pub fn dec(a: u64, size: usize) -> Outcome {
    Outcome {
        changed: STATUS & !flag::CF,
        ..sub(a, 1, 0, size)
    }
}

/// Shifts and rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts `a` by `count` (masked here); a count of zero changes no flag.
pub fn shift(kind: Shift, a: u64, count: u64, carry: bool, size: usize) -> Outcome {
    let bits = size as u32 * 8;
    let a = a & mask(size);
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let nothing = Outcome {
        value: a,
        flags: 0,
        changed: 0,
    };
    if count == 0 {
        return nothing;
    }
    let wide = u128::from(a);
    let rotates = flag::CF | flag::OF;
    match kind {
        Shift::Shl => {
            let shifted = if count > 64 { 0 } else { wide << count };
            let value = shifted as u64 & mask(size);
            let cf = shifted >> bits & 1 != 0;
            let flags =
                common(value, size) | bit(cf, flag::CF) | bit(cf != sign(value, size), flag::OF);
            Outcome {
                value,
                flags,
                changed: STATUS,
            }
        }
        Shift::Shr => {
            let value = (wide >> count) as u64;
            let cf = wide >> (count - 1) & 1 != 0;
            let of = if count == 1 {
                sign(a, size)
            } else {
                sign(a, size) && count == 1
            };
            Outcome {
                value,
                flags: common(value, size) | bit(cf, flag::CF) | bit(of, flag::OF),
                changed: STATUS,
            }
        }
        Shift::Sar => {
            let signed = i128::from(sign_extend(a, size) as i64);
            let value = (signed >> count) as u64 & mask(size);
            let cf = signed >> (count - 1) & 1 != 0;
            Outcome {
                value,
                flags: common(value, size) | bit(cf, flag::CF),
                changed: STATUS,
            }
        }
        Shift::Rol => {
            let by = count % bits;
            let value = if by == 0 {
                a
            } else {
                (a << by | a >> (bits - by)) & mask(size)
            };
            let cf = value & 1 != 0;
            Outcome {
                value,
                flags: bit(cf, flag::CF) | bit(cf != sign(value, size), flag::OF),
                changed: rotates,
            }
        }
        Shift::Ror => {
            let by = count % bits;
            let value = if by == 0 {
                a
            } else {
                (a >> by | a << (bits - by)) & mask(size)
            };
            let cf = sign(value, size);
            let of = cf != sign(value << 1, size);
            Outcome {
                value,
                flags: bit(cf, flag::CF) | bit(of, flag::OF),
                changed: rotates,
            }
        }
        Shift::Rcl | Shift::Rcr => {
            // A rotation of size + 1 bits, CF being the top one.
            let width = bits + 1;
            let by = count % width;
            if by == 0 {
                return nothing;
            }
            let full = wide | u128::from(carry) << bits;
            let all = (1u128 << width) - 1;
            let left = if kind == Shift::Rcl { by } else { width - by };
            let turned = (full << left | full >> (width - left)) & all;
            let value = turned as u64 & mask(size);
            let cf = turned >> bits & 1 != 0;
            let of = if kind == Shift::Rcl {
                cf != sign(value, size)
            } else {
                sign(value, size) != sign(value << 1, size)
            };
            Outcome {
                value,
                flags: bit(cf, flag::CF) | bit(of, flag::OF),
                changed: rotates,
            }
        }
    }
}

/// SHLD (`left`) and SHRD: `a` shifted by `count`, filled from `b`.
pub fn double_shift(left: bool, a: u64, b: u64, count: u64, size: usize) -> Outcome {
    let bits = size as u32 * 8;
    let (a, b) = (a & mask(size), b & mask(size));
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return Outcome {
            value: a,
            flags: 0,
            changed: 0,
        };
    }
    // 16-bit counts above 16 take their bits from `a` again, as processors do.
    let (value, cf) = if left {
        let wide = u128::from(a) << bits | u128::from(b);
        let tripled = if size == 2 {
            wide << 16 | u128::from(a)
        } else {
            wide << bits
        };
        let shifted = tripled << count;
        let top = if size == 2 { 48 } else { 3 * bits };
        let (value, cf) = if size == 8 {
            let value = a << count | (b >> (64 - count));
            (value, a >> (64 - count) & 1 != 0)
        } else {
            (
                (shifted >> (top - bits)) as u64 & mask(size),
                shifted >> top & 1 != 0,
            )
        };
        (value, cf)
    } else if size == 8 {
        (a >> count | b << (64 - count), a >> (count - 1) & 1 != 0)
    } else {
        let wide =
            u128::from(a) | u128::from(b) << bits | if size == 2 { u128::from(a) << 32 } else { 0 };
        (
            (wide >> count) as u64 & mask(size),
            wide >> (count - 1) & 1 != 0,
        )
    };
    let of = sign(value ^ a, size);
    Outcome {
        value,
        flags: common(value, size) | bit(cf, flag::CF) | bit(of, flag::OF),
        changed: STATUS,
    }
}

/// MUL: low half, high half, flags.
pub fn mul(a: u64, b: u64, size: usize) -> (u64, u64, Outcome) {
    let wide = u128::from(a & mask(size)) * u128::from(b & mask(size));
    let low = wide as u64 & mask(size);
    let high = (wide >> (size * 8)) as u64 & mask(size);
    let overflow = bit(high != 0, flag::CF | flag::OF);
    (
        low,
        high,
        Outcome {
            value: low,
            flags: common(low, size) | overflow,
            changed: STATUS,
        },
    )
}

/// IMUL: low half, high half, flags.
pub fn imul(a: u64, b: u64, size: usize) -> (u64, u64, Outcome) {
    let wide = i128::from(sign_extend(a, size) as i64) * i128::from(sign_extend(b, size) as i64);
    let low = wide as u64 & mask(size);
    let high = (wide >> (size * 8)) as u64 & mask(size);
    let fits = i128::from(sign_extend(low, size) as i64) == wide;
    let overflow = bit(!fits, flag::CF | flag::OF);
    (
        low,
        high,
        Outcome {
            value: low,
            flags: common(low, size) | overflow,
            changed: STATUS,
        },
    )
}

/// DIV of `high:low` by `d`: quotient and remainder; `None`: #DE.
pub fn div(high: u64, low: u64, d: u64, size: usize) -> Option<(u64, u64)> {
    let d = u128::from(d & mask(size));
    let n = u128::from(high & mask(size)) << (size * 8) | u128::from(low & mask(size));
    let quotient = n.checked_div(d)?;
    (quotient <= u128::from(mask(size))).then(|| (quotient as u64, (n % d) as u64))
}

/// IDIV.
pub fn idiv(high: u64, low: u64, d: u64, size: usize) -> Option<(u64, u64)> {
    let bits = size as u32 * 8;
    let d = i128::from(sign_extend(d, size) as i64);
    let n = (u128::from(high & mask(size)) << bits | u128::from(low & mask(size))) as i128;
    let n = n << (128 - 2 * bits) >> (128 - 2 * bits);
    let quotient = n.checked_div(d)?;
    let limit = 1i128 << (bits - 1);
    (-limit..limit)
        .contains(&quotient)
        .then(|| (quotient as u64 & mask(size), (n % d) as u64 & mask(size)))
}

/// CRC32 (polynomial 0x11EDC6F41, reflected) of the low `size` bytes of `data`.
pub fn crc32c(crc: u32, data: u64, size: usize) -> u32 {
    let mut crc = crc;
    for byte in &data.to_le_bytes()[..size] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}

/// PDEP.
pub fn deposit(source: u64, mut selector: u64) -> u64 {
    let (mut result, mut source) = (0, source);
    while selector != 0 {
        let lowest = selector & selector.wrapping_neg();
        if source & 1 != 0 {
            result |= lowest;
        }
        source >>= 1;
        selector ^= lowest;
    }
    result
}

/// PEXT.
pub fn extract(source: u64, mut selector: u64) -> u64 {
    let (mut result, mut at) = (0, 0);
    while selector != 0 {
        let lowest = selector & selector.wrapping_neg();
        if source & lowest != 0 {
            result |= 1 << at;
        }
        at += 1;
        selector ^= lowest;
    }
    result
}
