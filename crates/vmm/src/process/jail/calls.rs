//! The system calls of a machine process: a filter over the whole process, and a narrower one for each kind of thread.
//!
//! Filters add up: a call passes only where every filter of its thread lets it. What does not pass is answered with
//! EPERM, so that a defect shows as an error of the machine and not as a process that is gone without a word.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// What a thread of a machine process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thread {
    /// Runs a guest CPU, and the devices' registers that it touches.
    Cpu,
    /// Serves queues of a device: disks, network cards.
    Io,
    /// Serves sockets between host and guest: may make unix sockets, which reach what lies in the machine's folder.
    Sockets,
    /// Writes the console's log and its readers.
    Console,
    /// Answers on the control socket.
    Control,
    /// The user-mode network: the only one that may make sockets of the host's networks.
    Network,
}

const KINDS: [Thread; 6] = [
    Thread::Cpu,
    Thread::Io,
    Thread::Sockets,
    Thread::Console,
    Thread::Control,
    Thread::Network,
];

/// What every thread of Rust and glibc uses: memory, locks, time, its own end.
const EVERY: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_restart_syscall,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

const CPU: &[c_long] = &[
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_arch_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_fcntl,
    libc::SYS_membarrier,
];

const IO: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_eventfd2,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_fcntl,
    libc::SYS_membarrier,
    // A ring is made with the machine; its threads only use it.
    libc::SYS_io_uring_enter,
];

/// Beyond [`IO`]; `socket` itself is allowed by its domain.
const SOCKETS: &[c_long] = &[
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

const CONSOLE: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sendto,
    libc::SYS_fcntl,
];

const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_membarrier,
    // Answered with ENOSYS by a filter beneath, whose answer counts only where this one allows.
    libc::SYS_clone3,
];

const NETWORK: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fcntl,
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
];

/// What only the main thread needs, which makes the machine, again after each reset, and records its end.
const MAIN: &[c_long] = &[
    libc::SYS_newfstatat,
    libc::SYS_flock,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_fchmod,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_socketpair,
    // The socket that host programs reach the guest's by, anew after each reset.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_set_tid_address,
    libc::SYS_sched_setaffinity,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_prlimit64,
    libc::SYS_seccomp,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
];

/// KVM's ioctls have this type in bits 8 to 15 (linux/kvm.h).
const KVM_IOCTLS: u64 = 0xae00;
/// The others that are used, whole: FIONBIO, FIOCLEX, BLKGETSIZE64, BLKDISCARD, BLKZEROOUT, TUNSETOFFLOAD, TUNGETIFF,
/// TUNSETVNETHDRSZ, TUNSETQUEUE. Terminals have some of the same type that would type into them.
const IOCTLS: [u64; 9] = [
    0x5421,
    0x5451,
    0x8008_1272,
    0x1277,
    0x127f,
    0x4004_54d0,
    0x8004_54d2,
    0x4004_54d8,
    0x4004_54d9,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rule(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, compare, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| error.to_string())
}

fn short_rule(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| error.to_string())
}

fn allow(rules: &mut Rules, calls: &[c_long]) {
    for call in calls {
        rules.entry(*call).or_default();
    }
}

/// Device ioctls: all of KVM's, and [`IOCTLS`].
fn allow_ioctls(rules: &mut Rules, kvm: bool) -> Result<(), String> {
    let mut list = Vec::new();
    if kvm {
        list.push(short_rule(1, SeccompCmpOp::MaskedEq(0xff00), KVM_IOCTLS)?);
    }
    for request in IOCTLS {
        list.push(short_rule(1, SeccompCmpOp::Eq, request)?);
    }
    rules.insert(libc::SYS_ioctl, list);
    Ok(())
}

/// Memory that cannot be executed.
fn allow_plain_memory(rules: &mut Rules) -> Result<(), String> {
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    }
    Ok(())
}

