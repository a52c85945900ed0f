//! Pid 1 of `--init` containers: it starts the program, passes signals on to it, reaps what others leave behind, and
//! ends as the program ended. Without a C library and without allocation, so that it runs in any image.
//!
//! Compiled by the engine's build script.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

#[cfg(target_arch = "x86_64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const CLONE: usize = 56;
    pub const EXECVE: usize = 59;
    pub const EXIT_GROUP: usize = 231;
    pub const WAIT4: usize = 61;
    pub const KILL: usize = 62;
    pub const SETPGID: usize = 109;
    pub const IOCTL: usize = 16;
    pub const WRITE: usize = 1;
}

#[cfg(target_arch = "aarch64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const CLONE: usize = 220;
    pub const EXECVE: usize = 221;
    pub const EXIT_GROUP: usize = 94;
    pub const WAIT4: usize = 260;
    pub const KILL: usize = 129;
    pub const SETPGID: usize = 154;
    pub const IOCTL: usize = 29;
    pub const WRITE: usize = 64;
}

const SIGCHLD: i32 = 17;
const SIGTTIN: i32 = 21;
const SIGTTOU: i32 = 22;
const TIOCSPGRP: usize = 0x5410;
const WNOHANG: usize = 1;

#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "mov rdi, rsp", "and rsp, -16", "call {begin}", "ud2", begin = sym begin);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x0, sp", "bl {begin}", "udf #0", begin = sym begin);

/// # Safety
/// The arguments are what the system call of this number wants.
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel keeps all registers but those named; the caller answers for the arguments.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
             in("r8") 0usize, lateout("rcx") _, lateout("r11") _);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the kernel keeps all registers but x0; the caller answers for the arguments.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d, in("x4") 0usize);
    }
    result
}

/// The length of a string that ends in a null byte. The compiler may call this by its C name; the volatile reads keep
/// it from seeing strlen in here.
///
/// # Safety
/// It does end.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut count = 0;
    // SAFETY: the caller's promise.
    while unsafe { text.add(count).read_volatile() } != 0 {
        count += 1;
    }
    count
}

/// As C has it; called by the compiler.
///
/// # Safety
/// `count` bytes from `to` on are ours to write.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    for at in 0..count {
        // SAFETY: the caller's promise.
        unsafe { to.add(at).write_volatile(value as u8) };
    }
    to
}

/// As C has it; called by the compiler.
///
/// # Safety
/// `count` bytes can be read and written, and do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    for at in 0..count {
        // SAFETY: the caller's promise.
        unsafe { to.add(at).write_volatile(from.add(at).read()) };
    }
    to
}

/// Executes the program, looked for in `PATH` where its name has no slash. Returns the last error.
///
/// # Safety
/// Both are arrays of strings that end in a null pointer.
unsafe fn execute(arguments: *const usize, environment: *const usize) -> isize {
    let run = |path: usize| -> isize {
        // SAFETY: the caller's promise; `path` is a string that ends in a null byte.
        unsafe { call(number::EXECVE, path, arguments as usize, environment as usize, 0) }
    };
    // SAFETY: the strings end in null bytes, the arrays in null pointers, and the buffer is not written past its end.
    unsafe {
        let name = *arguments as *const u8;
        let name_length = strlen(name);
        if (0..name_length).any(|at| *name.add(at) == b'/') {
            return run(name as usize);
        }
        let mut search: *const u8 = c"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".as_ptr().cast();
        let mut entry = environment;
        while *entry != 0 {
            let text = *entry as *const u8;
            if *text == b'P' && *text.add(1) == b'A' && *text.add(2) == b'T' && *text.add(3) == b'H' && *text.add(4) == b'=' {
                search = text.add(5);
            }
            entry = entry.add(1);
        }
        let mut last = -2;
        let mut path = [0u8; 4096];
        loop {
            let mut end = 0;
            while *search.add(end) != 0 && *search.add(end) != b':' {
                end += 1;
            }
            if end > 0 && end + 1 + name_length < path.len() {
                let buffer = path.as_mut_ptr();
                for at in 0..end {
                    *buffer.add(at) = *search.add(at);
                }
                *buffer.add(end) = b'/';
                for at in 0..=name_length {
                    *buffer.add(end + 1 + at) = *name.add(at);
                }
                let error = run(path.as_ptr() as usize);
                // One that is there but cannot be executed says more than those that are not.
                if last == -2 {
                    last = error;
                }
            }
            if *search.add(end) == 0 {
                return last;
            }
            search = search.add(end + 1);
        }
    }
}

