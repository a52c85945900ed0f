//! The interpreter: one instruction at a time, in every mode. It starts up further CPUs, runs firmware and 32-bit
//! code, makes every access to a device, and is what the translator is compared with.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use crate::mem::Place;
use crate::state::{Access, CS, Cpu, Fault, Rights};
use crate::system::segment::{self, bitness, code64};

pub mod alu;
mod bits;
mod branch;
mod gather;
pub mod integer;
pub mod native;
pub mod operand;

/// Fetches and decodes the instruction at rip.
pub fn fetch(cpu: &mut Cpu) -> Result<Instruction, Fault> {
    let bits = bitness(cpu);
    let start = if code64(cpu) {
        if !crate::system::paging::canonical(cpu.rip) {
            return Err(Fault::GP);
        }
        cpu.rip
    } else {
        segment::linear(cpu, CS, cpu.rip, 1, false)?
    };
    let mut bytes = [0u8; 15];
    let first = (4096 - (start & 4095)).min(15) as usize;
    load(cpu, start, &mut bytes[..first])?;
    let mut have = first;
    loop {
        let mut decoder = Decoder::with_ip(bits, &bytes[..have], cpu.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if !instruction.is_invalid() {
            if !code64(cpu) {
                let last = cpu.rip + instruction.len() as u64 - 1;
                if last & 0xffff_ffff > u64::from(cpu.segments[CS].limit) {
                    return Err(Fault::GP);
                }
            }
            return Ok(instruction);
        }
        match decoder.last_error() {
            DecoderError::NoMoreBytes if have < 15 => {
                load(cpu, start.wrapping_add(have as u64), &mut bytes[have..])?;
                have = 15;
            }
            // Longer than 15 bytes.
            DecoderError::NoMoreBytes => return Err(Fault::GP),
            _ => return Err(Fault::UD),
        }
    }
}

fn load(cpu: &mut Cpu, at: u64, out: &mut [u8]) -> Result<(), Fault> {
    match cpu.place(at, Access::Fetch, Rights::Current)? {
        place @ Place::Ram(_) => cpu.read_place(place, out),
        // Code in a device's memory: read it as data.
        place => cpu.read_place(place, out),
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
