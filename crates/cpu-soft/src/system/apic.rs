//! The local APIC of each CPU, as xAPIC page and as x2APIC MSRs, its timer, and the way of messages between CPUs
//! (SDM vol. 3, chapter 11).
//!
//! Only its own CPU touches an [`Apic`]. Messages from devices and other CPUs go through the CPU's [`Mailbox`]:
//! bits in atomic words, then a ring; [`take_mail`] moves them into the IRR.

use std::sync::atomic::Ordering;

use cpu::x86::Activity;

pub use super::message::{Message, Shared, send, take_mail, take_mail_for_save};
use crate::clock::host_tsc;
use crate::state::{Cpu, Fault, flag};

/// APIC timer input ticks in a second (leaf 0x15's crystal, leaf 0x4000_0010).
pub const TIMER_HZ: u64 = 1_000_000_000;

/// IA32_APIC_BASE bits.
pub const BASE_BSP: u64 = 1 << 8;
pub const BASE_X2APIC: u64 = 1 << 10;
pub const BASE_ENABLE: u64 = 1 << 11;
pub const BASE_DEFAULT: u64 = 0xfee0_0000;

/// Register numbers: xAPIC offset / 16, x2APIC MSR - 0x800.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const CMCI: u32 = 0x2f;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

const LVT_MASKED: u32 = 1 << 16;
/// LVT entries: timer, thermal, performance, LINT0, LINT1, error.
const LVTS: usize = 6;
/// Version 0x14, six LVT entries, EOI-broadcast suppression not offered.
const VERSION: u32 = 0x14 | (LVTS as u32 - 1) << 16;
/// ESR: illegal vector received / sent, illegal register.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_REGISTER: u32 = 1 << 7;

/// One CPU's local APIC.
#[derive(Debug, Clone)]
pub struct Apic {
    id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: [u64; 4],
    isr: [u64; 4],
    tmr: [u64; 4],
    esr: u32,
    esr_latched: u32,
    icr: u64,
    lvt: [u32; LVTS],
    timer_initial: u32,
    timer_divide: u32,
    /// Host TSC when the count was started.
    timer_start: u64,
    /// Host TSC at which the timer fires; `u64::MAX`: it is not running.
    timer_at: u64,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

impl Apic {
    pub fn new(id: u32) -> Apic {
        let mut apic = Apic {
            id,
            base: BASE_DEFAULT | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            irr: [0; 4],
            isr: [0; 4],
            tmr: [0; 4],
            esr: 0,
            esr_latched: 0,
            icr: 0,
            lvt: [0; LVTS],
            timer_initial: 0,
            timer_divide: 0,
            timer_start: 0,
            timer_at: u64::MAX,
            tsc_deadline: 0,
        };
        apic.reset();
        apic
    }

    /// The state after INIT: everything but id and base.
    pub fn reset(&mut self) {
        (self.tpr, self.ldr, self.dfr, self.svr) = (0, 0, u32::MAX, 0xff);
        (self.irr, self.isr, self.tmr) = ([0; 4], [0; 4], [0; 4]);
        (self.esr, self.esr_latched, self.icr) = (0, 0, 0);
        self.lvt = [LVT_MASKED; LVTS];
        (self.timer_initial, self.timer_divide, self.timer_start) = (0, 0, 0);
        (self.timer_at, self.tsc_deadline) = (u64::MAX, 0);
    }

    pub fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    pub fn x2apic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    /// SVR bit 8.
    fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & 1 << 8 != 0
    }

    fn logical_id(&self) -> u32 {
        if self.x2apic() {
            (self.id >> 4) << 16 | 1 << (self.id & 15)
        } else {
            self.ldr
        }
    }

    /// Processor priority (SDM vol. 3, 11.8.3.1).
    fn ppr(&self) -> u32 {
        let isr = highest(&self.isr).map_or(0, u32::from);
        if self.tpr & 0xf0 >= isr & 0xf0 {
            self.tpr & 0xff
        } else {
            isr & 0xf0
        }
    }

    /// CR8.
    pub fn task_priority(&self) -> u64 {
        u64::from(self.tpr >> 4 & 15)
    }

