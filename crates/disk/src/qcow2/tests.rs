use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::Format;

fn qemu_img(args: &[&str]) -> Option<()> {
    let output = match Command::new("qemu-img").args(args).output() {
        Ok(output) => output,
        Err(_) => {
            eprintln!("SKIPPED: qemu-img is not installed (apt-get install qemu-utils)");
            return None;
        }
    };
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn new(path: &Path, size: u64, cluster_bits: u32) -> Qcow2Disk {
    Qcow2Disk::create(
        path,
        &CreateOptions {
            size,
            cluster_bits,
            backing: None,
        },
    )
    .unwrap();
    Qcow2Disk::open(path, false, BackingFiles::Refused).unwrap()
}

#[test]
fn what_was_flushed_is_there_and_qemu_finds_the_image_sound() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 1 << 30, 16);
    disk.write_at(5, b"hello").unwrap();
    disk.write_at((1 << 30) - 7, b"the end").unwrap();
    disk.write_at((512 << 20) - 100, &[7; 200]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = Qcow2Disk::open(&path, true, BackingFiles::Refused).unwrap();
    let mut buffer = [1; 12];
    disk.read_at(0, &mut buffer).unwrap();
    assert_eq!(&buffer, b"\0\0\0\0\0hello\0\0");
    let mut buffer = [0; 7];
    disk.read_at((1 << 30) - 7, &mut buffer).unwrap();
    assert_eq!(&buffer, b"the end");
    assert!(disk.allocated().unwrap() < 2 << 20);
    assert!(disk.read_at(1 << 30, &mut buffer).is_err());
    drop(disk);
    qemu_img(&["check", text(&path)]);
}

#[test]
fn qemu_reads_ours_and_we_read_qemus_compressed_ones() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("a.raw");
    let bytes: Vec<u8> = (0..3_000_000u32)
        .flat_map(|i| (i / 1000).to_le_bytes())
        .collect();
    std::fs::write(&raw, &bytes[..bytes.len() / 512 * 512]).unwrap();
    let size = std::fs::metadata(&raw).unwrap().len();
    let ours = directory.path().join("ours.qcow2");
    let disk = new(&ours, size, 12);
    for (index, chunk) in bytes[..size as usize].chunks(100_000).enumerate() {
        disk.write_at(index as u64 * 100_000, chunk).unwrap();
    }
    drop(disk);
    let Some(()) = qemu_img(&["compare", text(&ours), text(&raw)]) else {
        return;
    };
    qemu_img(&["check", text(&ours)]);
    for compression in ["zlib", "zstd"] {
        let packed = directory.path().join(compression);
        let option = format!("compression_type={compression}");
        qemu_img(&[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            &option,
            text(&raw),
            text(&packed),
        ]);
        let disk = Qcow2Disk::open(&packed, false, BackingFiles::Refused).unwrap();
        let mut all = vec![0; size as usize];
        disk.read_at(0, &mut all).unwrap();
        assert!(all == bytes[..size as usize], "{compression} differs");
        disk.write_at(70_000, b"over a compressed cluster").unwrap();
        disk.discard(1 << 20, 1 << 20).unwrap();
        drop(disk);
        qemu_img(&["check", text(&packed)]);
    }
}

