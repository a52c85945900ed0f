//! A small x86-64 assembler for the sequences the translator emits itself (Intel SDM vol. 2, chapter 2).

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RBX: u8 = 3;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;
pub const R10: u8 = 10;
pub const R11: u8 = 11;

/// The short jump where rcx is zero.
pub const JRCXZ: u8 = 0xe3;

/// Condition codes of Jcc.
pub const CC_E: u8 = 4;
pub const CC_NE: u8 = 5;
pub const CC_A: u8 = 7;

/// A memory operand of emitted code.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mem {
    pub base: Option<u8>,
    /// Register and log2 of the scale.
    pub index: Option<(u8, u8)>,
    pub disp: i32,
    /// Relative to host GS, where the CPU's frame is.
    pub gs: bool,
}

impl Mem {
    pub fn gs(offset: usize) -> Mem {
        Mem {
            disp: offset as i32,
            gs: true,
            ..Mem::default()
        }
    }
    pub fn gs_at(register: u8, offset: usize) -> Mem {
        Mem {
            base: Some(register),
            disp: offset as i32,
            gs: true,
            ..Mem::default()
        }
    }
    pub fn base(register: u8, disp: i32) -> Mem {
        Mem {
            base: Some(register),
            disp,
            ..Mem::default()
        }
    }
    pub fn sum(base: u8, index: u8) -> Mem {
        Mem {
            base: Some(base),
            index: Some((index, 0)),
            ..Mem::default()
        }
    }
}

/// A place in the buffer where a 32-bit relative displacement waits for its target.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Patch(pub usize);

/// The same for a displacement of 8 bits.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Short(usize);

/// Code under construction: bytes, and the host address its first byte will have.
pub struct Code {
    pub bytes: Vec<u8>,
    pub origin: u64,
}

impl Code {
    pub fn new(origin: u64) -> Code {
        Code {
            bytes: Vec::with_capacity(4096),
            origin,
        }
    }
    pub fn here(&self) -> u64 {
        self.origin + self.bytes.len() as u64
    }
    pub fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// Prefixes, opcode, ModRM, SIB and displacement of an instruction with a memory operand.
    pub fn with_mem(&mut self, prefix: Option<u8>, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        if mem.gs {
            self.byte(0x65);
        }
        if let Some(prefix) = prefix {
            self.byte(prefix);
        }
        let mut rex = if wide { 8 } else { 0 } | (reg >> 3) << 2;
        rex |= mem.base.map_or(0, |b| b >> 3) | mem.index.map_or(0, |(i, _)| i >> 3) << 1;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.raw(opcode);
        let reg = (reg & 7) << 3;
        match (mem.base, mem.index) {
            (None, index) => {
                self.byte(reg | 4);
                let (i, s) = index.unwrap_or((4, 0));
                self.byte(s << 6 | (i & 7) << 3 | 5);
                self.u32(mem.disp as u32);
            }
            (Some(base), index) => {
                let mode: u8 = match mem.disp {
                    0 if base & 7 != 5 => 0,
                    -128..=127 => 1,
                    _ => 2,
                };
                if let Some((i, s)) = index {
                    self.byte(mode << 6 | reg | 4);
                    self.byte(s << 6 | (i & 7) << 3 | (base & 7));
                } else if base & 7 == 4 {
                    self.byte(mode << 6 | reg | 4);
                    self.byte(0x24);
                } else {
                    self.byte(mode << 6 | reg | (base & 7));
                }
                match mode {
                    1 => self.byte(mem.disp as u8),
                    2 => self.u32(mem.disp as u32),
                    _ => {}
                }
            }
        }
    }

    /// Opcode with two registers: `reg` in ModRM.reg, `rm` in ModRM.rm.
    pub fn with_reg(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = if wide { 8 } else { 0 } | (reg >> 3) << 2 | rm >> 3;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.raw(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | (rm & 7));
    }