    /// The vector to deliver next, above the processor's priority.
    pub fn pending(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (u32::from(vector) & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The CPU takes `vector`: request becomes service.
    fn acknowledge(&mut self, vector: u8) {
        let (word, bit) = (usize::from(vector / 64), 1u64 << (vector % 64));
        self.irr[word] &= !bit;
        self.isr[word] |= bit;
    }

    pub(super) fn request(&mut self, vector: u8, level: bool) {
        if !self.software_enabled() {
            return;
        }
        let (word, bit) = (usize::from(vector / 64), 1u64 << (vector % 64));
        self.irr[word] |= bit;
        if level {
            self.tmr[word] |= bit;
        } else {
            self.tmr[word] &= !bit;
        }
    }

    /// Ends the highest interrupt in service; its vector where the IOAPIC must know.
    fn end(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        let (word, bit) = (usize::from(vector / 64), 1u64 << (vector % 64));
        self.isr[word] &= !bit;
        (self.tmr[word] & bit != 0).then_some(vector)
    }

    /// Whether LINT0 or a disabled APIC lets the old PIC's interrupts through.
    fn accepts_external(&self) -> bool {
        !self.enabled() || (self.lvt[3] & LVT_MASKED == 0 && self.lvt[3] >> 8 & 7 == 7)
    }

    fn divisor(&self) -> u64 {
        let code = self.timer_divide & 3 | self.timer_divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[0] >> 17 & 3
    }

    /// Host TSC ticks of the whole count.
    fn period(&self) -> u64 {
        let ticks = u128::from(self.timer_initial) * u128::from(self.divisor());
        (ticks * u128::from(crate::clock::tsc_hz()) / u128::from(TIMER_HZ))
            .min(u128::from(u64::MAX / 4)) as u64
    }

    fn current_count(&self) -> u32 {
        if self.timer_at == u64::MAX || self.timer_mode() == 2 {
            return 0;
        }
        let left = self.timer_at.saturating_sub(host_tsc());
        let ticks = u128::from(left) * u128::from(TIMER_HZ) / u128::from(crate::clock::tsc_hz());
        (ticks / u128::from(self.divisor())).min(u128::from(self.timer_initial)) as u32
    }

    fn word(set: &[u64; 4], index: u32) -> u32 {
        (set[(index / 2) as usize] >> (32 * (index % 2))) as u32
    }

    /// Registers by number; `None`: there is no such register.
    fn read(&mut self, register: u32) -> Option<u32> {
        Some(match register {
            reg::ID if self.x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::APR => 0,
            reg::PPR => self.ppr(),
            reg::EOI if !self.x2apic() => 0,
            reg::LDR => self.logical_id(),
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            r @ reg::ISR..=0x17 => Self::word(&self.isr, r - reg::ISR),
            r @ reg::TMR..=0x1f => Self::word(&self.tmr, r - reg::TMR),
            r @ reg::IRR..=0x27 => Self::word(&self.irr, r - reg::IRR),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            r @ reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[(r - reg::LVT_TIMER) as usize],
            reg::TIMER_INITIAL => self.timer_initial,
            reg::TIMER_CURRENT => self.current_count(),
            reg::TIMER_DIVIDE => self.timer_divide,
            _ => return None,
        })
    }

    /// Registers in the saved form: one word per 16-byte slot.
    pub fn save(&mut self) -> Vec<u32> {
        let mut slots: Vec<u32> = (0..64)
            .map(|r| {
                if r == reg::TIMER_CURRENT {
                    0
                } else {
                    self.read(r).unwrap_or(0)
                }
            })
            .collect();
        slots[reg::TIMER_CURRENT as usize] = self.current_count();
        slots[reg::ICR_HIGH as usize] = (self.icr >> 32) as u32;
        slots[reg::DFR as usize] = self.dfr;
        slots[reg::LDR as usize] = self.ldr;
        slots
    }

    /// The reverse of [`Apic::save`]; missing slots count as zero.
    pub fn restore(&mut self, slots: &[u32], base: u64, tsc_deadline: u64, tsc_offset: u64) {
        let at = |r: u32| slots.get(r as usize).copied().unwrap_or(0);
        self.base = base;
        (self.tpr, self.ldr, self.dfr, self.svr) = (
            at(reg::TPR) & 0xff,
            at(reg::LDR),
            at(reg::DFR),
            at(reg::SVR) & 0x1ff,
        );
        for i in 0..4 {
            let pair =
                |first: u32| u64::from(at(first + 2 * i)) | u64::from(at(first + 2 * i + 1)) << 32;
            (
                self.isr[i as usize],
                self.tmr[i as usize],
                self.irr[i as usize],
            ) = (pair(reg::ISR), pair(reg::TMR), pair(reg::IRR));
        }
        self.esr = at(reg::ESR);
        self.icr = u64::from(at(reg::ICR)) | u64::from(at(reg::ICR_HIGH)) << 32;
        for i in 0..LVTS {
            self.lvt[i] = at(reg::LVT_TIMER + i as u32);
        }
        (self.timer_initial, self.timer_divide) = (at(reg::TIMER_INITIAL), at(reg::TIMER_DIVIDE));
        self.tsc_deadline = tsc_deadline;
        self.timer_at = u64::MAX;
        let now = host_tsc();
        if self.timer_mode() == 2 {
            if tsc_deadline != 0 {
                self.timer_at = tsc_deadline.wrapping_sub(tsc_offset);
            }
        } else if at(reg::TIMER_CURRENT) != 0 {
            let ticks = u128::from(at(reg::TIMER_CURRENT)) * u128::from(self.divisor());
            let left = ticks * u128::from(crate::clock::tsc_hz()) / u128::from(TIMER_HZ);
            self.timer_start = now;
            self.timer_at = now.saturating_add(left as u64);
        }
    }
}

fn highest(set: &[u64; 4]) -> Option<u8> {
    set.iter()
        .enumerate()
        .rev()
        .find(|(_, w)| **w != 0)
        .map(|(i, w)| (i as u32 * 64 + 63 - w.leading_zeros()) as u8)
}

/// Tells senders how this CPU is addressed.
pub fn publish(cpu: &Cpu) {
    let apic = &cpu.system.apic;
    let cluster = apic.dfr >> 28 == 0;
    let word =
        u64::from(apic.logical_id()) | u64::from(cluster) << 32 | u64::from(apic.x2apic()) << 33;
    cpu.mailbox.apic.destination.store(word, Ordering::SeqCst);
}

/// Asks for a look at the interrupts soon, where one has become deliverable.
pub fn reconsider(cpu: &mut Cpu) {
    if cpu.system.apic.pending().is_some() {
        cpu.interrupt_waits = 1;
        cpu.attention.store(1, Ordering::SeqCst);
    }
}

/// MOV to CR8.
pub fn set_task_priority(cpu: &mut Cpu, class: u64) {
    cpu.system.apic.tpr = (class as u32 & 15) << 4;
    reconsider(cpu);
}

/// Sets the alarm for the timer.
pub fn arm(cpu: &mut Cpu) {
    let at = cpu.system.apic.timer_at;
    cpu.mailbox
        .set_alarm(if at == u64::MAX { 0 } else { at.max(1) });
}

/// WRMSR to IA32_TSC_DEADLINE: ignored unless the timer is in that mode.
pub fn set_deadline(cpu: &mut Cpu, value: u64) {
    if cpu.system.apic.timer_mode() != 2 {
        return;
    }
    cpu.system.apic.tsc_deadline = value;
    cpu.system.apic.timer_at = if value == 0 {
        u64::MAX
    } else {
        value.wrapping_sub(cpu.tsc_offset)
    };
    tick(cpu);
    arm(cpu);
    reconsider(cpu);
}

/// The host TSC of the next timer interrupt.
pub fn next_deadline(cpu: &Cpu) -> Option<u64> {
    let at = cpu.system.apic.timer_at;
    (at != u64::MAX).then_some(at)
}

/// Fires the timer if its time has come.
pub fn tick(cpu: &mut Cpu) {
    let apic = &mut cpu.system.apic;
    if apic.timer_at == u64::MAX {
        return;
    }
    let now = host_tsc();
    if now < apic.timer_at {
        return;
    }
    let again = match apic.timer_mode() {
        1 => {
            let period = apic.period().max(1);
            apic.timer_at += (now - apic.timer_at) / period * period + period;
            true
        }
        mode => {
            apic.timer_at = u64::MAX;
            if mode == 2 {
                apic.tsc_deadline = 0;
            }
            false
        }
    };
    let entry = apic.lvt[0];
    if entry & LVT_MASKED == 0 {
        apic.request(entry as u8, false);
    }
    if again {
        arm(cpu);
    }
}

/// The interrupt to deliver now, already acknowledged; the caller has looked at RFLAGS.IF.
pub fn accept(cpu: &mut Cpu) -> Option<u8> {
    if let Some(vector) = cpu.system.apic.pending() {
        cpu.system.apic.acknowledge(vector);
        return Some(vector);
    }
    if cpu.id == 0 && cpu.system.apic.accepts_external() {
        cpu.mailbox.apic.external.store(false, Ordering::SeqCst);
        return cpu.io().and_then(|io| io.pic_interrupt());
    }
    None
}

/// True where an interrupt would be delivered if RFLAGS.IF were set.
pub fn waits(cpu: &Cpu) -> bool {
    cpu.system.apic.pending().is_some()
        || (cpu.mailbox.apic.external.load(Ordering::SeqCst) && cpu.system.apic.accepts_external())
}

/// Whether `cpu` has a reason to leave HLT.
pub fn wakes(cpu: &Cpu) -> bool {
    match cpu.system.activity {
        Activity::WaitForSipi => false,
        Activity::Running => true,
        Activity::Halted => {
            (cpu.system.nmi_pending && !cpu.system.nmi_masked)
                || (cpu.rflags & flag::IF != 0 && waits(cpu))
        }
    }
}

/// The xAPIC page; false: the address is not in it.
pub fn page_read(cpu: &mut Cpu, gpa: u64, out: &mut [u8]) -> bool {
    let Some(offset) = page_offset(cpu, gpa) else {
        return false;
    };
    if matches!(offset >> 4, reg::TIMER_CURRENT) {
        tick(cpu);
        reconsider(cpu);
    }
    let value = cpu.system.apic.read(offset >> 4).unwrap_or(0);
    let bytes = value.to_le_bytes();
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = bytes.get((offset & 15) as usize + i).copied().unwrap_or(0);
    }
    true
}

/// As [`page_read`]. Only aligned writes of four bytes do something, as on hardware.
pub fn page_write(cpu: &mut Cpu, gpa: u64, data: &[u8]) -> bool {
    let Some(offset) = page_offset(cpu, gpa) else {
        return false;
    };
    if let Ok(bytes) = <[u8; 4]>::try_from(data)
        && offset & 15 == 0
    {
        write(cpu, offset >> 4, u32::from_le_bytes(bytes));
    }
    true
}

fn page_offset(cpu: &Cpu, gpa: u64) -> Option<u32> {
    let apic = &cpu.system.apic;
    (apic.enabled() && !apic.x2apic() && gpa & !0xfff == apic.base & super::paging::ADDRESS)
        .then_some(gpa as u32 & 0xfff)
}

fn write(cpu: &mut Cpu, register: u32, value: u32) {
    let apic = &mut cpu.system.apic;
    match register {
        reg::TPR => {
            apic.tpr = value & 0xff;
            reconsider(cpu);
        }
        reg::EOI => end_of_interrupt(cpu),
        reg::LDR => {
            apic.ldr = value & 0xff00_0000;
            publish(cpu);
        }
        reg::DFR => {
            apic.dfr = value | 0x0fff_ffff;
            publish(cpu);
        }
        reg::SVR => {
            apic.svr = value & 0x1ff;
            if apic.svr & 1 << 8 == 0 {
                for entry in &mut apic.lvt {
                    *entry |= LVT_MASKED;
                }
            }
        }
        reg::ESR => (apic.esr, apic.esr_latched) = (apic.esr_latched, 0),
        reg::ICR => {
            apic.icr = apic.icr & !0xffff_ffff | u64::from(value & !(1 << 12));
            send_command(cpu);
        }
        reg::ICR_HIGH => apic.icr = apic.icr & 0xffff_ffff | u64::from(value) << 32,
        r @ reg::LVT_TIMER..=reg::LVT_ERROR => write_lvt(cpu, (r - reg::LVT_TIMER) as usize, value),
        reg::TIMER_INITIAL => {
            if apic.timer_mode() == 2 {
                return;
            }
            apic.timer_initial = value;
            apic.timer_start = host_tsc();
            apic.timer_at = if value == 0 {
                u64::MAX
            } else {
                apic.timer_start.saturating_add(apic.period())
            };
            arm(cpu);
        }
        reg::TIMER_DIVIDE => apic.timer_divide = value & 0xb,
        reg::CMCI | reg::ID => {}
        _ => apic.esr_latched |= ESR_REGISTER,
    }
}

fn write_lvt(cpu: &mut Cpu, index: usize, value: u32) {
    let apic = &mut cpu.system.apic;
    let known = match index {
        0 => 0x0007_00ff,
        1 | 2 => 0x0001_07ff,
        3 | 4 => 0x0001_a7ff,
        _ => 0x0001_00ff,
    };
    let mut value = value & known;
    if !apic.software_enabled() {
        value |= LVT_MASKED;
    }
    if index == 0 && (value ^ apic.lvt[0]) >> 17 & 3 != 0 {
        let deadline_changes = (value >> 17 & 3 == 2) != (apic.timer_mode() == 2);
        apic.lvt[0] = value;
        if deadline_changes {
            apic.timer_at = u64::MAX;
            apic.tsc_deadline = 0;
            apic.timer_initial = 0;
            arm(cpu);
        }
        return;
    }
    apic.lvt[index] = value;
}

fn end_of_interrupt(cpu: &mut Cpu) {
    if let Some(vector) = cpu.system.apic.end()
        && let Some(io) = cpu.io()
    {
        io.eoi(vector);
    }
    reconsider(cpu);
}

/// Sends what the ICR says (SDM vol. 3, 11.6.1).
fn send_command(cpu: &mut Cpu) {
    let icr = cpu.system.apic.icr;
    let low = icr as u32;
    let x2apic = cpu.system.apic.x2apic();
    let (mode, vector) = ((low >> 8 & 7) as u8, low as u8);
    let level_triggered = low & 1 << 15 != 0;
    if mode == 5 && level_triggered && low & 1 << 14 == 0 {
        return; // INIT level de-assert: a relic.
    }
    if mode < 2 && vector < 16 {
        cpu.system.apic.esr_latched |= ESR_SEND_ILLEGAL;
        return;
    }
    let destination = if x2apic {
        (icr >> 32) as u32
    } else {
        (icr >> 56) as u32
    };
    let everyone = if x2apic { u32::MAX } else { 0xff };
    let mut message = Message {
        destination,
        logical: low & 1 << 11 != 0,
        broadcast: destination == everyone,
        mode,
        vector,
        level: false,
    };
    let mut except = None;
    match low >> 18 & 3 {
        0 => {}
        1 => (message.destination, message.logical, message.broadcast) = (cpu.id, false, false),
        2 => message.broadcast = true,
        _ => (message.broadcast, except) = (true, Some(cpu.id)),
    }
    let machine = cpu.machine.clone();
    send(&machine, message, except);
}

/// RDMSR 0x800..=0x8ff.
pub fn msr_read(cpu: &mut Cpu, msr: u32) -> Result<u64, Fault> {
    let apic = &mut cpu.system.apic;
    if !apic.x2apic() {
        return Err(Fault::GP);
    }
    match msr - 0x800 {
        reg::ICR => Ok(apic.icr),
        reg::EOI | reg::SELF_IPI => Err(Fault::GP),
        register => apic.read(register).map(u64::from).ok_or(Fault::GP),
    }
}

/// WRMSR 0x800..=0x8ff.
pub fn msr_write(cpu: &mut Cpu, msr: u32, value: u64) -> Result<(), Fault> {
    let apic = &mut cpu.system.apic;
    if !apic.x2apic() {
        return Err(Fault::GP);
    }
    let register = msr - 0x800;
    if register == reg::ICR {
        apic.icr = value & !(1 << 12);
        send_command(cpu);
        return Ok(());
    }
    if value >> 32 != 0 {
        return Err(Fault::GP);
    }
    let value = value as u32;
    match register {
        reg::TPR if value > 0xff => Err(Fault::GP),
        reg::EOI | reg::ESR if value != 0 => Err(Fault::GP),
        reg::SELF_IPI => {
            if value > 0xff {
                return Err(Fault::GP);
            }
            apic.request(value as u8, false);
            reconsider(cpu);
            Ok(())
        }
        reg::TPR
        | reg::EOI
        | reg::SVR
        | reg::ESR
        | reg::LVT_TIMER..=reg::LVT_ERROR
        | reg::TIMER_INITIAL
        | reg::TIMER_DIVIDE => {
            write(cpu, register, value);
            Ok(())
        }
        _ => Err(Fault::GP),
    }
}

/// WRMSR IA32_APIC_BASE (SDM vol. 3, 11.4.4 and figure 11-27).
pub fn set_base(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let old = cpu.system.apic.base;
    let mode = |v: u64| v & (BASE_ENABLE | BASE_X2APIC);
    let known = super::paging::ADDRESS | BASE_BSP | BASE_X2APIC | BASE_ENABLE;
    let invalid = value & !known != 0
        || mode(value) == BASE_X2APIC
        || (mode(old) == BASE_ENABLE | BASE_X2APIC && mode(value) == BASE_ENABLE)
        || (mode(old) == 0 && mode(value) == BASE_ENABLE | BASE_X2APIC);
    if invalid {
        return Err(Fault::GP);
    }
    if mode(value) == 0 {
        cpu.system.apic.reset();
        arm(cpu);
    }
    cpu.system.apic.base = value & !BASE_BSP | old & BASE_BSP;
    publish(cpu);
    Ok(())
}
