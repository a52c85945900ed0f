//! `berth oci run`, `create` and `exec` as a small program of their own.
//!
//! A container is set up by a process that goes on in a copy of the runtime's memory, and this binary is large for
//! that. So release builds carry the runtime once more, linked statically and small (build.rs). It is executed
//! before anything of this binary is touched: where the kernel enters it ([`entry`], x86-64), else from [`early`], which
//! the dynamic linker calls before `main`.
//!
//! The program is kept in /run/berth-oci, where the first call copies it from the executable's own file, and executed
//! by way of a detached read-only mount of that file: what a container reaches through /proc/self/exe is that mount
//! and cannot be written (CVE-2019-5736). Who may not mount executes a sealed copy in memory. Where neither can be,
//! [`early`] returns, and this binary does the work itself.

mod call;
#[cfg(target_arch = "x86_64")]
mod entry;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null_mut, read_volatile};

use libc::{AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_RDONLY, O_RDWR, O_TMPFILE};

use call::{Fd, call};

const LENGTH: usize = include_bytes!(env!("BERTH_STAGE")).len();
/// Never read through this mapping: its pages would count as this process's.
static STAGE: [u8; LENGTH] = *include_bytes!(env!("BERTH_STAGE"));

const DIRECTORY: &CStr = c"/run/berth-oci";
/// Named by its content, which is this build's.
const NAME: &str = concat!(".program-", env!("BERTH_STAGE_HASH"), "\0");

/// glibc calls what stands in this section with the arguments of `main`; the number puts it before all others.
#[used]
#[unsafe(link_section = ".init_array.00000")]
static EARLY: unsafe extern "C" fn(c_int, *mut *const u8, *const *const u8) = early;

/// Nothing of Rust's runtime stands yet: this makes system calls, and allocates nothing.
unsafe extern "C" fn early(count: c_int, arguments: *mut *const u8, environment: *const *const u8) {
    let count = count as usize;
    // SAFETY: `arguments` has `count` pointers to texts, and both vectors end with a null pointer.
    unsafe {
        let Some(skip) = for_the_program(count, arguments) else {
            return;
        };
        // Where the kernel enters here (entry.rs), this has been tried.
        execute_kept(count, arguments, environment);
        if keep().is_some() {
            execute_kept(count, arguments, environment);
        }
        if let Some(program) = copied() {
            execute(&program, skip, arguments, environment);
        }
    }
}

/// Whether the small program is to do what the arguments say: how many words of them are not its own, then.
///
/// # Safety
/// `arguments` has `count` pointers to texts that end with NUL. Neither library nor relocated data is needed.
unsafe fn for_the_program(count: usize, arguments: *const *const u8) -> Option<usize> {
    // SAFETY: as promised.
    unsafe {
        if count < 2 {
            return None;
        }
        let skip = if is(name_in(*arguments), b"berth-oci\0") {
            0
        } else if is(*arguments.add(1), b"oci\0") {
            1
        } else {
            return None;
        };
        // Those that become part of a container. One of these words elsewhere does no harm: the program knows all.
        let mut at = skip + 1;
        while at < count {
            let word = *arguments.add(at);
            if is(word, b"run\0") || is(word, b"create\0") || is(word, b"exec\0") {
                return Some(skip);
            }
            at += 1;
        }
        None
    }
}

