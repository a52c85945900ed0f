//! Interrupt messages: who they are for, and how they go into and out of mailboxes (SDM vol. 3, 11.6 and 11.11).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::apic::{arm, next_deadline, tick};
use crate::machine::Machine;
use crate::replay::Mail;
use crate::state::{Cpu, Mailbox, request};

/// What senders need of a CPU's APIC, kept in its mailbox.
#[derive(Debug, Default)]
pub struct Shared {
    /// Of the vectors posted in the mailbox, those that are level-triggered.
    pub(super) level: [AtomicU64; 4],
    /// LDR in bits 31..=0; bit 32: cluster model; bit 33: x2APIC.
    pub(super) destination: AtomicU64,
    /// An ExtINT message came: the old PIC has something.
    pub(super) external: AtomicBool,
}

/// An interrupt message, from an MSI or an ICR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub destination: u32,
    pub logical: bool,
    /// Addressed to everyone.
    pub broadcast: bool,
    /// SDM vol. 3, table 11-3: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 start-up, 7 ExtINT.
    pub mode: u8,
    pub vector: u8,
    pub level: bool,
}

impl Message {
    /// Decodes an MSI (SDM vol. 3, 11.11); `None`: not an interrupt message.
    pub fn from_msi(address: u64, data: u32) -> Option<Message> {
        if address >> 20 != 0xfee {
            return None;
        }
        let destination = (address >> 12 & 0xff) as u32;
        let logical = address & 4 != 0;
        Some(Message {
            destination,
            logical,
            broadcast: destination == 0xff,
            mode: (data >> 8 & 7) as u8,
            vector: data as u8,
            level: data & 1 << 15 != 0,
        })
    }
}

/// Sends a message to every CPU it is meant for; with `except`, not to that one.
/// False: nobody was addressed.
pub fn send(machine: &Machine, message: Message, except: Option<u32>) -> bool {
    let mailboxes = machine.mailboxes.lock().unwrap_or_else(|e| e.into_inner());
    let mut reached = false;
    for (id, mailbox) in mailboxes.iter().enumerate() {
        let id = id as u32;
        if except == Some(id) || !(message.broadcast || addressed(mailbox, id, message)) {
            continue;
        }
        reached = true;
        post(mailbox, message);
        if message.mode == 1 {
            break;
        }
    }
    reached
}

fn addressed(mailbox: &Mailbox, id: u32, message: Message) -> bool {
    if !message.logical {
        return message.destination == id;
    }
    let word = mailbox.apic.destination.load(Ordering::SeqCst);
    let ldr = word as u32;
    let destination = message.destination;
    if word & 1 << 33 != 0 {
        destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0
    } else if word & 1 << 32 != 0 {
        destination >> 4 == ldr >> 28 && destination & (ldr >> 24) & 15 != 0
    } else {
        destination & (ldr >> 24) != 0
    }
}

fn post(mailbox: &Mailbox, message: Message) {
    match message.mode {
        0 | 1 => {
            let (word, bit) = (
                usize::from(message.vector / 64),
                1u64 << (message.vector % 64),
            );
            if message.level {
                mailbox.apic.level[word].fetch_or(bit, Ordering::SeqCst);
            } else {
                mailbox.apic.level[word].fetch_and(!bit, Ordering::SeqCst);
            }
            let before = mailbox.interrupts[word].fetch_or(bit, Ordering::SeqCst);
            if before & bit != 0 {
                return;
            }
        }
        4 => _ = mailbox.requests.fetch_or(request::NMI, Ordering::SeqCst),
        5 => _ = mailbox.requests.fetch_or(request::INIT, Ordering::SeqCst),
        6 => {
            mailbox
                .sipi_vector
                .store(u32::from(message.vector), Ordering::SeqCst);
            mailbox.requests.fetch_or(request::SIPI, Ordering::SeqCst);
        }
        7 => mailbox.apic.external.store(true, Ordering::SeqCst),
        _ => return,
    }
    mailbox.ring();
}

const OUR_REQUESTS: u32 = request::NMI | request::INIT | request::SIPI | request::ALARM;

/// Empties the mailbox.
fn collect(mailbox: &Mailbox) -> Mail {
    let mut mail = Mail::default();
    for word in 0..4 {
        if mailbox.interrupts[word].load(Ordering::Relaxed) != 0 {
            mail.vectors[word] = mailbox.interrupts[word].swap(0, Ordering::SeqCst);
            mail.level[word] = mailbox.apic.level[word].load(Ordering::SeqCst) & mail.vectors[word];
        }
    }
    if mailbox.requests.load(Ordering::SeqCst) & OUR_REQUESTS != 0 {
        mail.requests = mailbox.requests.fetch_and(!OUR_REQUESTS, Ordering::SeqCst) & OUR_REQUESTS;
    }
    mail
}

/// Moves what the mailbox holds into the APIC. Answers the requests other than those kept for the run loop.
pub fn take_mail(cpu: &mut Cpu) -> u32 {
    let mut mail = collect(&cpu.mailbox);
    if let Some(replay) = &mut cpu.replay {
        mail.external = cpu.mailbox.apic.external.swap(false, Ordering::SeqCst);
        mail.requests &= !request::ALARM;
        mail = replay.mail(cpu.count, mail);
        if mail.external {
            cpu.mailbox.apic.external.store(true, Ordering::SeqCst);
        }
        tick(cpu);
    }
    for word in 0..4 {
        let mut bits = mail.vectors[word];
        while bits != 0 {
            let bit = bits.trailing_zeros();
            bits &= bits - 1;
            cpu.system.apic.request(
                (word as u32 * 64 + bit) as u8,
                mail.level[word] >> bit & 1 != 0,
            );
        }
    }
    if mail.requests & request::ALARM != 0 {
        // The clock forgets an alarm that it rang: another CPU's view of time may differ a little, so ask again.
        tick(cpu);
        if next_deadline(cpu).is_some() {
            arm(cpu);
        }
    }
    mail.requests
}

/// As [`take_mail`], leaving the requests where they are but for an NMI.
pub fn take_mail_for_save(cpu: &mut Cpu) {
    let requests = take_mail(cpu);
    if requests & request::NMI != 0 {
        cpu.system.nmi_pending = true;
    }
    cpu.mailbox
        .requests
        .fetch_or(requests & (request::INIT | request::SIPI), Ordering::SeqCst);
}
