//! Ports: IN, OUT and who may use them (SDM vol. 1, chapter 19).

use cpu::x86::RDX;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::interp::operand;
use super::segment::{protected, virtual_8086};
use crate::state::{Cpu, Fault, Flow, Rights};

use super::control::check_iopl;

/// Whether ring 3 may use `size` ports from `port`: IOPL, else the TSS's bitmap (SDM vol. 1, 19.5.2).
pub(super) fn check_port(cpu: &mut Cpu, port: u16, size: usize) -> Result<(), Fault> {
    if !protected(cpu) || (check_iopl(cpu).is_ok() && !virtual_8086(cpu)) {
        return Ok(());
    }
    let limit = u64::from(cpu.tr.limit);
    if cpu.tr.unusable || limit < 0x67 {
        return Err(Fault::GP);
    }
    let bitmap = u64::from(cpu.read::<u16>(cpu.tr.base.wrapping_add(0x66), Rights::Supervisor)?);
    let at = bitmap + u64::from(port / 8);
    if at + 1 > limit {
        return Err(Fault::GP);
    }
    let bits = cpu.read::<u16>(cpu.tr.base.wrapping_add(at), Rights::Supervisor)?;
    let mask = ((1u16 << size) - 1) << (port % 8);
    if bits & mask == 0 {
        Ok(())
    } else {
        Err(Fault::GP)
    }
}

/// Reads a port of `size` bytes.
pub(super) fn port_in(cpu: &mut Cpu, port: u16, size: usize) -> u64 {
    let mut bytes = [0xffu8; 4];
    if let Some(io) = cpu.io() {
        io.pio_read(port, &mut bytes[..size]);
    }
    u64::from(u32::from_le_bytes(bytes)) & operand::mask(size)
}

/// Writes a port; [`Flow::Stop`] where a device then wants the machine to end.
pub(super) fn port_out(cpu: &mut Cpu, port: u16, size: usize, value: u64) -> Flow {
    if let Some(io) = cpu.io() {
        io.pio_write(port, &value.to_le_bytes()[..size]);
        if io.stop_requested() {
            return Flow::Stop;
        }
    }
    Flow::Continue
}

pub(super) fn port(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    let input = i.mnemonic() == Mnemonic::In;
    let (data, address) = if input { (0, 1) } else { (1, 0) };
    let register = i.op_register(data);
    let size = register.size();
    let port = if i.op_kind(address) == OpKind::Register {
        cpu.gpr[RDX] as u16
    } else {
        u16::from(i.immediate8())
    };
    check_port(cpu, port, size)?;
    cpu.watch_port(port, size);
    if input {
        let value = port_in(cpu, port, size);
        operand::write_register(cpu, register, value);
        return Ok(Flow::Continue);
    }
    let value = operand::read_register(cpu, register);
    Ok(port_out(cpu, port, size, value))
}
