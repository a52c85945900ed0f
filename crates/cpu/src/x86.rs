//! The architectural state of one x86-64 CPU, as saved and restored, whatever ran it.
//! Sources: Intel SDM vol. 3; the layout is our own and versioned.

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part (SDM vol. 3, 3.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    /// Bits 0..=3 type, 4 S, 5..=6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G: the descriptor's bits 40..=55.
    pub attributes: u16,
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}

/// Whether a CPU runs (SDM vol. 3, 9.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Activity {
    #[default]
    Running,
    Halted,
    /// Waits for a start-up message; only an application processor does.
    WaitForSipi,
}

/// General registers in the encoding's order: rax rcx rdx rbx rsp rbp rsi rdi r8..r15.
pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

/// Everything a guest can see of one CPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuState {
    /// Of this structure: 1.
    pub version: u32,
    pub activity: Activity,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// es cs ss ds fs gs, the encoding's order.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub xcr0: u64,
    pub dr: [u64; 8],
    pub efer: u64,
    /// Model-specific registers by number, sorted.
    pub msrs: Vec<(u32, u64)>,
    /// XSAVE area in the standard (not compacted) format (SDM vol. 1, 13.4).
    pub xsave: Vec<u8>,
    /// Local APIC registers, one u32 per 16-byte slot (SDM vol. 3, 11.4.1), 64 of them.
    pub apic: Vec<u32>,
    /// x2APIC id, base MSR.
    pub apic_base: u64,
    pub tsc_deadline: u64,
    /// The guest's time-stamp counter when saved.
    pub tsc: u64,
    /// A delivered but not yet taken exception or NMI, and the STI/MOV-SS shadow.
    pub pending_nmi: bool,
    pub nmi_masked: bool,
    pub interrupt_shadow: bool,
}
