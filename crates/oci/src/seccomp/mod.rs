//! Seccomp (config-linux "Seccomp"): the specification's rules as a program of the kernel's classic BPF machine.
//!
//! Rules with argument tests are tried in their order before rules without; the first that matches decides. Names
//! this table does not know are ignored, as every runtime does. Where the default is an errno, calls newer than all
//! the profile names answer ENOSYS, so that C libraries fall back (as runc does).

mod assembler;
mod table;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use oci_spec::runtime::{
    Arch as SpecArch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use crate::error::{Error, Result};
use assembler::{Alternative, Assembler, Test};

/// The architectures of [`table::TABLE`], in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Arch {
    X86_64,
    X86,
    X32,
    Aarch64,
    Arm,
}

/// Marks an x32 call on x86-64.
const X32_BIT: u32 = 0x4000_0000;

impl Arch {
    /// `AUDIT_ARCH_*` (linux/audit.h).
    const fn audit(self) -> u32 {
        match self {
            Arch::X86_64 | Arch::X32 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
            Arch::Aarch64 => 0xc000_00b7,
            Arch::Arm => 0x4000_0028,
        }
    }

    fn native() -> Result<Arch> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Arch::X86_64),
            "aarch64" => Ok(Arch::Aarch64),
            other => Err(Error::unsupported(format!(
                "seccomp is not supported on {other}: remove linux.seccomp"
            ))),
        }
    }

    fn of(arch: SpecArch) -> Option<Arch> {
        match arch {
            SpecArch::ScmpArchX86_64 => Some(Arch::X86_64),
            SpecArch::ScmpArchX86 => Some(Arch::X86),
            SpecArch::ScmpArchX32 => Some(Arch::X32),
            SpecArch::ScmpArchAarch64 => Some(Arch::Aarch64),
            SpecArch::ScmpArchArm => Some(Arch::Arm),
            _ => None,
        }
    }
}

/// A filter ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub(crate) filter: Vec<Instruction>,
    pub(crate) flags: libc::c_ulong,
    /// Where the listener goes, with its metadata, if a rule notifies.
    pub(crate) listener: Option<(PathBuf, String)>,
}

/// One instruction (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

impl Program {
    /// Loads it into the calling thread. Returns the listener's descriptor where a rule notifies.
    pub(crate) fn load(&self) -> std::io::Result<Option<std::os::fd::OwnedFd>> {
        let filter: Vec<libc::sock_filter> = self
            .filter
            .iter()
            .map(|i| libc::sock_filter {
                code: i.code,
                jt: i.jt,
                jf: i.jf,
                k: i.k,
            })
            .collect();
        crate::syscall::seccomp(self.flags, &filter)
    }

    /// How many instructions it has.
    pub fn len(&self) -> usize {
        self.filter.len()
    }

    pub fn is_empty(&self) -> bool {
        self.filter.is_empty()
    }
}

thread_local! {
    static CACHE: RefCell<Vec<(LinuxSeccomp, Rc<Program>)>> = const { RefCell::new(Vec::new()) };
}

/// [`compile`], remembering the last few: an engine starts most containers with one profile.
///
/// # Errors
/// As [`compile`].
pub fn compiled(profile: &LinuxSeccomp) -> Result<Rc<Program>> {
    CACHE.with_borrow_mut(|cache| {
        if let Some((_, program)) = cache.iter().find(|(known, _)| known == profile) {
            return Ok(program.clone());
        }
        let program = Rc::new(compile(profile)?);
        if cache.len() == 8 {
            cache.remove(0);
        }
        cache.push((profile.clone(), program.clone()));
        Ok(program)
    })
}

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_NOTIFY: u32 = 0x7fc0_0000;

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32> {
    let data = errno.unwrap_or(libc::EPERM as u32);
    let carries = matches!(
        action,
        LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace
    );
    if carries && data > 0xffff {
        return Err(Error::invalid(format!(
            "linux.seccomp: errnoRet {data} is too large"
        )));
    }
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => 0,
        LinuxSeccompAction::ScmpActKillProcess => RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => 0x0003_0000,
        LinuxSeccompAction::ScmpActErrno => RET_ERRNO | data,
        LinuxSeccompAction::ScmpActTrace => 0x7ff0_0000 | data,
        LinuxSeccompAction::ScmpActNotify => RET_NOTIFY,
        LinuxSeccompAction::ScmpActLog => 0x7ffc_0000,
        LinuxSeccompAction::ScmpActAllow => 0x7fff_0000,
    })
}

