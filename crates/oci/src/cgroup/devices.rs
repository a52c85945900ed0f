//! Which devices a container may use: v1 `devices.allow` and `devices.deny`, on v2 a program of the kernel's BPF
//! machine attached to the cgroup (BPF_PROG_TYPE_CGROUP_DEVICE).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{Mode, OFlags};

use super::Cgroup;
use crate::error::{Context, Error, Result};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// One rule. `None` numbers are wildcards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `a`, `b` or `c`.
    kind: char,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// What every container may do: make any node, and use the harmless devices it is given.
const DEFAULTS: [(char, Option<u32>, Option<u32>, u32); 10] = [
    ('c', None, None, MKNOD),
    ('b', None, None, MKNOD),
    ('c', Some(1), Some(3), ALL),
    ('c', Some(1), Some(5), ALL),
    ('c', Some(1), Some(7), ALL),
    ('c', Some(1), Some(8), ALL),
    ('c', Some(1), Some(9), ALL),
    ('c', Some(5), Some(0), ALL),
    ('c', Some(5), Some(2), ALL),
    ('c', Some(136), None, ALL),
];

/// The whole list: all is denied, then what the specification says in its order, then the defaults.
fn rules(given: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut rules = vec![Rule {
        allow: false,
        kind: 'a',
        major: None,
        minor: None,
        access: ALL,
    }];
    for entry in given {
        let number = |value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value).map(Some).map_err(|_| {
                Error::invalid(format!(
                    "linux.resources.devices: {value} is no device number"
                ))
            }),
        };
        let mut access = 0;
        for letter in entry
            .access()
            .as_deref()
            .filter(|text| !text.is_empty())
            .unwrap_or("rwm")
            .chars()
        {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                other => {
                    return Err(Error::invalid(format!(
                        "linux.resources.devices: access {other:?} is not r, w or m"
                    )));
                }
            };
        }
        let kind = match entry.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => 'a',
            LinuxDeviceType::B => 'b',
            LinuxDeviceType::C | LinuxDeviceType::U => 'c',
            LinuxDeviceType::P => {
                return Err(Error::invalid(
                    "linux.resources.devices: a pipe is no device",
                ));
            }
        };
        let rule = Rule {
            allow: entry.allow(),
            kind,
            major: number(entry.major())?,
            minor: number(entry.minor())?,
            access,
        };
        if kind == 'a' && rule.major.is_none() && rule.minor.is_none() && access == ALL {
            rules.clear();
        }
        rules.push(rule);
    }
    if !matches!(
        rules[..],
        [Rule {
            allow: true,
            kind: 'a',
            ..
        }]
    ) {
        rules.extend(DEFAULTS.map(|(kind, major, minor, access)| Rule {
            allow: true,
            kind,
            major,
            minor,
            access,
        }));
    }
    Ok(rules)
}

pub(super) fn apply(cgroup: &Cgroup, given: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = rules(given)?;
    if let Some(directory) = cgroup.v1.get("devices") {
        return apply_v1(directory, &rules);
    }
    match &cgroup.unified {
        Some(directory) if cgroup.v1.is_empty() => apply_v2(directory, &rules),
        _ => Ok(()),
    }
}

fn apply_v1(directory: &Path, rules: &[Rule]) -> Result<()> {
    use std::io::Write;
    let open = |name: &str| {
        let path = directory.join(name);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .during(|| format!("open {}", path.display()))
    };
    let (mut allow, mut deny) = (open("devices.allow")?, open("devices.deny")?);
    for rule in rules {
        let line = line_v1(rule);
        let file = if rule.allow { &mut allow } else { &mut deny };
        file.write_all(line.as_bytes()).during(|| {
            format!(
                "write {line:?} to {}/devices.{}",
                directory.display(),
                if rule.allow { "allow" } else { "deny" }
            )
        })?;
    }
    Ok(())
}

fn line_v1(rule: &Rule) -> String {
    if rule.kind == 'a' && rule.major.is_none() && rule.minor.is_none() {
        return "a".to_owned();
    }
    let number =
        |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let mut access = String::with_capacity(3);
    for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
        if rule.access & bit != 0 {
            access.push(letter);
        }
    }
    format!(
        "{} {}:{} {access}",
        rule.kind,
        number(rule.major),
        number(rule.minor)
    )
}

/// One instruction of the BPF machine (`struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    opcode: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(
    opcode: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
) -> Instruction {
    Instruction {
        opcode,
        registers: source << 4 | destination,
        offset,
        immediate,
    }
}