/// Whether a text is `word`, which ends with NUL as it does.
#[inline(always)]
unsafe fn is<const N: usize>(text: *const u8, word: &[u8; N]) -> bool {
    let mut at = 0;
    while at < N {
        // SAFETY: it ends with NUL, where the comparison ends too. Volatile: no library is called for this.
        if unsafe { read_volatile(text.add(at)) } != word[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// What stands behind the last slash of a path.
#[inline(always)]
unsafe fn name_in(path: *const u8) -> *const u8 {
    let (mut name, mut at) = (path, path);
    loop {
        // SAFETY: it ends with NUL.
        unsafe {
            let letter = read_volatile(at);
            at = at.add(1);
            match letter {
                0 => return name,
                b'/' => name = at,
                _ => {}
            }
        }
    }
}

/// Executes the program in /run by way of a read-only mount of that file, if it is to do this and is there. Returns
/// where not.
///
/// # Safety
/// As [`for_the_program`]; both vectors end with a null pointer.
unsafe fn execute_kept(count: usize, arguments: *mut *const u8, environment: *const *const u8) {
    // SAFETY: as promised.
    unsafe {
        if let Some(skip) = for_the_program(count, arguments)
            && let Some(program) = kept()
        {
            execute(&program, skip, arguments, environment);
        }
    }
}

/// # Safety
/// As [`execute_kept`]. Returns where the kernel refuses.
#[inline(always)]
unsafe fn execute(
    program: &Fd,
    skip: usize,
    arguments: *mut *const u8,
    environment: *const *const u8,
) {
    // SAFETY: `skip` is below the count of the arguments, and the one replaced is put back.
    unsafe {
        let first = arguments.add(skip);
        let before = *first;
        if skip == 1 {
            *first = c"berth oci".as_ptr().cast();
        }
        let empty = c"".as_ptr() as usize;
        let (words, variables) = (first as usize, environment as usize);
        let flags = libc::AT_EMPTY_PATH as usize;
        call(
            libc::SYS_execveat,
            [program.number(), empty, words, variables, flags, 0],
        );
        *first = before;
    }
}

/// Opens `name`, which ends with NUL, in a directory.
#[inline(always)]
unsafe fn open(directory: usize, name: *const c_char, flags: c_int) -> Option<Fd> {
    let flags = (flags | O_CLOEXEC) as usize;
    // SAFETY: the mode is used where a file is made.
    Fd::new(unsafe {
        call(
            libc::SYS_openat,
            [directory, name as usize, flags, 0o500, 0, 0],
        )
    })
}

/// The directory in /run, if it is root's alone.
#[inline(always)]
unsafe fn directory() -> Option<Fd> {
    let flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW;
    // SAFETY: the name ends with NUL.
    let directory = unsafe { open(AT_FDCWD as usize, DIRECTORY.as_ptr(), flags)? };
    only_roots(&directory)?;
    Some(directory)
}

/// The program in /run, on a read-only mount of its own. Needs neither library nor relocated data.
#[inline(always)]
unsafe fn kept() -> Option<Fd> {
    const OPEN_TREE_CLONE: c_int = 1;
    // SAFETY: names end with NUL, and the attributes are whole.
    unsafe {
        if call(libc::SYS_geteuid, [0; 6]) != 0 {
            return None;
        }
        let directory = directory()?;
        let flags = O_RDONLY | O_NOFOLLOW;
        let program = open(directory.number(), NAME.as_ptr().cast(), flags)?;
        if only_roots(&program)? != LENGTH as i64 {
            return None;
        }
        let empty = c"".as_ptr() as usize;
        let flags = (OPEN_TREE_CLONE | O_CLOEXEC | libc::AT_EMPTY_PATH) as usize;
        let mount = Fd::new(call(
            libc::SYS_open_tree,
            [program.number(), empty, flags, 0, 0, 0],
        ))?;
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
            // As Debian mounts /run; this mount is for executing one file.
            attr_clr: libc::MOUNT_ATTR_NOEXEC,
            propagation: 0,
            userns_fd: 0,
        };
        let (address, size) = (
            (&raw const attributes) as usize,
            size_of::<libc::mount_attr>(),
        );
        let flags = libc::AT_EMPTY_PATH as usize;
        let set = call(
            libc::SYS_mount_setattr,
            [mount.number(), empty, flags, address, size, 0],
        );
        (set == 0).then_some(mount)
    }
}

/// Puts the program into /run, where it is not there as it should be.
fn keep() -> Option<()> {
    // SAFETY: names end with NUL bytes.
    unsafe {
        if libc::geteuid() != 0 {
            return None;
        }
        libc::mkdir(DIRECTORY.as_ptr(), 0o700);
        let directory = directory()?;
        // Complete or not there: it gets its name when it is written.
        let new = open(directory.number(), c".".as_ptr(), O_TMPFILE | O_RDWR)?;
        write(&new)?;
        #[cfg(target_arch = "x86_64")]
        lay(&new);
        let name = NAME.as_ptr().cast();
        libc::unlinkat(directory.0, name, 0);
        libc::linkat(new.0, c"".as_ptr(), directory.0, name, libc::AT_EMPTY_PATH);
        crate::sweep::sweep(directory.0, NAME.trim_end_matches('\0').as_bytes());
    }
    Some(())
}

/// Lays the program in the file at addresses of its own (see `place`); where that cannot be, it stays one that finds its
/// place at each start.
#[cfg(target_arch = "x86_64")]
fn lay(file: &Fd) {
    // SAFETY: the file is as long as the mapping, and this process alone knows it.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED;
        let image = libc::mmap(null_mut(), LENGTH, protection, shared, file.0, 0);
        if image == libc::MAP_FAILED {
            return;
        }
        if let Some(base) = crate::place::random_base() {
            let bytes = std::slice::from_raw_parts_mut(image.cast::<u8>(), LENGTH);
            let _ = crate::place::fix(bytes, base);
        }
        libc::munmap(image, LENGTH);
    }
}

/// The size of what root owns and nobody else may write.
#[inline(always)]
fn only_roots(fd: &Fd) -> Option<i64> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    let place = stat.as_mut_ptr();
    // SAFETY: the kernel fills the record, whose fields are read where it has.
    unsafe {
        if call(libc::SYS_fstat, [fd.number(), place as usize, 0, 0, 0, 0]) != 0 {
            return None;
        }
        let own = (*place).st_uid == 0 && (*place).st_mode & 0o022 == 0;
        own.then_some((*place).st_size)
    }
}