#[test]
fn an_overlay_leaves_its_base_alone() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.qcow2");
    let disk = new(&base, 8 << 20, 16);
    disk.write_at(0, &[1; 300_000]).unwrap();
    drop(disk);
    let before = std::fs::read(&base).unwrap();
    let top = directory.path().join("top.qcow2");
    let backing = Some(Backing {
        file: "base.qcow2".into(),
        format: Some("qcow2".into()),
    });
    Qcow2Disk::create(
        &top,
        &CreateOptions {
            size: 16 << 20,
            cluster_bits: 16,
            backing,
        },
    )
    .unwrap();
    assert!(Qcow2Disk::open(&top, false, BackingFiles::Refused).is_err());
    let disk = Qcow2Disk::open(&top, false, BackingFiles::Allowed).unwrap();
    disk.write_at(65_530, &[2; 20]).unwrap();
    disk.write_zeroes(131_072, 65_536).unwrap();
    let mut all = vec![9; 16 << 20];
    disk.read_at(0, &mut all).unwrap();
    assert_eq!(
        &all[65_520..65_560],
        &[&[1; 10][..], &[2; 20], &[1; 10]].concat()[..]
    );
    assert!(all[131_072..196_608].iter().all(|b| *b == 0));
    assert!(all[196_608..300_000].iter().all(|b| *b == 1));
    assert!(all[300_000..].iter().all(|b| *b == 0));
    drop(disk);
    assert!(before == std::fs::read(&base).unwrap());
    qemu_img(&["check", text(&top)]);
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 1 << 20, 9);
    disk.write_at(0, b"kept").unwrap();
    drop(disk);
    crate::grow(&path, Format::Qcow2, 4 << 20).unwrap();
    assert!(crate::grow(&path, Format::Qcow2, 1 << 20).is_err());
    let disk = Qcow2Disk::open(&path, false, BackingFiles::Refused).unwrap();
    disk.write_at((4 << 20) - 4, b"more").unwrap();
    let mut buffer = [0; 4];
    disk.read_at(0, &mut buffer).unwrap();
    assert_eq!(&buffer, b"kept");
    drop(disk);
    qemu_img(&["check", text(&path)]);
}

#[test]
fn a_snapshot_of_qemus_keeps_its_clusters() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 4 << 20, 16);
    disk.write_at(0, &[1; 200_000]).unwrap();
    drop(disk);
    let Some(()) = qemu_img(&["snapshot", "-c", "before", text(&path)]) else {
        return;
    };
    let disk = Qcow2Disk::open(&path, false, BackingFiles::Refused).unwrap();
    disk.write_at(100, &[2; 100_000]).unwrap();
    drop(disk);
    qemu_img(&["check", text(&path)]);
    qemu_img(&["snapshot", "-a", "before", text(&path)]);
    let disk = Qcow2Disk::open(&path, true, BackingFiles::Refused).unwrap();
    let mut all = vec![0; 200_000];
    disk.read_at(0, &mut all).unwrap();
    assert!(all.iter().all(|b| *b == 1));
}

#[test]
fn freed_clusters_are_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 64 << 20, 16);
    for _ in 0..8 {
        disk.write_at(0, &vec![3; 4 << 20]).unwrap();
        disk.flush().unwrap();
        disk.discard(0, 4 << 20).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    assert!(std::fs::metadata(&path).unwrap().len() < 12 << 20);
    qemu_img(&["check", text(&path)]);
}

#[test]
fn a_process_cut_off_after_a_flush_loses_nothing_of_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 64 << 20, 12);
    disk.write_at(10 << 20, b"flushed").unwrap();
    disk.flush().unwrap();
    disk.write_at(20 << 20, b"not flushed").unwrap();
    // What the file holds now is what a killed process leaves.
    let copy = directory.path().join("b.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let after = Qcow2Disk::open(&copy, false, BackingFiles::Refused).unwrap();
    let mut buffer = [0; 7];
    after.read_at(10 << 20, &mut buffer).unwrap();
    assert_eq!(&buffer, b"flushed");
    after.write_at(30 << 20, b"goes on").unwrap();
    after.flush().unwrap();
    after.read_at(10 << 20, &mut buffer).unwrap();
    assert_eq!(&buffer, b"flushed");
}

/// The host offset of the first second-level table.
fn first_table(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    long(long(40) as usize) & OFFSET
}

#[test]
fn a_disk_in_use_grows_and_its_counts_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    // Clusters so small that both tables have to be longer.
    let disk = new(&path, 1 << 20, 9);
    disk.write_at(0, &[1; 300_000]).unwrap();
    disk.flush().unwrap();
    assert!(disk.grow(4096).is_err());
    disk.grow(40 << 20).unwrap();
    assert_eq!(disk.len(), 40 << 20);
    let content: Vec<u8> = (0..39 << 20).map(|n: u32| (n / 512) as u8).collect();
    disk.write_at(1 << 20, &content).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = Qcow2Disk::open(&path, false, BackingFiles::Refused).unwrap();
    let mut back = vec![0; 39 << 20];
    disk.read_at(1 << 20, &mut back).unwrap();
    assert!(back == content);
    disk.read_at(0, &mut back[..400_000]).unwrap();
    assert!(
        back[..300_000].iter().all(|b| *b == 1) && back[300_000..400_000].iter().all(|b| *b == 0)
    );
    drop(disk);
    qemu_img(&["check", text(&path)]);
}