/// A thread of this process, never another process.
fn allow_threads(rules: &mut Rules) -> Result<(), String> {
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(
        libc::SYS_clone,
        vec![rule(0, SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    Ok(())
}

/// Unix sockets and no others.
fn allow_unix_sockets(rules: &mut Rules) -> Result<(), String> {
    let domain = short_rule(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
    rules.insert(libc::SYS_socket, vec![domain]);
    Ok(())
}

/// Signals to our own threads.
fn allow_own_signals(rules: &mut Rules) -> Result<(), String> {
    let own = u64::from(std::process::id());
    rules.insert(
        libc::SYS_tgkill,
        vec![short_rule(0, SeccompCmpOp::Eq, own)?],
    );
    Ok(())
}

fn allow_names(rules: &mut Rules, also: &[libc::c_int]) -> Result<(), String> {
    // PR_SET_VMA: glibc names its mappings.
    let list = [libc::PR_SET_NAME, libc::PR_SET_VMA]
        .iter()
        .chain(also)
        .map(|option| short_rule(0, SeccompCmpOp::Eq, *option as u64))
        .collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_prctl, list);
    Ok(())
}

fn rules_of(kind: Thread) -> Result<Rules, String> {
    let mut rules = Rules::new();
    allow(&mut rules, EVERY);
    allow_own_signals(&mut rules)?;
    allow_names(&mut rules, &[])?;
    match kind {
        Thread::Cpu => {
            allow(&mut rules, CPU);
            allow_ioctls(&mut rules, true)?;
        }
        Thread::Io => {
            allow(&mut rules, IO);
            allow_plain_memory(&mut rules)?;
            // Interrupts are KVM's where that runs the guest.
            allow_ioctls(&mut rules, true)?;
        }
        Thread::Sockets => {
            allow(&mut rules, IO);
            allow(&mut rules, SOCKETS);
            allow_unix_sockets(&mut rules)?;
            allow_plain_memory(&mut rules)?;
            allow_ioctls(&mut rules, true)?;
        }
        Thread::Console => {
            allow(&mut rules, CONSOLE);
            allow_plain_memory(&mut rules)?;
            // That there is room for more output is an interrupt.
            allow_ioctls(&mut rules, true)?;
        }
        Thread::Control => {
            allow(&mut rules, CONTROL);
            allow_plain_memory(&mut rules)?;
            allow_threads(&mut rules)?;
            allow_ioctls(&mut rules, true)?;
        }
        Thread::Network => {
            allow(&mut rules, NETWORK);
            allow_plain_memory(&mut rules)?;
            allow_ioctls(&mut rules, false)?;
        }
    }
    Ok(rules)
}

/// The union of all threads', and what the main thread needs.
fn rules_of_process(network: bool) -> Result<Rules, String> {
    let mut rules = Rules::new();
    for list in [EVERY, CPU, IO, SOCKETS, CONSOLE, CONTROL, MAIN] {
        allow(&mut rules, list);
    }
    if network {
        allow(&mut rules, NETWORK);
    } else {
        allow_unix_sockets(&mut rules)?;
    }
    allow_own_signals(&mut rules)?;
    // The narrower filters are set by the threads themselves.
    allow_names(
        &mut rules,
        &[libc::PR_SET_NO_NEW_PRIVS, libc::PR_SET_SECCOMP],
    )?;
    allow_threads(&mut rules)?;
    allow_ioctls(&mut rules, true)?;
    Ok(rules)
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch: TargetArch = std::env::consts::ARCH
        .try_into()
        .map_err(|error| format!("{error:?}"))?;
    SeccompFilter::new(rules, otherwise, matching, arch)
        .map_err(|error| error.to_string())?
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())
}

const REFUSED: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);

static PROGRAMS: OnceLock<BTreeMap<Thread, BpfProgram>> = OnceLock::new();

/// Filters the calls of this process, which has one thread, and makes the filters of [`confine`].
pub(super) fn restrict(network: bool) -> Result<(), String> {
    let mut programs = BTreeMap::new();
    for kind in KINDS {
        programs.insert(
            kind,
            compile(rules_of(kind)?, REFUSED, SeccompAction::Allow)?,
        );
    }
    // clone3 hides its flags in memory: glibc falls back to clone, whose flags can be seen.
    let no_clone3 = compile(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let process = compile(rules_of_process(network)?, REFUSED, SeccompAction::Allow)?;
    for program in [no_clone3, process] {
        apply_filter(&program).map_err(|error| error.to_string())?;
    }
    let _ = PROGRAMS.set(programs);
    Ok(())
}

/// Narrows the calling thread to what its kind needs. Nothing outside of a jailed machine process.
pub fn confine(kind: Thread) {
    if let Some(program) = PROGRAMS.get().and_then(|programs| programs.get(&kind))
        && let Err(error) = apply_filter(program)
    {
        tracing::warn!("a thread ({kind:?}) keeps system calls it does not need: {error}");
    }
}
