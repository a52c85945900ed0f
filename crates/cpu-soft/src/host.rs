//! The host thread of a guest CPU: GS, signals. Guest RSP is in host RSP, so no signal handler may run on it: all
//! asynchronous signals are blocked while guest code runs, and the synchronous ones have their own stack.

use std::cell::Cell;
use std::io;
use std::sync::Once;

/// What a trap handler must know of the thread's translated code.
#[derive(Clone, Copy)]
struct Current {
    start: u64,
    end: u64,
    host_fault: u64,
}

thread_local! {
    static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
}

/// Makes this thread ready for translated code until dropped.
pub(crate) struct Guard {
    old_mask: libc::sigset_t,
    old_gs: u64,
}

const ARCH_SET_GS: libc::c_int = 0x1001;
const ARCH_GET_GS: libc::c_int = 0x1004;

/// Signals that are raised by instructions.
const TRAPS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGBUS, libc::SIGILL];

impl Guard {
    pub(crate) fn new(frame: u64, range: (u64, u64), host_fault: u64) -> io::Result<Guard> {
        install_handlers();
        ensure_stack()?;
        let mut old_gs = 0u64;
        // SAFETY: plain system calls with valid pointers; nothing in this process uses GS.
        let old_mask = unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut old_gs);
            if libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, frame) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            for s in TRAPS {
                libc::sigdelset(&raw mut all, s);
            }
            libc::sigdelset(&raw mut all, libc::SIGTRAP);
            libc::sigdelset(&raw mut all, libc::SIGABRT);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            old
        };
        CURRENT.set(Some(Current {
            start: range.0,
            end: range.1,
            host_fault,
        }));
        Ok(Guard { old_mask, old_gs })
    }
}

/// Makes `range` the translated code of this thread, which holds a guard.
#[cfg(test)]
pub(crate) fn set_code(range: (u64, u64), host_fault: u64) {
    CURRENT.set(Some(Current {
        start: range.0,
        end: range.1,
        host_fault,
    }));
}

impl Drop for Guard {
    fn drop(&mut self) {
        CURRENT.set(None);
        // SAFETY: puts back what `new` found.
        unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, self.old_gs);
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.old_mask,
                std::ptr::null_mut(),
            );
        }
    }
}

/// Rust's threads have an alternate signal stack; others get one, once, for good.
fn ensure_stack() -> io::Result<()> {
    const SIZE: usize = 64 << 10;
    // SAFETY: queries, then installs memory that is never freed.
    unsafe {
        let mut now: libc::stack_t = std::mem::zeroed();
        if libc::sigaltstack(std::ptr::null(), &raw mut now) != 0 {
            return Err(io::Error::last_os_error());
        }
        if now.ss_flags & libc::SS_DISABLE == 0 {
            return Ok(());
        }
        let memory = Box::leak(vec![0u8; SIZE].into_boxed_slice());
        let stack = libc::stack_t {
            ss_sp: memory.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: SIZE,
        };
        if libc::sigaltstack(&raw const stack, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

struct Old([libc::sigaction; 4]);

static OLD: std::sync::OnceLock<Old> = std::sync::OnceLock::new();

fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only touches its thread's Cell, the context, and GS memory; old actions are kept and chained to.
        unsafe {
            let mut old: [libc::sigaction; 4] = std::mem::zeroed();
            for (n, s) in TRAPS.iter().enumerate() {
                libc::sigaction(*s, std::ptr::null(), &raw mut old[n]);
            }
            let _ = OLD.set(Old(old));
            for s in TRAPS {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(s, &raw const action, std::ptr::null_mut());
            }
        }
    });
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's context of this signal.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    if let Some(current) = CURRENT.get()
        && (current.start..current.end).contains(&rip)
    {
        // SAFETY: translated code runs, so GS is its frame; TRAP is in it. The signal number goes to the top byte.
        unsafe {
            let value = rip | (signal as u64) << 56;
            std::arch::asm!("mov gs:[{}], {}", in(reg) crate::stubs::TRAP, in(reg) value, options(nostack));
        }
        registers[libc::REG_RIP as usize] = current.host_fault as i64;
        return;
    }
    let old = OLD
        .get()
        .and_then(|o| TRAPS.iter().position(|s| *s == signal).map(|n| o.0[n]));
    // SAFETY: hands on to whom the signal belonged before; by default puts the default action back and returns to trap again.
    unsafe {
        match old {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                if old.sa_flags & libc::SA_SIGINFO != 0 {
                    let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    f(signal, info, context);
                } else {
                    let f: extern "C" fn(libc::c_int) = std::mem::transmute(old.sa_sigaction);
                    f(signal);
                }
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