/// Where a jump leads, until the program is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    NextRule,
    NextGroup,
    Answer(bool),
}

/// A program under way: its instructions, and the jumps that still lack their offset.
#[derive(Default)]
struct Assembly {
    code: Vec<Instruction>,
    open: Vec<(usize, Target)>,
}

impl Assembly {
    fn add(&mut self, opcode: u8, destination: u8, source: u8, offset: i16, immediate: u32) {
        self.code.push(instruction(
            opcode,
            destination,
            source,
            offset,
            immediate as i32,
        ));
    }

    /// A jump if register `register` and the number compare as `opcode` says.
    fn jump(&mut self, opcode: u8, register: u8, number: u32, target: Target) {
        self.open.push((self.code.len(), target));
        self.add(opcode, register, 0, 0, number);
    }

    /// Jumps to `target` lead to what comes next. Returns whether there was one.
    fn here(&mut self, target: Target) -> bool {
        let next = self.code.len();
        let before = self.open.len();
        let code = &mut self.code;
        self.open.retain(|(at, wanted)| {
            if *wanted == target {
                code[*at].offset = (next - at - 1) as i16;
            }
            *wanted != target
        });
        self.open.len() < before
    }
}

/// The program: the last rule that matches decides, and where none does, no.
///
/// The context (`struct bpf_cgroup_dev_ctx`) holds `access << 16 | type`, major, minor; type is 1 for a block device
/// and 2 for a character device. A device's two numbers are compared as one (12 and 20 bits, as the kernel keeps them),
/// and neighbours of one type share its test: the kernel goes through every way a program can take before it has it.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const AND: u8 = 0x54;
    const OR: u8 = 0x4c;
    const SHIFT_LEFT: u8 = 0x64;
    const SHIFT_RIGHT: u8 = 0x74;
    const MOVE: u8 = 0xbf;
    const MOVE_NUMBER: u8 = 0xb7;
    const JUMP: u8 = 0x05;
    const JUMP_IF_EQUAL: u8 = 0x16;
    const JUMP_UNLESS_EQUAL: u8 = 0x56;
    const JUMP_IF_ANY_BIT: u8 = 0x46;
    const EXIT: u8 = 0x95;
    const TYPE: u8 = 2;
    const ACCESS: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    const BOTH: u8 = 6;
    const MAJORS: u32 = 1 << 12;
    const MINORS: u32 = 1 << 20;
    let mut program = Assembly::default();
    program.add(LOAD_WORD, TYPE, 1, 0, 0);
    program.add(MOVE, ACCESS, TYPE, 0, 0);
    program.add(AND, TYPE, 0, 0, 0xffff);
    program.add(SHIFT_RIGHT, ACCESS, 0, 0, 16);
    program.add(LOAD_WORD, MAJOR, 1, 4, 0);
    program.add(LOAD_WORD, MINOR, 1, 8, 0);
    program.add(MOVE, BOTH, MAJOR, 0, 0);
    program.add(SHIFT_LEFT, BOTH, 0, 0, 20);
    program.add(OR, BOTH, MINOR, 0, 0);
    let possible: Vec<&Rule> = rules
        .iter()
        .rev()
        .filter(|rule| {
            rule.major.is_none_or(|major| major < MAJORS)
                && rule.minor.is_none_or(|minor| minor < MINORS)
        })
        .collect();
    let mut otherwise = false;
    'all: for group in possible.chunk_by(|one, next| one.kind == next.kind) {
        match group[0].kind {
            'b' => program.jump(JUMP_UNLESS_EQUAL, TYPE, 1, Target::NextGroup),
            'c' => program.jump(JUMP_UNLESS_EQUAL, TYPE, 2, Target::NextGroup),
            _ => {}
        }
        for rule in group {
            let answer = Target::Answer(rule.allow);
            if rule.access != ALL {
                // An allowance must cover all that is asked; a denial holds as soon as it touches any of it.
                if rule.allow {
                    let beyond = !rule.access & 0xffff;
                    program.jump(JUMP_IF_ANY_BIT, ACCESS, beyond, Target::NextRule);
                } else {
                    program.add(MOVE, 1, ACCESS, 0, 0);
                    program.add(AND, 1, 0, 0, rule.access);
                    program.jump(JUMP_IF_EQUAL, 1, 0, Target::NextRule);
                }
            }
            let always = match (rule.major, rule.minor) {
                (Some(major), Some(minor)) => {
                    program.jump(JUMP_IF_EQUAL, BOTH, major << 20 | minor, answer);
                    false
                }
                (Some(major), None) => {
                    program.jump(JUMP_IF_EQUAL, MAJOR, major, answer);
                    false
                }
                (None, Some(minor)) => {
                    program.jump(JUMP_IF_EQUAL, MINOR, minor, answer);
                    false
                }
                (None, None) if rule.kind == 'a' && rule.access == ALL => {
                    otherwise = rule.allow;
                    break 'all;
                }
                (None, None) => {
                    program.jump(JUMP, 0, 0, answer);
                    true
                }
            };
            // The verifier refuses what can never be reached.
            if !program.here(Target::NextRule) && always {
                break;
            }
        }
        program.here(Target::NextGroup);
    }
    program.here(Target::NextGroup);
    program.here(Target::Answer(otherwise));
    program.add(MOVE_NUMBER, 0, 0, 0, otherwise.into());
    program.add(EXIT, 0, 0, 0, 0);
    if program.here(Target::Answer(!otherwise)) {
        program.add(MOVE_NUMBER, 0, 0, 0, (!otherwise).into());
        program.add(EXIT, 0, 0, 0, 0);
    }
    program.code
}

