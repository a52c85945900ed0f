//! Our own CPU state, taken from and given to KVM.

use cpu::CpuError;
use cpu::x86::{Activity, CpuState, Segment, TableRegister};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, Msrs,
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_xcrs, kvm_xsave,
};

use crate::host;
use crate::vcpu::KvmVcpu;

const VERSION: u32 = 1;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const XSAVE_LEN: usize = 4096;

fn segment_of(from: &kvm_segment) -> Segment {
    let bit = |value: u8, shift: u32| u16::from(value & 1) << shift;
    Segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        attributes: u16::from(from.type_ & 0xf)
            | bit(from.s, 4)
            | u16::from(from.dpl & 3) << 5
            | bit(from.present, 7)
            | bit(from.avl, 12)
            | bit(from.l, 13)
            | bit(from.db, 14)
            | bit(from.g, 15),
        unusable: from.unusable != 0,
    }
}

fn kvm_segment_of(from: &Segment) -> kvm_segment {
    let bit = |shift: u32| (from.attributes >> shift & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 0xf) as u8,
        s: bit(4),
        dpl: (from.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: u8::from(from.unusable),
        padding: 0,
    }
}

fn table_of(from: &kvm_dtable) -> TableRegister {
    TableRegister {
        base: from.base,
        limit: from.limit,
    }
}

fn kvm_table_of(from: &TableRegister) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..Default::default()
    }
}

/// Reads as many of `wanted` as KVM gives; it stops at the first it does not, which is then left out.
fn read_msrs(vcpu: &KvmVcpu, wanted: &[u32]) -> Result<Vec<(u32, u64)>, CpuError> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| CpuError::State("too many MSRs".into()))?;
        let count = vcpu
            .fd
            .get_msrs(&mut msrs)
            .map_err(host("reading MSRs"))?
            .min(rest.len());
        found.extend(
            msrs.as_slice()[..count]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    found.sort_unstable();
    Ok(found)
}

