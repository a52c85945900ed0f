//! Where the kernel enters this binary, before the dynamic linker.
//!
//! Relocating a binary of this size and loading its libraries takes longer than making a container. Neither is needed
//! to execute another program, so release builds for x86-64 name no interpreter: the kernel jumps to `berth_entry`, which
//! executes the runtime's own program where that is what was asked for. Else it loads the dynamic linker as the kernel
//! does for other programs (elf(5), "PT_INTERP") and corrects what the auxiliary vector (getauxval(3)) says, and
//! everything goes on as usual.
//!
//! No address in this binary's data is right yet, and no library is there: what is here touches neither. Tables of
//! texts, panics, and loops that the compiler takes for `memcpy` or `strlen` are out of bounds.

use std::arch::{asm, global_asm};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut, read_volatile, write_volatile};

use libc::{Elf64_Ehdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_PHDR};

use super::call::{Fd, call};

/// The linker's place in the x86-64 ABI.
static LINKER: [u8; 28] = *b"/lib64/ld-linux-x86-64.so.2\0";

/// The program headers the dynamic linker is shown: this binary's, with the interpreter it looks for.
static mut HEADERS: MaybeUninit<[Elf64_Phdr; MOST_HEADERS]> = MaybeUninit::uninit();
const MOST_HEADERS: usize = 32;

/// An address in data, which is wrong until somebody has relocated this binary.
struct Address(*const [u8; 28]);
// SAFETY: it is compared and never followed.
unsafe impl Sync for Address {}
static RELOCATED: Address = Address(&raw const LINKER);

const PAGE: usize = 4096;

global_asm!(
    ".pushsection .text.berth_entry,\"ax\",@progbits",
    ".globl berth_entry",
    ".type berth_entry,@function",
    "berth_entry:",
    "xor ebp, ebp",
    "mov rbx, rsp",
    "mov r12, rdx",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {enter}",
    // As the kernel left it: the counts and vectors on the stack, and what to call at the end in rdx.
    "mov rsp, rbx",
    "mov rdx, r12",
    "jmp rax",
    ".size berth_entry, . - berth_entry",
    ".popsection",
    enter = sym enter,
);

/// `stack` is as the kernel has made it (x86-64 ABI, "Initial Stack and Register State"): the count of arguments, they,
/// the environment, and the auxiliary vector. Returns where to go on.
unsafe extern "C" fn enter(stack: *mut usize) -> usize {
    // SAFETY: the stack is as described, and each vector ends with a zero.
    unsafe {
        let start: usize;
        asm!("lea {}, [rip + _start]", out(reg) start, options(nomem, nostack, preserves_flags));
        let linker: usize;
        asm!("lea {}, [rip + {}]", out(reg) linker, sym LINKER, options(nomem, nostack, preserves_flags));
        if read_volatile(&raw const RELOCATED.0) as usize == linker {
            // `ld-linux-x86-64.so.2 berth …` has done all this.
            return start;
        }
        let count = *stack;
        let arguments = stack.add(1).cast::<*const u8>();
        let environment = arguments.add(count + 1).cast_const();
        super::execute_kept(count, arguments, environment);
        let mut vector = environment.cast::<usize>().cast_mut();
        while read_volatile(vector) != 0 {
            vector = vector.add(1);
        }
        load_linker(vector.add(1), start).unwrap_or_else(|| {
            const WORDS: &[u8] =
                b"berth: /lib64/ld-linux-x86-64.so.2 cannot be loaded: install glibc\n";
            call(
                libc::SYS_write,
                [2, WORDS.as_ptr() as usize, WORDS.len(), 0, 0, 0],
            );
            loop {
                call(libc::SYS_exit_group, [127, 0, 0, 0, 0, 0]);
            }
        })
    }
}

/// Maps the dynamic linker and tells it of this binary. Returns where it begins.
///
/// # Safety
/// `vector` is the auxiliary vector, which nobody else uses yet.
unsafe fn load_linker(vector: *mut usize, start: usize) -> Option<usize> {
    // SAFETY: the kernel has mapped this binary with its headers; the rest is as each block says.
    unsafe {
        let (mut headers, mut count) = (null_mut::<usize>(), null_mut::<usize>());
        let (mut base, mut entry) = (null_mut::<usize>(), null_mut::<usize>());
        let mut at = vector;
        while read_volatile(at) != 0 {
            let value = at.add(1);
            match *at as u64 {
                libc::AT_PHDR => headers = value,
                libc::AT_PHNUM => count = value,
                libc::AT_BASE => base = value,
                libc::AT_ENTRY => entry = value,
                _ => {}
            }
            at = at.add(2);
        }
        if headers.is_null() || count.is_null() || base.is_null() || entry.is_null() {
            return None;
        }
        let first: usize;
        asm!("lea {}, [rip + __ehdr_start]", out(reg) first, options(nomem, nostack, preserves_flags));
        let number = show_headers(*headers as *const Elf64_Phdr, *count, first)?;
        let linker = map_linker()?;
        *headers = (&raw const HEADERS) as usize;
        *count = number;
        *base = linker.0;
        *entry = start;
        Some(linker.1)
    }
}

