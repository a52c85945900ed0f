//! `berth oci run`, `create` and `exec` as a small program of their own.
//!
//! A container is set up by a process that goes on in a copy of the runtime's memory, and this binary is large for
//! that. So release builds carry the runtime once more, linked statically and small (build.rs). It is executed from
//! [`early`], which the dynamic linker calls before `main`: until then little of this binary has been touched.
//!
//! The program is kept in /run/berth-oci, where the first call copies it from the executable's own file, and executed
//! by way of a detached read-only mount of that file: what a container reaches through /proc/self/exe is that mount
//! and cannot be written (CVE-2019-5736). Who may not mount executes a sealed copy in memory. Where neither can be,
//! [`early`] returns, and this binary does the work itself.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::zeroed;

use libc::{AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_RDONLY, O_TMPFILE, O_WRONLY};

const LENGTH: usize = include_bytes!(env!("BERTH_STAGE")).len();
/// Never read through this mapping: its pages would count as this process's.
static STAGE: [u8; LENGTH] = *include_bytes!(env!("BERTH_STAGE"));

const DIRECTORY: &CStr = c"/run/berth-oci";
/// Named by its content, which is this build's.
const NAME: &str = concat!(".program-", env!("BERTH_STAGE_HASH"), "\0");

/// glibc calls what stands in this section with the arguments of `main`; the number puts it before all others.
#[used]
#[unsafe(link_section = ".init_array.00000")]
static EARLY: unsafe extern "C" fn(c_int, *mut *const c_char, *const *const c_char) = early;

/// Nothing of Rust's runtime stands yet: this makes system calls, and allocates nothing.
unsafe extern "C" fn early(
    count: c_int,
    arguments: *mut *const c_char,
    environment: *const *const c_char,
) {
    let word = |at: c_int| -> &CStr {
        // SAFETY: `arguments` has `count` pointers to texts that live as long as the process.
        (at < count)
            .then(|| unsafe { CStr::from_ptr(*arguments.offset(at as isize)) })
            .unwrap_or_default()
    };
    let name = word(0).to_bytes();
    let skip = match name.strip_suffix(b"berth-oci") {
        Some(b"") | Some([.., b'/']) => 0,
        _ if word(1) == c"oci" => 1,
        _ => return,
    };
    // Those that become part of a container. One of these words elsewhere does no harm: the program knows all.
    if !(skip + 1..count).any(|at| [c"run", c"create", c"exec"].contains(&word(at))) {
        return;
    }
    // SAFETY: the arguments are as above, `skip` is below their count, and the one replaced is put back.
    unsafe {
        let first = arguments.add(skip as usize);
        let before = *first;
        if skip == 1 {
            *first = c"berth oci".as_ptr();
        }
        for program in [kept, copied] {
            if let Some(program) = program() {
                libc::fexecve(program.0, first.cast_const(), environment);
            }
        }
        *first = before;
    }
}

/// A descriptor that is closed when dropped.
struct Fd(c_int);

impl Fd {
    fn new(number: c_int) -> Option<Fd> {
        (number >= 0).then_some(Fd(number))
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this one's own.
        unsafe { libc::close(self.0) };
    }
}