#[test]
fn a_cluster_that_a_transfer_still_uses_is_given_to_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 1 << 20, 16);
    disk.write_at(0, &[1; 65_536]).unwrap();
    let place = disk.place(Way::ToFile, 0, 65_536).unwrap();
    let Part::File { file, offset, .. } = place.parts[0].clone() else {
        panic!("{:?}", place.parts);
    };
    disk.discard(0, 65_536).unwrap();
    disk.flush().unwrap();
    disk.write_at(131_072, &[2; 65_536]).unwrap();
    // The transfer that began before the discard ends now.
    file.write_all_at(&[3; 65_536], offset).unwrap();
    let mut data = vec![0; 65_536];
    disk.read_at(131_072, &mut data).unwrap();
    assert!(data.iter().all(|b| *b == 2));
    drop((place, file));
    disk.flush().unwrap();
    disk.write_at(0, &[4; 65_536]).unwrap();
    let again = disk.place(Way::FromFile, 0, 65_536).unwrap();
    assert!(matches!(again.parts[0], Part::File { offset: at, .. } if at == offset));
    drop(again);
    drop(disk);
    qemu_img(&["check", text(&path)]);
}

#[test]
fn a_range_lies_in_the_image_in_the_one_below_and_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    std::fs::write(&base, vec![1; 200_000 / 512 * 512]).unwrap();
    let top = directory.path().join("top.qcow2");
    let options = CreateOptions {
        size: 1 << 20,
        backing: Some(Backing {
            file: "base.raw".into(),
            format: Some("raw".into()),
        }),
        ..CreateOptions::default()
    };
    Qcow2Disk::create(&top, &options).unwrap();
    let disk = Qcow2Disk::open(&top, false, BackingFiles::Allowed).unwrap();
    disk.write_at(65_536, &[2; 65_536]).unwrap();
    disk.write_zeroes(0, 65_536).unwrap();
    let len = 300_000;
    let place = disk.place(Way::FromFile, 1000, len).unwrap();
    assert_eq!(place.parts.iter().map(Part::len).sum::<u64>(), len);
    assert!(place.parts.len() >= 4, "{:?}", place.parts);
    let mut memory = vec![9u8; len as usize];
    let (mut plain, (one, two)) = (memory.clone(), memory.split_at_mut(70_001));
    let buffers = [
        VolatileSlice::from(&mut *one),
        VolatileSlice::from(&mut *two),
    ];
    assert!(disk.try_read_volatile_at(1000, &buffers).unwrap());
    disk.read_at(1000, &mut plain).unwrap();
    assert!(memory == plain);
    assert!(disk.place(Way::ToFile, 65_536, 65_536).is_some());
    assert!(
        disk.place(Way::ToFile, 0, 4096).is_none(),
        "it is to be allocated"
    );
}

#[test]
fn a_broken_image_is_refused_with_what_is_wrong_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 8 << 20, 12);
    disk.write_at(0, &[1; 100_000]).unwrap();
    drop(disk);
    let sound = std::fs::read(&path).unwrap();
    let table = first_table(&path) as usize;
    let long = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let counts = long(long(48) as usize) as usize;
    let uncounted = |cluster: usize| {
        let mut bytes = sound.clone();
        bytes[counts + cluster * 2..][..2].fill(0);
        bytes
    };
    let mut no_table = sound.clone();
    no_table[long(40) as usize..][..8].copy_from_slice(&(COPIED | 1 << 40).to_be_bytes());
    let mut no_header = sound.clone();
    no_header[20..24].copy_from_slice(&40u32.to_be_bytes());
    let data = (long(table) & OFFSET) as usize;
    for (bytes, wrong) in [
        (sound[..sound.len() / 2].to_vec(), "cut off"),
        (sound[..4096].to_vec(), "cut off"),
        (uncounted(table / 4096), "holds its tables"),
        (uncounted(data / 4096), "holds data"),
        (no_table, "outside of the file"),
        (no_header, "clusters have 2^40 bytes"),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let error = Qcow2Disk::open(&path, false, BackingFiles::Refused).err();
        let error = error.expect(wrong).to_string();
        assert!(
            error.contains(wrong) && error.contains("a.qcow2"),
            "{error}"
        );
        assert!(
            std::fs::read(&path).unwrap() == bytes,
            "it was written: {wrong}"
        );
    }
}