fn exit(code: usize) -> ! {
    loop {
        // SAFETY: it does not return.
        unsafe { call(number::EXIT_GROUP, code, 0, 0, 0) };
    }
}

fn say(text: &[u8]) {
    // SAFETY: the text is readable for its length.
    unsafe { call(number::WRITE, 2, text.as_ptr() as usize, text.len(), 0) };
}

fn mask(how: usize, set: &u64) {
    // SAFETY: the set is one of eight bytes; the old one is not asked for.
    unsafe { call(number::RT_SIGPROCMASK, how, set as *const u64 as usize, 0, 8) };
}

/// Starts here with the kernel's own stack: the count of arguments, the arguments, a null, the environment.
extern "C" fn begin(stack: *const usize) -> ! {
    // SAFETY: the kernel has laid out the stack so (System V ABI, process initialization).
    let (arguments, environment) = unsafe {
        let count = *stack;
        // After `/sbin/docker-init` and `--`.
        if count < 3 {
            say(b"docker-init: no program is given\n");
            exit(1);
        }
        (stack.add(1 + 2), stack.add(1 + count + 1))
    };
    let all: u64 = !0;
    mask(2, &all);
    // SAFETY: a plain fork: no new stack, no shared memory.
    let child = unsafe { call(number::CLONE, SIGCHLD as usize, 0, 0, 0) };
    if child == 0 {
        mask(2, &0);
        // SAFETY: setpgid(0, 0), then the terminal's foreground if there is a terminal; SIGTTOU is not blocked but
        // ignored by the kernel for a process group that is orphaned. The arrays end in null.
        unsafe {
            call(number::SETPGID, 0, 0, 0, 0);
            let blocked: u64 = 1 << (SIGTTOU - 1) | 1 << (SIGTTIN - 1);
            mask(0, &blocked);
            let group = call(pid_number(), 0, 0, 0, 0) as i32;
            call(number::IOCTL, 0, TIOCSPGRP, &group as *const i32 as usize, 0);
            mask(2, &0);
            let error = execute(arguments, environment);
            say(b"docker-init: the program cannot be executed\n");
            exit(if error == -2 { 127 } else { 126 });
        }
    }
    if child < 0 {
        say(b"docker-init: fork failed\n");
        exit(1);
    }
    loop {
        // SAFETY: all signals are blocked and taken from here; no info and no limit of time is asked for.
        let signal = unsafe { call(number::RT_SIGTIMEDWAIT, &all as *const u64 as usize, 0, 0, 8) };
        if signal == SIGCHLD as isize {
            reap(child);
        } else if signal > 0 {
            // SAFETY: the program's own process; it is not reaped before this process ends.
            unsafe { call(number::KILL, child as usize, signal as usize, 0, 0) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn pid_number() -> usize {
    39
}
#[cfg(target_arch = "aarch64")]
fn pid_number() -> usize {
    172
}

fn reap(child: isize) {
    loop {
        let mut status = 0i32;
        // SAFETY: the status is written to an integer of ours.
        let ended = unsafe { call(number::WAIT4, usize::MAX, &mut status as *mut i32 as usize, WNOHANG, 0) };
        if ended <= 0 {
            return;
        }
        if ended == child {
            let signal = status & 0x7f;
            exit(if signal == 0 { (status >> 8 & 0xff) as usize } else { 128 + signal as usize });
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(1)
}
