//! A block that was moved is the block that would have been made there, to the byte.

use iced_x86::{Decoder, DecoderOptions};

use crate::cache::{Block, Key, mode};
use crate::translate::emit::Code;
use crate::translate::{Built, Exit, Lists, Request, Site, Stubs, Workshop, place};

const ORIGIN: u64 = 0x7f00_1000_0000;

fn build(page: &[u8], rip: u64, origin: u64, number: u32, lists: &mut Lists) -> (Built, Vec<u8>) {
    let stubs = Stubs {
        enter: ORIGIN - 0x100,
        memory: ORIGIN - 0x200,
        instruction: ORIGIN - 0x300,
        exit: ORIGIN - 0x400,
        jump_miss: ORIGIN - 0x500,
        jump_gone: ORIGIN - 0x600,
        host_fault: ORIGIN - 0x700,
        syscall: ORIGIN - 0x800,
        sysret: ORIGIN - 0x900,
    };
    let offset = (rip & 0xfff) as usize;
    let request = Request {
        key: Key {
            gpa: 0x5000 | rip & 0xfff,
            rip,
            mode: mode::USER,
        },
        number,
        bytes: &page[offset..],
        first_page: page.len() - offset,
        stubs,
        known: &|_| None,
        page,
        tsc_shifted: false,
        counted: false,
        groups: true,
        several: false,
        movable: true,
        calls: true,
        short: false,
        offers: &|_| true,
    };
    let mut code = Code::new(origin);
    let built = Workshop::new()
        .build(&request, &mut code, lists)
        .expect("the first instruction is whole");
    (built, code.bytes)
}

fn block(built: &Built, key: Key, len: usize) -> Block {
    Block {
        key,
        second: None,
        indirect: built.indirect,
        direct: built.direct,
        leave: built.leave,
        end: built.leave + len as u64,
        len: built.len,
        flags_live: built.flags_live,
        dead: false,
        places: built.places,
        sites: built.sites,
    }
}

/// Pages of this program's own code.
fn own_pages() -> Vec<[u8; 4096]> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let own = maps.lines().find(|l| l.contains(" r-xp ")).expect("code");
    let (start, end) = own
        .split(' ')
        .next()
        .and_then(|r| r.split_once('-'))
        .expect("a range");
    let [start, end] = [start, end].map(|s| usize::from_str_radix(s, 16).expect("hexadecimal"));
    (start..end)
        .step_by(4096 * 7)
        .take(150)
        // SAFETY: pages of this program's code, mapped for as long as it runs.
        .map(|at| unsafe { *(at as *const [u8; 4096]) })
        .collect()
}

#[test]
fn a_block_that_was_moved_is_the_one_that_would_have_been_made_there() {
    let (first, second) = (0x55aa_1234_5000u64, 0x7fee_0022_1000u64);
    let (mut moved, mut fixed) = (0, 0);
    for page in own_pages() {
        let mut decoder = Decoder::with_ip(64, &page, first, DecoderOptions::NONE);
        let mut lists = Lists::default();
        let (mut number, mut origin) = (0, ORIGIN);
        while decoder.position() < 4000 {
            let at = decoder.position() as u64;
            let _ = decoder.decode();
            let (built, bytes) = build(&page, first + at, origin, number, &mut lists);
            let key = |base: u64| Key {
                gpa: 0x5000 | at,
                rip: base + at,
                mode: mode::USER,
            };
            let donor = block(&built, key(first), bytes.len());
            origin += (bytes.len() as u64).next_multiple_of(16);
            number += 1;
            // As if its exits had been chained.
            let mut copied = bytes.clone();
            for exit in &lists.exits {
                let site = exit.site.wrapping_sub(donor.leave) as usize;
                if exit.block == donor_number(number) && exit.site != 0 {
                    copied[site..site + 4].copy_from_slice(&[1, 2, 3, 4]);
                }
            }
            let mut wanted_lists = Lists {
                exits: lists.exits.clone(),
                instructions: lists.instructions.clone(),
                sites: lists.sites.clone(),
                places: lists.places.clone(),
            };
            let (wanted, wanted_bytes) =
                build(&page, second + at, origin, number, &mut wanted_lists);
            let Some(made) =
                place::copy(&donor, &mut copied, key(second), origin, number, &mut lists)
            else {
                fixed += 1;
                continue;
            };
            let differs = (0..copied.len()).find(|n| copied.get(*n) != wanted_bytes.get(*n));
            if let Some(n) = differs {
                let guest: Vec<String> =
                    Decoder::with_ip(64, &page[at as usize..], first + at, DecoderOptions::NONE)
                        .iter()
                        .take(48)
                        .map(|i| i.to_string())
                        .collect();
                panic!(
                    "byte {n} of {}: {:x?}, not {:x?}\n{}",
                    wanted_bytes.len(),
                    &copied[n.saturating_sub(12)..(n + 12).min(copied.len())],
                    &wanted_bytes[n.saturating_sub(12)..(n + 12).min(wanted_bytes.len())],
                    guest.join("\n")
                );
            }
            assert_eq!(copied.len(), wanted_bytes.len());
            assert_eq!(
                (
                    made.leave,
                    made.indirect,
                    made.direct,
                    made.len,
                    made.places,
                    made.sites
                ),
                (
                    wanted.leave,
                    wanted.indirect,
                    wanted.direct,
                    wanted.len,
                    wanted.places,
                    wanted.sites
                )
            );
            let exits = |l: &Lists| -> Vec<_> {
                let of = |e: &Exit| (e.target, e.site, e.block);
                l.exits.iter().map(of).collect()
            };
            let sites = |l: &Lists| -> Vec<_> {
                let of = |s: &Site| (s.host, s.end, s.rip, s.slot);
                l.sites.iter().map(of).collect()
            };
            assert_eq!(exits(&lists), exits(&wanted_lists));
            assert_eq!(sites(&lists), sites(&wanted_lists));
            assert_eq!(lists.places, wanted_lists.places);
            for (a, b) in lists.instructions.iter().zip(&wanted_lists.instructions) {
                assert!(a.0.eq_all_bits(&b.0) && a.1 == b.1, "{:?}, not {:?}", a, b);
            }
            assert_eq!(lists.instructions.len(), wanted_lists.instructions.len());
            origin += (copied.len() as u64).next_multiple_of(16);
            number += 1;
            moved += 1;
        }
    }
    eprintln!("{moved} moved, {fixed} that cannot be");
    assert!(moved > 10_000 && fixed < moved / 20, "{moved}, {fixed}");
}

/// The number of the block made last.
fn donor_number(next: u32) -> u32 {
    next - 1
}
