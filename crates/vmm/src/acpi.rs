//! The tables by which the guest learns of its board (ACPI 6.4), as a hardware-reduced platform: no fixed
//! power-management hardware, no PIC, no PIT interrupt.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    Name, Notify, OpRegion, OpRegionSpace, Package, PackageBuilder, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use cpu::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::power::{EVENT_POWER_BUTTON, RESET_VALUE, SLEEP_TYPE_OFF};
use crate::devices::{pin, port};
use crate::memory::{
    ACPI_END, ACPI_START, IOAPIC_START, LAPIC_START, MemoryError, PCI_ECAM_LEN, PCI_ECAM_START,
    PCI_WINDOW32, window64,
};

const OEM: [u8; 6] = *b"BERTH ";
const TABLE: [u8; 8] = *b"BERTHVMM";
/// FADT boot architecture flags (table 5.11): no VGA.
const BOOT_NO_VGA: u16 = 4;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// Tables one after the other from an address on.
struct Layout {
    start: u64,
    content: Vec<u8>,
}

impl Layout {
    fn add(&mut self, table: &[u8]) -> u64 {
        self.content
            .resize(self.content.len().next_multiple_of(64), 0);
        let address = self.start + self.content.len() as u64;
        self.content.extend_from_slice(table);
        address
    }
}

/// Writes the tables of a machine with `cpus` processors into guest memory.
///
/// # Returns
/// The address of the RSDP.
///
/// # Errors
/// Where they do not fit below 1 MiB, with several thousand CPUs.
pub fn write(memory: &GuestMemory, cpus: u32) -> Result<u64, MemoryError> {
    // The RSDP comes first, where a search finds it (5.2.5.1).
    let mut layout = Layout {
        start: ACPI_START,
        content: vec![0; Rsdp::len()],
    };
    let dsdt = layout.add(&dsdt(memory));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let register = |at: u64| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, at);
    fadt.iapc_boot_arch = BOOT_NO_VGA.into();
    fadt.reset_reg = register(port::POWER + 2);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(port::POWER);
    fadt.sleep_status_reg = register(port::POWER + 1);
    let fadt = layout.add(&bytes(&fadt.finalize()));
    let mut madt = MADT::new(
        OEM,
        TABLE,
        1,
        LocalInterruptController::Address(LAPIC_START as u32),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(
            id as u8,
            id as u8,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_START as u32, 0));
    let madt = layout.add(&bytes(&madt));
    let mut mcfg = MCFG::new(OEM, TABLE, 1);
    mcfg.add_ecam(PCI_ECAM_START, 0, 0, 0);
    let mcfg = layout.add(&bytes(&mcfg));
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = layout.add(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    layout.content[..rsdp.len()].copy_from_slice(&rsdp);
    let len = layout.content.len() as u64;
    if len > ACPI_END - ACPI_START {
        return Err(MemoryError::Outside {
            address: ACPI_START,
            len,
        });
    }
    memory
        .write_slice(&layout.content, GuestAddress(ACPI_START))
        .map_err(|_| MemoryError::Outside {
            address: ACPI_START,
            len,
        })?;
    Ok(ACPI_START)
}

/// A value that is its own AML: `Arg(0)`'s and friends' siblings the crate has as traits of integers.
fn dsdt(memory: &GuestMemory) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    let mut body: Vec<u8> = Vec::new();
    pci_host(memory, &mut body);
    board(&mut body);
    Name::new(Path::new("_S5_"), &Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);
    sdt.append_slice(&body);
    sdt.as_slice().to_vec()
}