/// Copies `count` headers to [`HEADERS`], with one for the interpreter and one for themselves. `first` is where this
/// binary's image begins. Returns how many there are now.
unsafe fn show_headers(from: *const Elf64_Phdr, count: usize, first: usize) -> Option<usize> {
    if count > MOST_HEADERS - 2 {
        return None;
    }
    let to = (&raw mut HEADERS).cast::<Elf64_Phdr>();
    let describe = |kind, address: usize, length: usize| Elf64_Phdr {
        p_type: kind,
        p_flags: libc::PF_R,
        p_offset: 0,
        p_vaddr: address.wrapping_sub(first) as u64,
        p_paddr: 0,
        p_filesz: length as u64,
        p_memsz: length as u64,
        p_align: 1,
    };
    let size = (count + 2) * size_of::<Elf64_Phdr>();
    // SAFETY: there is room for two more than `count`, and this process has one thread.
    unsafe {
        // Before those of segments (elf(5)). The linker learns from the first where the image is.
        write_volatile(to, describe(PT_PHDR, to as usize, size));
        write_volatile(
            to.add(1),
            describe(PT_INTERP, (&raw const LINKER) as usize, LINKER.len()),
        );
        let mut number = 2;
        let mut at = 0;
        while at < count {
            let header = read_volatile(from.add(at));
            if header.p_type != PT_PHDR && header.p_type != PT_INTERP {
                write_volatile(to.add(number), header);
                number += 1;
            }
            at += 1;
        }
        Some(number)
    }
}

/// Maps the segments of the dynamic linker, as the kernel's ELF loader does. Returns its base and its entry.
unsafe fn map_linker() -> Option<(usize, usize)> {
    const READ: usize = 1024;
    const ANONYMOUS: usize = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    const FIXED: usize = (libc::MAP_PRIVATE | libc::MAP_FIXED) as usize;
    const NO_FILE: usize = usize::MAX;
    // SAFETY: the path ends with NUL, the buffers are as long as is said, headers are used where they lie inside of what
    // was read, and each fixed mapping lies inside of the range the first one reserved.
    unsafe {
        let path = (&raw const LINKER) as usize;
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as usize;
        let file = call(
            libc::SYS_openat,
            [libc::AT_FDCWD as usize, path, flags, 0, 0, 0],
        );
        let file = Fd::new(file)?;
        let mut bytes = MaybeUninit::<[u64; READ / 8]>::uninit();
        let begin = bytes.as_mut_ptr().cast::<u8>();
        let length = call(
            libc::SYS_read,
            [file.number(), begin as usize, READ, 0, 0, 0],
        );
        if length < size_of::<Elf64_Ehdr>() as isize {
            return None;
        }
        let head = &*begin.cast::<Elf64_Ehdr>();
        let (offset, count) = (head.e_phoff as usize, usize::from(head.e_phnum));
        if offset > READ
            || count * size_of::<Elf64_Phdr>() > (length as usize).checked_sub(offset)?
        {
            return None;
        }
        let segment = |at: usize| -> *const Elf64_Phdr {
            let header = begin.add(offset).cast::<Elf64_Phdr>().add(at);
            if (*header).p_type == PT_LOAD {
                header
            } else {
                null()
            }
        };
        let up = |address: usize| address.wrapping_add(PAGE - 1) & !(PAGE - 1);
        let mut size = 0;
        let mut at = 0;
        while at < count {
            if let Some(segment) = segment(at).as_ref() {
                size = up((segment.p_vaddr as usize).checked_add(segment.p_memsz as usize)?);
            }
            at += 1;
        }
        let base = call(
            libc::SYS_mmap,
            [0, size, libc::PROT_NONE as usize, ANONYMOUS, NO_FILE, 0],
        );
        let base = (size > 0 && base > 0).then_some(base as usize)?;
        at = 0;
        while at < count {
            if let Some(segment) = segment(at).as_ref() {
                let readable = (segment.p_flags & libc::PF_R) >> 2;
                let writable = segment.p_flags & libc::PF_W;
                let executable = (segment.p_flags & libc::PF_X) << 2;
                let protection = (readable | writable | executable) as usize;
                let address = segment.p_vaddr as usize;
                let (file_end, end) = (
                    address + segment.p_filesz as usize,
                    address + segment.p_memsz as usize,
                );
                let skew = address % PAGE;
                let from = (segment.p_offset as usize).checked_sub(skew)?;
                let place = base + address - skew;
                if end > size
                    || call(
                        libc::SYS_mmap,
                        [
                            place,
                            file_end - (address - skew),
                            protection,
                            FIXED,
                            file.number(),
                            from,
                        ],
                    ) < 0
                {
                    return None;
                }
                let file_page = up(file_end);
                if end > file_end && writable != 0 {
                    // The rest of the file's last page is zeros, and so are further pages.
                    asm!("rep stosb", inout("rcx") file_page - file_end => _, inout("rdi") base + file_end => _, in("al") 0u8, options(nostack, preserves_flags));
                    if end > file_page
                        && call(
                            libc::SYS_mmap,
                            [
                                base + file_page,
                                end - file_page,
                                protection,
                                FIXED | ANONYMOUS,
                                NO_FILE,
                                0,
                            ],
                        ) < 0
                    {
                        return None;
                    }
                }
            }
            at += 1;
        }
        Some((base, base + head.e_entry as usize))
    }
}