/// The program in /run, on a read-only mount of its own.
fn kept() -> Option<Fd> {
    const OPEN_TREE_CLONE: c_int = 1;
    // SAFETY: no pointer is passed.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let name = CStr::from_bytes_with_nul(NAME.as_bytes()).ok()?;
    let open = |directory: c_int, name: &CStr, flags: c_int| {
        // SAFETY: the name ends with a NUL byte; the mode is used where a file is made.
        Fd::new(unsafe { libc::openat(directory, name.as_ptr(), flags | O_CLOEXEC, 0o500) })
    };
    // SAFETY: the name ends with a NUL byte.
    unsafe { libc::mkdir(DIRECTORY.as_ptr(), 0o700) };
    let directory = open(AT_FDCWD, DIRECTORY, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)?;
    only_roots(&directory)?;
    let find = || {
        let program = open(directory.0, name, O_RDONLY | O_NOFOLLOW)?;
        (only_roots(&program)? == LENGTH as i64).then_some(program)
    };
    let program = match find() {
        Some(program) => program,
        None => {
            // Complete or not there: it gets its name when it is written.
            let new = open(directory.0, c".", O_TMPFILE | O_WRONLY)?;
            write(&new)?;
            // SAFETY: the names end with NUL bytes.
            unsafe {
                libc::unlinkat(directory.0, name.as_ptr(), 0);
                libc::linkat(
                    new.0,
                    c"".as_ptr(),
                    directory.0,
                    name.as_ptr(),
                    libc::AT_EMPTY_PATH,
                );
            }
            drop(new);
            sweep(&directory);
            find()?
        }
    };
    let flags = OPEN_TREE_CLONE | O_CLOEXEC | libc::AT_EMPTY_PATH;
    // SAFETY: the path is an empty text.
    let mount = unsafe { libc::syscall(libc::SYS_open_tree, program.0, c"".as_ptr(), flags) };
    let mount = Fd::new(mount as c_int)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        // As Debian mounts /run; this mount is for executing one file.
        attr_clr: libc::MOUNT_ATTR_NOEXEC,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty text, and the attributes are whole.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.0,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    (set == 0).then_some(mount)
}

/// Removes programs of other builds, where nobody runs them and they are older than an hour: builds that are in use side
/// by side do not chase each other's away.
fn sweep(directory: &Fd) {
    const HOUR: i64 = 3600;
    let own = &NAME.as_bytes()[..NAME.len() - 1];
    // A page for the entries of the directory (getdents64(2)): this must not allocate.
    let mut page = [0u64; 512];
    loop {
        // SAFETY: the buffer is as long as is said.
        let filled = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.0,
                page.as_mut_ptr(),
                size_of_val(&page),
            )
        };
        if filled <= 0 {
            return;
        }
        let mut at = 0;
        while at < filled as usize {
            // SAFETY: the kernel has written whole records up to `filled`, each with its length at 16 and a name that
            // ends with NUL at 19.
            let (length, name) = unsafe {
                let entry = page.as_ptr().cast::<u8>().add(at);
                let length = entry.add(16).cast::<u16>().read_unaligned();
                (length, CStr::from_ptr(entry.add(19).cast()))
            };
            at += usize::from(length).max(1);
            if !name.to_bytes().starts_with(b".program-") || name.to_bytes() == own {
                continue;
            }
            // SAFETY: the name ends with NUL, all bytes zero is a `stat`, and the kernel fills it.
            unsafe {
                let mut stat: libc::stat = zeroed();
                let flags = libc::AT_SYMLINK_NOFOLLOW;
                let looked = libc::fstatat(directory.0, name.as_ptr(), &raw mut stat, flags);
                if looked != 0 || stat.st_mtime + HOUR > libc::time(std::ptr::null_mut()) {
                    continue;
                }
                // What is being executed cannot be opened for writing (ETXTBSY).
                let flags = O_WRONLY | O_NOFOLLOW | O_CLOEXEC;
                if Fd::new(libc::openat(directory.0, name.as_ptr(), flags)).is_some() {
                    libc::unlinkat(directory.0, name.as_ptr(), 0);
                }
            }
        }
    }
}

/// The size of what root owns and nobody else may write.
fn only_roots(fd: &Fd) -> Option<i64> {
    // SAFETY: all bytes zero is a `stat`, and the kernel fills it.
    let (stat, done) = unsafe {
        let mut stat: libc::stat = zeroed();
        let done = libc::fstat(fd.0, &raw mut stat);
        (stat, done)
    };
    (done == 0 && stat.st_uid == 0 && stat.st_mode & 0o022 == 0).then_some(stat.st_size)
}

/// The program in memory, sealed.
fn copied() -> Option<Fd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name ends with a NUL byte. Older kernels do not know that a file can be said to be executable.
    let copy = unsafe {
        Fd::new(libc::memfd_create(
            c"berth-oci".as_ptr(),
            flags | libc::MFD_EXEC,
        ))
        .or_else(|| Fd::new(libc::memfd_create(c"berth-oci".as_ptr(), flags)))
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
    let own = Fd::new(unsafe { libc::open(path.as_ptr(), O_RDONLY | O_CLOEXEC) })?;
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