fn pci_host(memory: &GuestMemory, out: &mut dyn AmlSink) {
    let window64 = window64(memory);
    let mut routes = PackageBuilder::new();
    for slot in 0..32u32 {
        for interrupt in 0..4u32 {
            let address = slot << 16 | 0xffff;
            let gsi = pin::PCI[((slot + interrupt) % 4) as usize];
            routes.add_element(&Package::new(vec![&address, &interrupt, &ZERO, &gsi]));
        }
    }
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PCI0"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                    &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                    &Name::new(Path::new("_ADR"), &ZERO),
                    &Name::new(Path::new("_SEG"), &ZERO),
                    &Name::new(Path::new("_BBN"), &ZERO),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &AddressSpace::new_bus_number(0u16, 0u16),
                            &IO::new(0xcf8, 0xcf8, 1, 8),
                            &AddressSpace::new_io(0x1000u16, 0xffffu16, None),
                            &AddressSpace::new_memory(
                                AddressSpaceCacheable::NotCacheable,
                                true,
                                PCI_WINDOW32.start as u32,
                                (PCI_WINDOW32.end - 1) as u32,
                                None,
                            ),
                            &AddressSpace::new_memory(
                                AddressSpaceCacheable::NotCacheable,
                                true,
                                window64.start,
                                window64.end - 1,
                                None,
                            ),
                        ]),
                    ),
                    &Name::new(Path::new("_PRT"), &routes),
                ],
            ),
            // The configuration space is claimed by the board, or Linux does not trust it.
            &Device::new(
                Path::new("MBRD"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            PCI_ECAM_START as u32,
                            PCI_ECAM_LEN as u32,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn board(out: &mut dyn AmlSink) {
    let button = Path::new("\\_SB_.PWRB");
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_DDN"), &"COM1"),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &Interrupt::new(true, true, false, false, pin::COM1),
                            &IO::new(port::COM1 as u16, port::COM1 as u16, 0, 8),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("RTC_"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&IO::new(
                            port::RTC as u16,
                            port::RTC as u16,
                            0,
                            2,
                        )]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("PEVT"),
                vec![
                    &Name::new(Path::new("_HID"), &"QEMU0001"),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&IO::new(
                            port::PANIC as u16,
                            port::PANIC as u16,
                            1,
                            1,
                        )]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("PWRB"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                    &Name::new(Path::new("_UID"), &ZERO),
                ],
            ),
            &Device::new(
                Path::new("GED_"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0013"),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            pin::POWER,
                        )]),
                    ),
                    &OpRegion::new(
                        Path::new("EVTR"),
                        OpRegionSpace::SystemIO,
                        &(port::POWER as u16 + 3),
                        &1u8,
                    ),
                    &Field::new(
                        Path::new("EVTR"),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"EVTS", 8)],
                    ),
                    &Method::new(
                        Path::new("_EVT"),
                        1,
                        true,
                        vec![
                            &Store::new(&Local(0), &Path::new("EVTS")),
                            &And::new(&Local(1), &Local(0), &EVENT_POWER_BUTTON),
                            &If::new(
                                &Equal::new(&Local(1), &EVENT_POWER_BUTTON),
                                vec![&Notify::new(&button, &0x80u8)],
                            ),
                            // The argument is the interrupt, of which there is one.
                            &Store::new(&Local(2), &Arg(0)),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let mut len = [0; 4];
        memory.read_slice(&mut len, GuestAddress(at + 4)).unwrap();
        let mut table = vec![0; u32::from_le_bytes(len) as usize];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let rsdp = write(&memory, 4).unwrap();
        let mut root = vec![0; 36];
        memory.read_slice(&mut root, GuestAddress(rsdp)).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let xsdt = table(
            &memory,
            u64::from_le_bytes(root[24..32].try_into().unwrap()),
        );
        assert_eq!(sum(&xsdt), 0);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let content = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&content), 0);
            names.push(String::from_utf8(content[..4].to_vec()).unwrap());
            if names.last().unwrap() == "FACP" {
                let dsdt = table(
                    &memory,
                    u64::from_le_bytes(content[140..148].try_into().unwrap()),
                );
                assert_eq!((sum(&dsdt), &dsdt[..4]), (0, &b"DSDT"[..]));
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