/// Compiles a profile.
///
/// # Errors
/// [`Error::Invalid`] for rules that contradict themselves, [`Error::Unsupported`] for hosts without a table and for
/// a profile too long for the kernel (4,096 instructions).
pub fn compile(profile: &LinuxSeccomp) -> Result<Program> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let native = Arch::native()?;
    let mut archs = vec![native];
    archs.extend(
        profile
            .architectures()
            .iter()
            .flatten()
            .filter_map(|arch| Arch::of(*arch)),
    );
    archs.sort_unstable();
    archs.dedup();

    // The alternatives of every call, once for all architectures.
    let mut calls: BTreeMap<&'static str, (Vec<Alternative>, usize)> = BTreeMap::new();
    let mut notifies = default == RET_NOTIFY;
    for rule in profile.syscalls().iter().flatten() {
        let result = action(rule.action(), rule.errno_ret())?;
        notifies |= result == RET_NOTIFY;
        let sets = test_sets(rule.args().as_deref().unwrap_or_default())?;
        for name in rule.names() {
            if result == RET_NOTIFY && name == "write" {
                return Err(Error::invalid(
                    "linux.seccomp: SCMP_ACT_NOTIFY cannot be used for the write syscall",
                ));
            }
            // runc leaves such rules out: they say what holds anyway.
            if result == default {
                continue;
            }
            let Ok(index) = table::TABLE.binary_search_by(|row| row.name.cmp(name)) else {
                continue;
            };
            let (alternatives, _) = calls
                .entry(table::TABLE[index].name)
                .or_insert_with(|| (Vec::new(), index));
            for tests in &sets {
                alternatives.push(Alternative {
                    tests: tests.clone(),
                    result,
                });
            }
        }
    }
    for (alternatives, _) in calls.values_mut() {
        // Stable: rules with tests keep their order, and those without come last.
        alternatives.sort_by_key(|alternative| alternative.tests.is_empty());
        if let Some(last) = alternatives
            .iter()
            .position(|alternative| alternative.tests.is_empty())
        {
            alternatives.truncate(last + 1);
        }
    }

    let mut assembler = Assembler::new(default, RET_KILL_PROCESS);
    let mut blocks = Vec::new();
    for audit in [Arch::X86_64, Arch::X86, Arch::Aarch64, Arch::Arm] {
        let family: Vec<Arch> = archs
            .iter()
            .copied()
            .filter(|arch| arch.audit() == audit.audit())
            .collect();
        if family.is_empty() {
            continue;
        }
        let mut numbers: BTreeMap<u32, &[Alternative]> = BTreeMap::new();
        let mut newest = 0;
        for arch in &family {
            let base = if *arch == Arch::X32 { X32_BIT } else { 0 };
            for (alternatives, index) in calls.values() {
                if let Ok(number) = u32::try_from(table::TABLE[*index].numbers[*arch as usize]) {
                    numbers.insert(base + number, alternatives);
                }
            }
            for name in profile
                .syscalls()
                .iter()
                .flatten()
                .flat_map(|rule| rule.names())
            {
                if let Ok(index) = table::TABLE.binary_search_by(|row| row.name.cmp(name)) {
                    let number = table::TABLE[index].numbers[*arch as usize];
                    // x32 has a second run of numbers, from 512 on, for what was there from the start.
                    let second = *arch == Arch::X32 && number >= 512;
                    if number < 0xf_0000 && !second {
                        newest = newest.max(u32::try_from(number).unwrap_or(0));
                    }
                }
            }
        }
        let stub = (default & 0xffff_0000 == RET_ERRNO && newest > 0)
            .then_some(RET_ERRNO | libc::ENOSYS as u32);
        let gate = match (audit, family.contains(&Arch::X32)) {
            // A process cannot be let around the filter by the other numbering.
            (Arch::X86_64, false) => Some(X32_BIT),
            _ => None,
        };
        blocks.push((
            audit.audit(),
            assembler.block(&numbers, stub.map(|result| (newest + 1, result)), gate),
        ));
    }
    let filter = assembler.finish(&blocks);
    if filter.len() > 4096 {
        return Err(Error::unsupported(format!(
            "linux.seccomp: the profile becomes {} instructions, and the kernel takes 4096",
            filter.len()
        )));
    }
    let mut flags = 0;
    match profile.flags() {
        None => {}
        Some(list) => {
            for flag in list {
                flags |= match flag {
                    // There is one thread: nothing to synchronize, and it excludes a listener.
                    LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
                    LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                        libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                    }
                    LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                        if notifies {
                            1 << 5
                        } else {
                            0
                        }
                    }
                };
            }
        }
    }
    let listener = match (notifies, profile.listener_path()) {
        (true, Some(path)) => {
            flags |= libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
            Some((
                path.clone(),
                profile.listener_metadata().clone().unwrap_or_default(),
            ))
        }
        (true, None) => {
            return Err(Error::invalid(
                "linux.seccomp: SCMP_ACT_NOTIFY needs listenerPath",
            ));
        }
        (false, _) => None,
    };
    Ok(Program {
        filter,
        flags,
        listener,
    })
}

/// The sets of tests a rule stands for: all of one set must hold. A rule that tests one argument twice means either
/// test, as libseccomp's callers have always read it.
fn test_sets(arguments: &[LinuxSeccompArg]) -> Result<Vec<Vec<Test>>> {
    let tests = arguments.iter().map(test).collect::<Result<Vec<Test>>>()?;
    let repeated = tests
        .iter()
        .enumerate()
        .any(|(at, test)| tests[..at].iter().any(|other| other.index == test.index));
    Ok(if repeated {
        tests.into_iter().map(|test| vec![test]).collect()
    } else {
        vec![tests]
    })
}

fn test(argument: &LinuxSeccompArg) -> Result<Test> {
    use assembler::Comparison as C;
    if argument.index() > 5 {
        return Err(Error::invalid(format!(
            "linux.seccomp: argument index {} is not from 0 to 5",
            argument.index()
        )));
    }
    let (value, two) = (argument.value(), argument.value_two().unwrap_or(0));
    let (comparison, mask, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (C::NotEqual, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpLt => (C::Less, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpLe => (C::LessOrEqual, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpEq => (C::Equal, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpGe => (C::GreaterOrEqual, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpGt => (C::Greater, u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (C::Equal, value, two & value),
    };
    Ok(Test {
        index: argument.index() as u8,
        comparison,
        mask,
        value,
    })
}

/// Entry of the fuzz target: any JSON profile compiles or is refused.
pub fn fuzz_profile(data: &[u8]) {
    if let Ok(profile) = serde_json::from_slice::<LinuxSeccomp>(data) {
        let _ = compile(&profile);
    }
}

#[cfg(test)]
mod tests;
