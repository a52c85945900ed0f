//! Exceptions that the host raised in translated code, as the guest's.

use cpu::CpuError;

use crate::state::{Cpu, Fault, Rights};
use crate::translate::Site;

impl Cpu {
    /// The guest's exception for a trap of the host in translated code.
    pub(super) fn host_trap(&mut self) -> Result<Fault, CpuError> {
        let value = self.scratch[7];
        let host = value & ((1 << 56) - 1);
        let signal = (value >> 56) as i32;
        let sites = &self.engine().lists.sites;
        let after = sites.partition_point(|s| s.host <= host);
        let site = after
            .checked_sub(1)
            .map(|n| sites[n])
            .filter(|s| host < s.end);
        let Some(Site { rip, slot, .. }) = site else {
            let block = self
                .engine()
                .cache
                .block_at(host)
                .map(|n| self.engine().cache.blocks[n as usize].clone());
            return Err(CpuError::Broken(format!(
                "signal {signal} in translated code at {host:#x}, block {block:x?}"
            )));
        };
        self.rip = rip;
        if slot {
            self.flags_from_slot();
        }
        Ok(match signal {
            libc::SIGFPE => self.arithmetic_fault(),
            libc::SIGILL => Fault::UD,
            _ => Fault::GP,
        })
    }

    /// SIGFPE is division, x87 or SSE: told apart by the instruction.
    pub(super) fn arithmetic_fault(&mut self) -> Fault {
        let mut bytes = [0u8; 15];
        let rip = self.rip;
        let len = (4096 - (rip & 0xfff)).min(15) as usize;
        let _ = self.read_bytes(rip, &mut bytes[..len], Rights::Current);
        let instruction = iced_x86::Decoder::with_ip(64, &bytes, rip, 0).decode();
        match instruction.mnemonic() {
            iced_x86::Mnemonic::Div | iced_x86::Mnemonic::Idiv => Fault::DE,
            iced_x86::Mnemonic::Wait => Fault::MF,
            _ if instruction.cpuid_features().iter().any(|f| {
                matches!(f, iced_x86::CpuidFeature::FPU | iced_x86::CpuidFeature::MMX)
            }) =>
            {
                Fault::MF
            }
            _ => Fault::XM,
        }
    }
}