fn write_msrs(vcpu: &KvmVcpu, values: &[(u32, u64)]) -> Result<(), CpuError> {
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let msrs =
            Msrs::from_entries(&entries).map_err(|_| CpuError::State("too many MSRs".into()))?;
        let count = vcpu.fd.set_msrs(&msrs).map_err(host("setting MSRs"))?;
        // The first refused one is the host's own (read-only, or of another CPU): the rest still counts.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

pub(crate) fn save(vcpu: &KvmVcpu) -> Result<CpuState, CpuError> {
    let fd = &vcpu.fd;
    let mp = fd
        .get_mp_state()
        .map_err(host("reading the CPU's activity"))?;
    let regs = fd.get_regs().map_err(host("reading registers"))?;
    let sregs = fd.get_sregs().map_err(host("reading system registers"))?;
    let xcrs = fd.get_xcrs().map_err(host("reading XCR0"))?;
    let xsave = fd.get_xsave().map_err(host("reading the FPU"))?;
    let debug = fd
        .get_debug_regs()
        .map_err(host("reading debug registers"))?;
    let lapic = fd.get_lapic().map_err(host("reading the local APIC"))?;
    let events = fd
        .get_vcpu_events()
        .map_err(host("reading pending events"))?;
    let mut msrs = read_msrs(vcpu, &vcpu.msrs)?;
    let value = |wanted: u32| {
        msrs.iter()
            .find(|(index, _)| *index == wanted)
            .map_or(0, |(_, data)| *data)
    };
    let (tsc, tsc_deadline) = (value(MSR_TSC), value(MSR_TSC_DEADLINE));
    msrs.retain(|(index, _)| *index != MSR_TSC && *index != MSR_TSC_DEADLINE);
    let xcr0 = xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(16)]
        .iter()
        .find(|entry| entry.xcr == 0)
        .map_or(1, |entry| entry.value);
    Ok(CpuState {
        version: VERSION,
        activity: match mp.mp_state {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        },
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [
            &sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs,
        ]
        .map(segment_of),
        ldtr: segment_of(&sregs.ldt),
        tr: segment_of(&sregs.tr),
        gdtr: table_of(&sregs.gdt),
        idtr: table_of(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        xcr0,
        dr: [
            debug.db[0],
            debug.db[1],
            debug.db[2],
            debug.db[3],
            0,
            0,
            debug.dr6,
            debug.dr7,
        ],
        efer: sregs.efer,
        msrs,
        xsave: xsave
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect(),
        apic: lapic
            .regs
            .chunks(16)
            .map(|slot| {
                u32::from_le_bytes([slot[0] as u8, slot[1] as u8, slot[2] as u8, slot[3] as u8])
            })
            .collect(),
        apic_base: sregs.apic_base,
        tsc_deadline,
        tsc,
        pending_nmi: events.nmi.pending != 0 || events.nmi.injected != 0,
        nmi_masked: events.nmi.masked != 0,
        interrupt_shadow: events.interrupt.shadow != 0,
    })
}

pub(crate) fn restore(vcpu: &KvmVcpu, state: &CpuState) -> Result<(), CpuError> {
    if state.version != VERSION {
        return Err(CpuError::State(format!(
            "version {} is not {VERSION}",
            state.version
        )));
    }
    if state.apic.len() != 64 || state.xsave.len() > XSAVE_LEN {
        return Err(CpuError::State(format!(
            "{} APIC registers and {} bytes of XSAVE area; 64 and at most {XSAVE_LEN} are wanted",
            state.apic.len(),
            state.xsave.len()
        )));
    }
    let fd = &vcpu.fd;
    let g = &state.gpr;
    let regs = kvm_regs {
        rax: g[0],
        rcx: g[1],
        rdx: g[2],
        rbx: g[3],
        rsp: g[4],
        rbp: g[5],
        rsi: g[6],
        rdi: g[7],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: state.rip,
        rflags: state.rflags,
    };
    let mut sregs = fd.get_sregs().map_err(host("reading system registers"))?;
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(kvm_segment_of);
    (sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs) = (es, cs, ss, ds, fs, gs);
    sregs.ldt = kvm_segment_of(&state.ldtr);
    sregs.tr = kvm_segment_of(&state.tr);
    sregs.gdt = kvm_table_of(&state.gdtr);
    sregs.idt = kvm_table_of(&state.idtr);
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8) =
        (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8);
    sregs.efer = state.efer;
    sregs.apic_base = state.apic_base;
    // An interrupt already taken from the APIC is in its in-service bit and the pending event: none is invented.
    sregs.interrupt_bitmap = [0; 4];
    fd.set_sregs(&sregs)
        .map_err(host("setting system registers"))?;
    fd.set_regs(&regs).map_err(host("setting registers"))?;
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = state.xcr0;
    fd.set_xcrs(&xcrs).map_err(host("setting XCR0"))?;
    if !state.xsave.is_empty() {
        let mut xsave = kvm_xsave::default();
        let mut bytes = state.xsave.clone();
        bytes.resize(XSAVE_LEN, 0);
        for (word, chunk) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        // SAFETY: without AMX, which CPUID hides, KVM reads exactly the 4096 bytes of `region`.
        unsafe { fd.set_xsave(&xsave) }.map_err(host("setting the FPU"))?;
    }
    let debug = kvm_debugregs {
        db: [state.dr[0], state.dr[1], state.dr[2], state.dr[3]],
        dr6: state.dr[6],
        dr7: state.dr[7],
        ..Default::default()
    };
    fd.set_debug_regs(&debug)
        .map_err(host("setting debug registers"))?;
    let mut lapic = kvm_lapic_state::default();
    for (slot, value) in lapic.regs.chunks_mut(16).zip(&state.apic) {
        for (to, from) in slot.iter_mut().zip(value.to_le_bytes()) {
            *to = from as std::os::raw::c_char;
        }
    }
    fd.set_lapic(&lapic)
        .map_err(host("setting the local APIC"))?;
    let mut msrs = state.msrs.clone();
    msrs.push((MSR_TSC, state.tsc));
    // After the APIC, whose timer mode decides whether a deadline is taken, and after the counter it compares with.
    msrs.push((MSR_TSC_DEADLINE, state.tsc_deadline));
    write_msrs(vcpu, &msrs)?;
    let mp_state = match state.activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => KVM_MP_STATE_UNINITIALIZED,
    };
    fd.set_mp_state(kvm_mp_state { mp_state })
        .map_err(host("setting the CPU's activity"))?;
    let mut events = fd
        .get_vcpu_events()
        .map_err(host("reading pending events"))?;
    events.nmi.pending = u8::from(state.pending_nmi);
    events.nmi.injected = 0;
    events.nmi.masked = u8::from(state.nmi_masked);
    events.interrupt.shadow = u8::from(state.interrupt_shadow);
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_vcpu_events(&events)
        .map_err(host("setting pending events"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_goes_there_and_back() {
        for attributes in [0xa09b, 0xc093, 0x008b, 0x10f3] {
            let segment = Segment {
                base: 7,
                limit: 9,
                selector: 0x10,
                attributes,
                unusable: attributes == 0x8b,
            };
            assert_eq!(segment_of(&kvm_segment_of(&segment)), segment);
        }
    }
}
