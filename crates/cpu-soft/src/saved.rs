//! The architectural state as [`cpu::x86::CpuState`], both ways.

use cpu::CpuError;
use cpu::x86::CpuState;

use crate::state::{CS, Cpu, flag};

impl Cpu {
    /// Everything the guest can see of this CPU.
    pub(crate) fn save_state(&mut self) -> CpuState {
        CpuState {
            version: 1,
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            xcr0: self.xcr0,
            dr: self.dr,
            efer: self.efer,
            xsave: self.save_vectors(),
            interrupt_shadow: self.interrupt_shadow,
            ..CpuState::default()
        }
    }

    /// Takes over what [`Cpu::save_state`] made.
    pub(crate) fn restore_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        if state.version != 1 {
            return Err(CpuError::State(format!(
                "its version is {}, this program knows 1",
                state.version
            )));
        }
        self.gpr = state.gpr;
        self.rip = state.rip;
        self.rflags = state.rflags | flag::FIXED;
        self.segments = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.xcr0 = state.xcr0 | 1;
        self.dr = state.dr;
        self.efer = state.efer;
        self.interrupt_shadow = state.interrupt_shadow;
        // The privilege level is that of SS (SDM vol. 3, 5.5 and 21.9.3.1); real mode has 0.
        self.cpl = if state.cr0 & 1 == 0 {
            0
        } else if state.rflags & flag::VM != 0 {
            3
        } else {
            (state.segments[crate::state::SS].attributes >> 5 & 3) as u8
                | (state.segments[CS].selector & 3) as u8
        };
        self.load_vectors(&state.xsave)
    }

    /// XSAVE area, standard format: legacy part, header, upper halves of YMM (SDM vol. 1, 13.4).
    fn save_vectors(&self) -> Vec<u8> {
        let mut area = vec![0u8; 832];
        area[..512].copy_from_slice(&self.x87.0);
        area[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (n, register) in self.ymm.iter().enumerate() {
            for (word, value) in register.iter().enumerate() {
                let at = if word < 2 {
                    160 + n * 16 + word * 8
                } else {
                    576 + n * 16 + (word - 2) * 8
                };
                area[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        area[512] = 7;
        area
    }

    fn load_vectors(&mut self, area: &[u8]) -> Result<(), CpuError> {
        if area.is_empty() {
            return Ok(());
        }
        if area.len() < 576 {
            return Err(CpuError::State(format!(
                "its XSAVE area has {} bytes, less than the 576 of the legacy part and header",
                area.len()
            )));
        }
        self.x87.0.copy_from_slice(&area[..512]);
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        self.mxcsr = if mxcsr == 0 { 0x1f80 } else { mxcsr & 0xffff };
        self.x87.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        for (n, register) in self.ymm.iter_mut().enumerate() {
            for (word, value) in register.iter_mut().enumerate() {
                let at = if word < 2 {
                    160 + n * 16 + word * 8
                } else {
                    576 + n * 16 + (word - 2) * 8
                };
                *value = area.get(at..at + 8).map_or(0, |b| {
                    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
                });
            }
        }
        if area[..24].iter().all(|b| *b == 0) {
            // A loader's empty area: the reset state, not one with every exception unmasked.
            self.x87 = crate::state::FxImage::reset();
        }
        Ok(())
    }
}