    pub fn load(&mut self, reg: u8, mem: Mem) {
        self.with_mem(None, true, &[0x8b], reg, mem);
    }
    pub fn load32(&mut self, reg: u8, mem: Mem) {
        self.with_mem(None, false, &[0x8b], reg, mem);
    }
    pub fn store(&mut self, mem: Mem, reg: u8) {
        self.with_mem(None, true, &[0x89], reg, mem);
    }
    pub fn store32(&mut self, mem: Mem, reg: u8) {
        self.with_mem(None, false, &[0x89], reg, mem);
    }
    pub fn lea(&mut self, reg: u8, mem: Mem) {
        self.with_mem(None, true, &[0x8d], reg, mem);
    }
    pub fn mov(&mut self, to: u8, from: u8) {
        self.with_reg(true, &[0x89], from, to);
    }
    pub fn mov32(&mut self, to: u8, from: u8) {
        self.with_reg(false, &[0x89], from, to);
    }
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if value <= u64::from(u32::MAX) {
            if reg >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | (reg & 7));
            self.u32(value as u32);
        } else if value as i64 >= i64::from(i32::MIN) && (value as i64) < 0 {
            self.with_reg(true, &[0xc7], 0, reg);
            self.u32(value as u32);
        } else {
            self.byte(0x48 | reg >> 3);
            self.byte(0xb8 | (reg & 7));
            self.raw(&value.to_le_bytes());
        }
    }
    /// `mov qword [mem], imm32` (sign-extended).
    pub fn store_imm(&mut self, mem: Mem, value: i32) {
        self.with_mem(None, true, &[0xc7], 0, mem);
        self.u32(value as u32);
    }
    /// `mov dword [mem], imm32`.
    pub fn store32_imm(&mut self, mem: Mem, value: i32) {
        self.with_mem(None, false, &[0xc7], 0, mem);
        self.u32(value as u32);
    }
    pub fn shr32(&mut self, reg: u8, count: u8) {
        self.with_reg(false, &[0xc1], 5, reg);
        self.byte(count);
    }
    pub fn sar64(&mut self, reg: u8, count: u8) {
        self.with_reg(true, &[0xc1], 7, reg);
        self.byte(count);
    }
    pub fn and32(&mut self, reg: u8, value: u32) {
        self.with_reg(false, &[0x81], 4, reg);
        self.u32(value);
    }
    /// `cmp reg, imm32` (64 bits, sign-extended).
    pub fn cmp_imm(&mut self, reg: u8, value: i32) {
        if (-128..128).contains(&value) {
            self.with_reg(true, &[0x83], 7, reg);
            self.byte(value as u8);
        } else {
            self.with_reg(true, &[0x81], 7, reg);
            self.u32(value as u32);
        }
    }
    /// `cmp qword [mem], imm32`.
    pub fn cmp_mem_imm(&mut self, mem: Mem, value: i32) {
        self.with_mem(None, true, &[0x81], 7, mem);
        self.u32(value as u32);
    }
    /// `cmp dword [mem], imm8`.
    pub fn cmp32_mem_imm8(&mut self, mem: Mem, value: i8) {
        self.with_mem(None, false, &[0x83], 7, mem);
        self.byte(value as u8);
    }
    pub fn cmp_mem_reg(&mut self, mem: Mem, reg: u8) {
        self.with_mem(None, true, &[0x39], reg, mem);
    }
    pub fn cmp_reg(&mut self, a: u8, b: u8) {
        self.with_reg(true, &[0x39], b, a);
    }
    pub fn xor_load(&mut self, reg: u8, mem: Mem) {
        self.with_mem(None, true, &[0x33], reg, mem);
    }
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.with_mem(None, false, &[0xff], 4, mem);
    }

    pub fn jmp(&mut self) -> Patch {
        self.byte(0xe9);
        self.u32(0);
        Patch(self.bytes.len() - 4)
    }
    pub fn jcc(&mut self, condition: u8) -> Patch {
        self.raw(&[0x0f, 0x80 | condition]);
        self.u32(0);
        Patch(self.bytes.len() - 4)
    }
    pub fn jmp_to(&mut self, target: u64) {
        let patch = self.jmp();
        self.patch_to(patch, target);
    }
    pub fn jcc_to(&mut self, condition: u8, target: u64) {
        let patch = self.jcc(condition);
        self.patch_to(patch, target);
    }
    /// `lea r11, [rip + X]`, X to be patched.
    pub fn lea_r11_rip(&mut self) -> Patch {
        self.raw(&[0x4c, 0x8d, 0x1d]);
        self.u32(0);
        Patch(self.bytes.len() - 4)
    }
    /// A short jump by its opcode.
    pub fn short(&mut self, opcode: u8) -> Short {
        self.raw(&[opcode, 0]);
        Short(self.bytes.len() - 1)
    }
    /// The short form of Jcc.
    pub fn jcc_short(&mut self, condition: u8) -> Short {
        self.short(0x70 | condition)
    }
    /// Makes `short` lead here, at most 127 bytes behind it.
    pub fn bind_short(&mut self, short: Short) {
        let distance = self.bytes.len() - short.0 - 1;
        debug_assert!(distance < 128);
        self.bytes[short.0] = distance as u8;
    }
    /// Makes `patch` lead here.
    pub fn bind(&mut self, patch: Patch) {
        let here = self.here();
        self.patch_to(patch, here);
    }
    pub fn patch_to(&mut self, patch: Patch, target: u64) {
        let end = self.origin + patch.0 as u64 + 4;
        let delta = target.wrapping_sub(end) as i64 as i32;
        self.bytes[patch.0..patch.0 + 4].copy_from_slice(&delta.to_le_bytes());
    }
    /// The displacement as it is now.
    pub fn displacement(&self, patch: Patch) -> u32 {
        let at = patch.0;
        u32::from_le_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ])
    }
    /// The host address of the displacement itself.
    pub fn address_of(&self, patch: Patch) -> u64 {
        self.origin + patch.0 as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn text(code: &Code) -> Vec<String> {
        let mut formatter = IntelFormatter::new();
        Decoder::with_ip(64, &code.bytes, code.origin, DecoderOptions::NONE)
            .iter()
            .map(|i| {
                let mut s = String::new();
                formatter.format(&i, &mut s);
                s
            })
            .collect()
    }

    #[test]
    fn emitted_bytes_decode_to_what_was_asked_for() {
        let mut code = Code::new(0x1000);
        code.load(R10, Mem::gs(0x80));
        code.load(R11, Mem::gs_at(R11, 0x2008));
        code.lea(RSP, Mem::base(RSP, -8));
        code.store(Mem::sum(R10, R11), RAX);
        code.lea(
            R10,
            Mem {
                base: Some(5),
                index: Some((12, 3)),
                disp: 0,
                gs: false,
            },
        );
        code.lea(
            R10,
            Mem {
                base: Some(13),
                index: None,
                disp: 0,
                gs: false,
            },
        );
        code.lea(
            R10,
            Mem {
                base: None,
                index: Some((3, 2)),
                disp: 0x40,
                gs: false,
            },
        );
        code.mov_imm(R10, 0xffff_ffff_8000_0000);
        code.cmp_mem_imm(Mem::gs(0x3000), -4096);
        code.jmp_mem(Mem {
            index: Some((R11, 3)),
            disp: 0x100,
            gs: true,
            base: None,
        });
        assert_eq!(
            text(&code),
            [
                "mov r10,gs:[80h]",
                "mov r11,gs:[r11+2008h]",
                "lea rsp,[rsp-8]",
                "mov [r10+r11],rax",
                "lea r10,[rbp+r12*8]",
                "lea r10,[r13]",
                "lea r10,[rbx*4+40h]",
                "mov r10,0FFFFFFFF80000000h",
                "cmp qword ptr gs:[3000h],0FFFFFFFFFFFFF000h",
                "jmp qword ptr gs:[r11*8+100h]"
            ]
        );
    }
}