fn bpf(command: libc::c_int, attributes: &[u64; 16]) -> io::Result<i32> {
    // SAFETY: the attributes are 128 bytes of union bpf_attr, and the pointers in them outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), 128usize) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

fn load(code: &[Instruction]) -> io::Result<OwnedFd> {
    const PROG_LOAD: i32 = 5;
    const CGROUP_DEVICE: u64 = 15;
    let license = c"Apache-2.0";
    let mut attributes = [0u64; 16];
    attributes[0] = CGROUP_DEVICE | (code.len() as u64) << 32;
    attributes[1] = code.as_ptr() as u64;
    attributes[2] = license.as_ptr() as u64;
    let fd = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

const ATTACH_TYPE_DEVICE: u64 = 6;

/// Loads the program and attaches it; what was attached before is taken off after, so that there is no moment
/// without one.
fn apply_v2(directory: &Path, rules: &[Rule]) -> Result<()> {
    const PROG_ATTACH: i32 = 8;
    const PROG_DETACH: i32 = 9;
    const ALLOW_MULTI: u64 = 2;
    let what = || format!("limit the devices of the cgroup {}", directory.display());
    let cgroup = rustix::fs::open(
        directory,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during(what)?;
    let before = attached(&cgroup).unwrap_or_default();
    let code = program(rules);
    let program = load(&code).during(what)?;
    let pair = |fd: RawFd| cgroup.as_raw_fd() as u64 | (fd as u64) << 32;
    let mut attributes = [0u64; 16];
    attributes[0] = pair(program.as_raw_fd());
    attributes[1] = ATTACH_TYPE_DEVICE | ALLOW_MULTI << 32;
    bpf(PROG_ATTACH, &attributes).during(what)?;
    for old in before {
        attributes[0] = pair(old.as_raw_fd());
        attributes[1] = ATTACH_TYPE_DEVICE;
        bpf(PROG_DETACH, &attributes).during(what)?;
    }
    Ok(())
}

/// The device programs attached to a cgroup itself.
fn attached(cgroup: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    const PROG_QUERY: i32 = 16;
    const PROG_GET_FD_BY_ID: i32 = 13;
    let mut ids = [0u32; 64];
    let mut attributes = [0u64; 16];
    attributes[0] = cgroup.as_raw_fd() as u64 | ATTACH_TYPE_DEVICE << 32;
    attributes[2] = ids.as_mut_ptr() as u64;
    attributes[3] = ids.len() as u64;
    // The kernel answers into the attributes: they must be written to, not only read.
    let attributes = std::cell::UnsafeCell::new(attributes);
    // SAFETY: 128 bytes of union bpf_attr that the kernel may write, and room for 64 ids as announced.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, attributes.get(), 128usize) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = (attributes.into_inner()[3] as u32 as usize).min(ids.len());
    ids[..count]
        .iter()
        .map(|id| {
            let mut attributes = [0u64; 16];
            attributes[0] = u64::from(*id);
            let fd = bpf(PROG_GET_FD_BY_ID, &attributes)?;
            // SAFETY: the kernel has just made this descriptor and nobody else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs a program as the kernel would.
    fn run(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0u64; 7];
        let mut at = 0usize;
        for _ in 0..10_000 {
            let i = code[at];
            let (d, s) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            let jump = |taken: bool, at: usize| if taken { at + i.offset as usize } else { at };
            match i.opcode {
                0x61 => r[d] = u64::from(context[i.offset as usize / 4]),
                0xbf => r[d] = r[s],
                0xb7 => r[d] = i.immediate as u64,
                0x54 => r[d] = u64::from(r[d] as u32 & i.immediate as u32),
                0x74 => r[d] = u64::from(r[d] as u32 >> i.immediate),
                0x4c => r[d] = u64::from(r[d] as u32 | r[s] as u32),
                0x64 => r[d] = u64::from((r[d] as u32) << i.immediate),
                0x05 => at = jump(true, at),
                0x16 => at = jump(r[d] as u32 == i.immediate as u32, at),
                0x56 => at = jump(r[d] as u32 != i.immediate as u32, at),
                0x46 => at = jump(r[d] as u32 & i.immediate as u32 != 0, at),
                0x95 => return r[0] != 0,
                other => panic!("opcode {other:#x}"),
            }
        }
        panic!("no end");
    }

    fn spec(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn without_rules_only_the_harmless_devices_are_allowed() {
        let code = program(&rules(&[]).unwrap());
        assert!(run(&code, 2, READ | WRITE, 1, 3));
        assert!(run(&code, 2, READ, 136, 7));
        assert!(run(&code, 1, MKNOD, 8, 0));
        assert!(!run(&code, 1, READ, 8, 0));
        assert!(!run(&code, 2, READ, 10, 229));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let given = spec(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"rw"},{"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
        );
        let code = program(&rules(&given).unwrap());
        assert!(run(&code, 1, READ | WRITE, 8, 0));
        assert!(run(&code, 1, READ, 8, 1));
        assert!(!run(&code, 1, READ | WRITE, 8, 1));
        assert!(!run(&code, 2, READ, 8, 0));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let given = spec(r#"[{"allow":true,"access":"rwm"}]"#);
        let all = rules(&given).unwrap();
        assert_eq!(line_v1(&all[0]), "a");
        assert_eq!(all.len(), 1);
        assert!(run(&program(&all), 1, ALL, 8, 0));
    }

    #[test]
    fn a_rule_reads_as_the_kernel_writes_it() {
        let rule = Rule {
            allow: true,
            kind: 'c',
            major: Some(10),
            minor: None,
            access: READ | MKNOD,
        };
        assert_eq!(line_v1(&rule), "c 10:* rm");
    }

    /// What the rules say, without a program.
    fn allowed(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let matches = |rule: &&Rule| {
            (rule.kind == 'a' || rule.kind == ['b', 'c'][kind as usize - 1])
                && rule.major.is_none_or(|wanted| wanted == major)
                && rule.minor.is_none_or(|wanted| wanted == minor)
                && if rule.allow {
                    access & !rule.access == 0
                } else {
                    access & rule.access != 0
                }
        };
        rules
            .iter()
            .rev()
            .find(matches)
            .is_some_and(|rule| rule.allow)
    }

    /// Every instruction can be reached, as the kernel's verifier wants it.
    fn all_reached(code: &[Instruction]) -> bool {
        let mut reached = vec![false; code.len()];
        let mut ways = vec![0usize];
        while let Some(at) = ways.pop() {
            if std::mem::replace(&mut reached[at], true) {
                continue;
            }
            let jump = at + 1 + code[at].offset as usize;
            match code[at].opcode {
                0x95 => {}
                0x05 => ways.push(jump),
                0x16 | 0x46 | 0x56 => ways.extend([at + 1, jump]),
                _ => ways.push(at + 1),
            }
        }
        reached.iter().all(|reached| *reached)
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || {
            prop_oneof![
                2 => Just(None),
                4 => (0..4u32).prop_map(Some),
                1 => prop::sample::select(vec![2048, 4095, 4096, 1 << 19, 1 << 20]).prop_map(Some),
            ]
        };
        let kind = prop::sample::select(vec!['a', 'b', 'c']);
        (
            any::<bool>(),
            kind,
            number(),
            number(),
            prop_oneof![Just(ALL), 1..8u32],
        )
            .prop_map(|(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn the_program_says_what_the_rules_say(rules in prop::collection::vec(any_rule(), 0..9)) {
            let code = program(&rules);
            prop_assert!(all_reached(&code), "{code:?}");
            for (major, minor) in [(0, 0), (1, 3), (3, 1), (2, 2), (2048, 0), (4095, 1 << 19)] {
                for (kind, access) in (1..3).flat_map(|kind| (1..8).map(move |access| (kind, access))) {
                    prop_assert_eq!(
                        run(&code, kind, access, major, minor),
                        allowed(&rules, kind, access, major, minor),
                        "{} {} {}:{}", kind, access, major, minor
                    );
                }
            }
        }
    }
}
