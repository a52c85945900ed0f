use super::*;
use proptest::prelude::*;

/// Runs a filter as the kernel would.
fn run(program: &Program, audit: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let load = |offset: u32| match offset {
        0 => number,
        4 => audit,
        _ => {
            let argument = arguments[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) {
                argument as u32
            } else {
                (argument >> 32) as u32
            }
        }
    };
    let (mut at, mut accumulator) = (0usize, 0u32);
    loop {
        let i = program.filter[at];
        at += 1;
        let taken = match i.code {
            0x20 => {
                accumulator = load(i.k);
                continue;
            }
            0x54 => {
                accumulator &= i.k;
                continue;
            }
            0x05 => {
                at += i.k as usize;
                continue;
            }
            0x06 => return i.k,
            0x15 => accumulator == i.k,
            0x25 => accumulator > i.k,
            0x35 => accumulator >= i.k,
            other => panic!("code {other:#x}"),
        };
        at += usize::from(if taken { i.jt } else { i.jf });
    }
}

fn program(json: &str) -> Program {
    compile(&serde_json::from_str(json).unwrap()).unwrap()
}

const X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = 0x7fff_0000;

fn number(name: &str) -> u32 {
    let index = table::TABLE
        .binary_search_by(|row| row.name.cmp(name))
        .unwrap();
    table::TABLE[index].numbers[0] as u32
}

#[test]
fn the_table_is_sorted_and_holds_what_every_program_needs() {
    assert!(
        table::TABLE
            .windows(2)
            .all(|pair| pair[0].name < pair[1].name)
    );
    assert_eq!(
        (number("read"), number("clone3"), number("execve")),
        (0, 435, 59)
    );
    #[cfg(target_arch = "x86_64")]
    assert_eq!(i64::from(number("openat2")), libc::SYS_openat2);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_profile_allows_what_it_names_and_nothing_else() {
    let p = program(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
        "syscalls":[{"names":["read","write","no_such_call","exit_group","mseal"],"action":"SCMP_ACT_ALLOW"},
        {"names":["ptrace"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
        {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    );
    let go = |name: &str, arguments| run(&p, X86_64, number(name), arguments);
    assert_eq!(go("read", [0; 6]), ALLOW);
    assert_eq!(go("exit_group", [0; 6]), ALLOW);
    assert_eq!(go("open", [0; 6]), RET_ERRNO | 1);
    assert_eq!(go("ptrace", [0; 6]), RET_ERRNO | 38);
    assert_eq!(go("clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(go("clone", [0x1000_0000, 0, 0, 0, 0, 0]), RET_ERRNO | 1);
    // i386 `read` is 3; x32 has its bit; numbers past all that is named are unknown to the program's author.
    assert_eq!(run(&p, 0x4000_0003, 3, [0; 6]), ALLOW);
    assert_eq!(run(&p, X86_64, X32_BIT, [0; 6]), ALLOW);
    assert_eq!(run(&p, X86_64, 463, [0; 6]), RET_ERRNO | 38);
    assert_eq!(run(&p, 0x1234, 0, [0; 6]), RET_KILL_PROCESS);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_x32_numbering_is_no_way_around_a_filter_without_it() {
    let p = program(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["kexec_load"],"action":"SCMP_ACT_ERRNO"}]}"#,
    );
    assert_eq!(run(&p, X86_64, X32_BIT | 246, [0; 6]), RET_KILL_PROCESS);
    assert_eq!(run(&p, X86_64, 246, [0; 6]), RET_ERRNO | 1);
    assert_eq!(run(&p, X86_64, 0, [0; 6]), ALLOW);
}

#[test]
fn one_argument_tested_twice_means_either() {
    let p = program(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],"action":"SCMP_ACT_ALLOW",
        "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
    );
    let native = Arch::native().unwrap();
    let index = table::TABLE
        .binary_search_by(|row| row.name.cmp("personality"))
        .unwrap();
    let number = table::TABLE[index].numbers[native as usize] as u32;
    for (value, result) in [(0, ALLOW), (8, ALLOW), (9, RET_ERRNO | 1)] {
        assert_eq!(
            run(&p, native.audit(), number, [value, 0, 0, 0, 0, 0]),
            result
        );
    }
}

#[test]
fn a_notifying_profile_needs_a_listener() {
    let profile = |rest: &str| {
        format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW"{rest},"syscalls":[{{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}}]}}"#
        )
    };
    assert!(compile(&serde_json::from_str(&profile("")).unwrap()).is_err());
    let p = program(&profile(r#","listenerPath":"/run/listener""#));
    assert!(p.listener.is_some());
    assert_ne!(p.flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER, 0);
}

proptest! {
    #[test]
    fn comparisons_agree_with_plain_arithmetic(value in any::<u64>(), argument in any::<u64>(), near in -2i64..3, op in 0usize..7, two in any::<u64>(), close in any::<bool>()) {
        let argument = if close { value.wrapping_add(near as u64) } else { argument };
        let (name, holds) = match op {
            0 => ("NE", argument != value),
            1 => ("LT", argument < value),
            2 => ("LE", argument <= value),
            3 => ("EQ", argument == value),
            4 => ("GE", argument >= value),
            5 => ("GT", argument > value),
            _ => ("MASKED_EQ", argument & value == two & value),
        };
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{{"index":2,"value":{value},"valueTwo":{two},"op":"SCMP_CMP_{name}"}}]}}]}}"#
        );
        let p = program(&json);
        let native = Arch::native().unwrap();
        let index = table::TABLE.binary_search_by(|row| row.name.cmp("read")).unwrap();
        let read = table::TABLE[index].numbers[native as usize] as u32;
        let result = run(&p, native.audit(), read, [7, 7, argument, 7, 7, 7]);
        prop_assert_eq!(result == ALLOW, holds);
    }

    #[test]
    fn every_call_gets_the_answer_of_its_own_rule(picks in proptest::collection::vec((0usize..480, 0u32..5), 1..300)) {
        let names: Vec<(String, u32)> = picks.iter().map(|(at, errno)| (table::TABLE[at % table::TABLE.len()].name.to_owned(), errno + 2)).collect();
        let rules: Vec<String> = names.iter().map(|(name, errno)| format!(r#"{{"names":["{name}"],"action":"SCMP_ACT_ERRNO","errnoRet":{errno}}}"#)).collect();
        let p = program(&format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{}]}}"#, rules.join(",")));
        let native = Arch::native().unwrap();
        for row in table::TABLE {
            let Ok(number) = u32::try_from(row.numbers[native as usize]) else { continue };
            let wanted = names.iter().find(|(name, _)| name == row.name).map_or(ALLOW, |(_, errno)| RET_ERRNO | errno);
            prop_assert_eq!(run(&p, native.audit(), number, [0; 6]), wanted, "{}", row.name);
        }
    }

    #[test]
    fn no_bytes_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
        fuzz_profile(&data);
    }
}
