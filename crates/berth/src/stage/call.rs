//! System calls as bare instructions: [`super::entry`] makes them before any library can be called.

use std::arch::asm;

use libc::{c_int, c_long};

/// One system call. What it does not take is 0.
///
/// # Safety
/// As the call itself demands.
#[inline(always)]
pub(super) unsafe fn call(number: c_long, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the registers are those of the kernel's convention (syscall(2)); the rest is the caller's to promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a as isize => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
            options(nostack),
        );
    }
    result
}

/// A descriptor that is closed when dropped.
pub(super) struct Fd(pub c_int);

impl Fd {
    #[inline(always)]
    pub fn new(result: isize) -> Option<Fd> {
        if result >= 0 {
            Some(Fd(result as c_int))
        } else {
            None
        }
    }

    #[inline(always)]
    pub fn number(&self) -> usize {
        self.0 as usize
    }
}

impl Drop for Fd {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the descriptor is this one's own.
        unsafe { call(libc::SYS_close, [self.number(), 0, 0, 0, 0, 0]) };
    }
}