/// The program in memory, sealed.
fn copied() -> Option<Fd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name ends with a NUL byte. Older kernels do not know that a file can be said to be executable.
    let copy = unsafe {
        let make = |flags| Fd::new(libc::memfd_create(c"berth-oci".as_ptr(), flags) as isize);
        make(flags | libc::MFD_EXEC).or_else(|| make(flags))
    }?;
    write(&copy)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointer is passed.
    (unsafe { libc::fcntl(copy.0, libc::F_ADD_SEALS, seals) } == 0).then_some(copy)
}

/// Writes the program to `to`, from the executable's file and not from its mapping.
fn write(to: &Fd) -> Option<()> {
    let path = c"/proc/self/exe";
    // SAFETY: the path ends with a NUL byte.
    let own = unsafe { open(AT_FDCWD as usize, path.as_ptr(), O_RDONLY) }?;
    let mut offset = file_offset(STAGE.as_ptr() as u64)? as i64;
    let end = offset + LENGTH as i64;
    while offset < end {
        // SAFETY: the offset is a valid place for the call to count up.
        let sent = unsafe { libc::sendfile(to.0, own.0, &raw mut offset, (end - offset) as usize) };
        if sent <= 0 {
            return None;
        }
    }
    Some(())
}

/// Where in the executable's file the byte at `address` of its image is.
fn file_offset(address: u64) -> Option<u64> {
    struct Search {
        address: u64,
        found: Option<u64>,
    }
    unsafe extern "C" fn look(
        object: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        search: *mut c_void,
    ) -> c_int {
        // SAFETY: the linker passes a whole record whose headers live as long as the object, and `search` is the one
        // that went into dl_iterate_phdr below.
        unsafe {
            let (object, search) = (&*object, &mut *search.cast::<Search>());
            for at in 0..object.dlpi_phnum {
                let header = &*object.dlpi_phdr.add(at.into());
                let into = search
                    .address
                    .wrapping_sub(object.dlpi_addr + header.p_vaddr);
                if header.p_type == libc::PT_LOAD && into < header.p_filesz {
                    search.found = Some(header.p_offset + into);
                }
            }
        }
        // The first object is the executable itself.
        1
    }
    let mut search = Search {
        address,
        found: None,
    };
    // SAFETY: `look` has the type wanted, and `search` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}