#[test]
fn an_image_that_breaks_while_it_is_used_is_written_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    let disk = new(&path, 8 << 20, 12);
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.write_at(4096, &[2; 4096]).unwrap();
    disk.flush().unwrap();
    // Somebody else's hand: a table says that data lies where the table itself does.
    let table = first_table(&path);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    drop(disk);
    let disk = Qcow2Disk::open(&path, false, BackingFiles::Refused).unwrap();
    file.write_all_at(&(table | COPIED).to_be_bytes(), table)
        .unwrap();
    let error = disk.write_at(0, &[7; 512]).unwrap_err().to_string();
    assert!(
        error.contains("damaged") && error.contains("qemu-img check -r all"),
        "{error}"
    );
    let error = disk.write_at(1 << 20, &[7; 512]).unwrap_err().to_string();
    assert!(error.contains("nothing more is written"), "{error}");
    let mut data = [0; 4096];
    disk.read_at(4096, &mut data).unwrap();
    assert_eq!(data, [2; 4096], "what is whole is read all the same");
    drop(disk);
    let error = Qcow2Disk::open(&path, false, BackingFiles::Refused).err();
    assert!(error.unwrap().to_string().contains("marked as damaged"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a plain array, over any mixture of operations.
    #[test]
    fn it_behaves_as_a_disk(
        bits in 9u32..13,
        steps in proptest::collection::vec((0u8..6, 0u64..300_000, 1usize..20_000, any::<u8>()), 1..60),
    ) {
        const SIZE: usize = 300_032;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qcow2");
        let mut disk = new(&path, SIZE as u64, bits);
        let mut model = vec![0u8; SIZE];
        for (kind, offset, len, value) in steps {
            let at = offset as usize;
            let len = len.min(SIZE - at);
            match kind {
                0 | 1 => {
                    let mut data: Vec<u8> = (0..len).map(|i| value.wrapping_add(i as u8)).collect();
                    model[at..at + len].copy_from_slice(&data);
                    if kind == 0 {
                        disk.write_at(offset, &data).unwrap();
                    } else {
                        let (one, two) = data.split_at_mut(len / 3);
                        let buffers = [VolatileSlice::from(one), VolatileSlice::from(two)];
                        disk.write_volatile_at(offset, &buffers).unwrap();
                        let mut back = vec![0; len];
                        let slice = [VolatileSlice::from(&mut back[..])];
                        disk.read_volatile_at(offset, &slice).unwrap();
                        prop_assert!(back == model[at..at + len]);
                    }
                }
                2 => {
                    disk.write_zeroes(offset, len as u64).unwrap();
                    model[at..at + len].fill(0);
                }
                3 => {
                    disk.discard(offset, len as u64).unwrap();
                    // Without an image below, a discarded cluster reads as zeros here and a part stays as it was.
                    disk.read_at(offset, &mut model[at..at + len]).unwrap();
                }
                4 => disk.flush().unwrap(),
                _ => {
                    drop(disk);
                    disk = Qcow2Disk::open(&path, false, BackingFiles::Refused).unwrap();
                }
            }
        }
        let mut all = vec![0; SIZE];
        disk.read_at(0, &mut all).unwrap();
        prop_assert!(all == model);
        drop(disk);
        qemu_img(&["check", text(&path)]);
    }

    #[test]
    fn a_damaged_image_never_panics(at in 0usize..4096, value: u64, second in 0usize..2048, other: u64) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qcow2");
        let disk = new(&path, 200_000, 9);
        disk.write_at(0, &[1; 5000]).unwrap();
        drop(disk);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        bytes[second..second + 8].copy_from_slice(&other.to_be_bytes());
        fuzz_image(&bytes);
    }
}
