//! Making, changing and removing machines.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use ::disk::Format;
use base::Id;
use base::units::format_size;

use vmm::boot::{Kernel, Protocol};
use vmm::process::protocol::Request;

use super::process::ask;
use super::record::{Machine, MachineChange, MachineSpec, NO_NETWORK, USER_NETWORK};
use super::{Machines, RECORD, Slot, bases, disk};
use crate::{Error, Result};

const SMALLEST_DISK: u64 = 96 << 20;
pub(super) const SMALLEST_MEMORY: u64 = 64 << 20;
const DEFAULT_DISK: u64 = 10 << 30;
/// What a guest on the user network asks for names: its gateway.
const USER_RESOLVER: &str = "10.0.2.2";

fn check_name(name: &str) -> Result<()> {
    let valid = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if valid {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "{name:?} is no name for a machine: letters, digits and inner hyphens, at most 63"
        )))
    }
}

/// The largest initial RAM disk and kernel that are taken.
const BOOT_FILE_LIMIT: u64 = 2 << 30;

fn copy_boot_file(from: &Path, to: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::Room {
        message: format!("cannot read {}: {error}", from.display()),
        kind: base::error::kind_of_io(&error),
        fix: None,
    };
    let about = fs::metadata(from).map_err(failed)?;
    if !about.is_file() || about.len() > BOOT_FILE_LIMIT {
        return Err(Error::Invalid(format!(
            "{} is no file of at most 2 GiB",
            from.display()
        )));
    }
    fs::copy(from, to).map(drop).map_err(failed)
}

/// A machine's network as its guest is told of it.
#[derive(Default)]
pub(super) struct Surroundings {
    /// The name server's address, where there is one.
    pub resolver: Option<String>,
    /// Addresses of IPv6 are given, by router advertisements and DHCPv6.
    pub v6: bool,
}

/// What creation made, for the record.
struct Made {
    base: Option<String>,
    initrd: bool,
    format: Format,
    disk: u64,
}

fn cannot_shrink(what: &str, len: u64) -> Error {
    Error::Invalid(format!(
        "{what} has {}; a disk cannot be made smaller, what is cut off would be lost",
        format_size(len)
    ))
}

/// Makes disk `number` larger: by the machine's process where it runs. A crash before the record is written leaves a larger
/// disk than is known.
fn grow_disk(
    folder: &Path,
    machine: &Machine,
    number: usize,
    (path, format): (&Path, Format),
    size: u64,
) -> Result<()> {
    if machine.run.is_none() {
        return disk::grow(path, format, size);
    }
    let request = Request::GrowDisk { disk: number, size };
    match ask(folder, &request)?.error {
        None => Ok(()),
        Some(why) => Err(Error::Conflict(format!(
            "machine {}: {why}",
            machine.spec.name
        ))),
    }
}

impl Machines {
    /// Makes a machine; it does not run yet.
    ///
    /// # Errors
    /// A name in use, an image that is not here or has no kernel, more than the host has. Nothing is left then.
    pub fn create(self: &Arc<Machines>, mut spec: MachineSpec) -> Result<Id> {
        check_name(&spec.name)?;
        spec.cpus = spec.cpus.max(1);
        if spec.memory == 0 {
            spec.memory = 1 << 30;
        }
        if spec.disk == 0 && spec.disk_file.is_none() {
            spec.disk = DEFAULT_DISK;
        }
        spec.disk = spec.disk.next_multiple_of(4096);
        if spec.network.is_empty() {
            let bridges = self.engine.need_bridges("bridge").is_ok() && tap_allowed();
            spec.network = if bridges { "bridge" } else { USER_NETWORK }.into();
        }
        if spec.memory < SMALLEST_MEMORY || (spec.disk != 0 && spec.disk < SMALLEST_DISK) {
            return Err(Error::Invalid(format!(
                "a machine needs at least {} of memory and {} of disk",
                format_size(SMALLEST_MEMORY),
                format_size(SMALLEST_DISK)
            )));
        }
        if spec.image.is_empty() && (spec.kernel.is_none() || spec.disk_file.is_none()) {
            return Err(Error::Invalid(
                "a machine needs an image, or a kernel and a disk file".into(),
            ));
        }
        self.check_capacity(&spec, 0)?;
        self.check_free(&spec.name)?;
        let surroundings = self.surroundings_of(&spec)?;
        let id = Id::random();
        let folder = self.folder.join(id.as_str());
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(Error::io(format!("cannot make {}", folder.display())))?;
        let made = self.make(&id, &spec, &folder, &surroundings);
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&folder);
            self.sweep_bases();
            return Err(error);
        }
        self.watch_storage();
        Ok(id)
    }

    fn check_free(&self, name: &str) -> Result<()> {
        if self.all().iter().any(|slot| slot.lock().spec.name == name) {
            return Err(Error::Conflict(format!(
                "there is a machine {name} already; choose another name"
            )));
        }
        Ok(())
    }

    /// What the guest is told of the machine's network.
    fn surroundings_of(&self, spec: &MachineSpec) -> Result<Surroundings> {
        if spec.network == NO_NETWORK {
            if let Some(port) = spec.ports.first() {
                return Err(Error::Room {
                    message: format!(
                        "a machine without a network cannot publish its port {}",
                        port.container_port
                    ),
                    kind: base::Kind::Invalid,
                    fix: Some("say --network user, or leave out --publish".into()),
                });
            }
            return Ok(Surroundings::default());
        }
        if spec.network == USER_NETWORK {
            let vague = spec.ports.iter().find(|port| port.host_ports.is_none());
            if let Some(port) = vague {
                return Err(Error::Invalid(format!(
                    "on the user network a published port needs its host port: --publish {0}:{0}",
                    port.container_port
                )));
            }
            return Ok(Surroundings {
                resolver: Some(USER_RESOLVER.into()),
                v6: false,
            });
        }
        let own_network = |error| match error {
            Error::Room { message, kind, .. } => Error::Room {
                message,
                kind,
                fix: Some("say --network user, or see berth doctor".into()),
            },
            other => other,
        };
        self.engine
            .need_bridges(&spec.network)
            .map_err(own_network)?;
        if !tap_allowed() {
            return Err(Error::Room {
                message: format!(
                    "a machine on the network {} needs /dev/net/tun, which this user may not open",
                    spec.network
                ),
                kind: base::Kind::Permission,
                fix: Some(
                    "say --network user, or: sudo modprobe tun && sudo chmod 666 /dev/net/tun"
                        .into(),
                ),
            });
        }
        let networks = self.engine.networks();
        let network = networks.inspect(&spec.network).map_err(Error::room)?;
        if network.driver != net::Driver::Bridge {
            return Err(Error::Room {
                message: format!("a machine cannot be on the network {}", spec.network),
                kind: base::Kind::Invalid,
                fix: Some(
                    "say --network with a bridge network (berth network list), user, or none"
                        .into(),
                ),
            });
        }
        let v6 = network.gateway_v6();
        let resolver = match (network.gateway_v4(), v6) {
            (Some(v4), _) => Some(v4.to_string()),
            (None, v6) => v6.map(|v6| v6.to_string()),
        };
        Ok(Surroundings {
            resolver,
            v6: v6.is_some(),
        })
    }

    fn make(
        self: &Arc<Machines>,
        id: &Id,
        spec: &MachineSpec,
        folder: &Path,
        surroundings: &Surroundings,
    ) -> Result<()> {
        let store = self.engine.images();
        let image = match spec.image.as_str() {
            "" => None,
            name => Some(store.resolve(name).map_err(Error::room)?),
        };
        let made = self.make_disk(image.as_ref(), spec, folder, surroundings)?;
        let drives = disk::drives(&spec.drives, folder)?;
        let mut spec = spec.clone();
        spec.disk = made.disk;
        let machine = Machine {
            version: 1,
            id: id.clone(),
            image_id: image.map_or_else(String::new, |image| image.to_string()),
            created: base::time::now_rfc3339(),
            mac: None,
            initrd: made.initrd,
            base: made.base,
            format: made.format,
            drives,
            run: None,
            stopped: false,
            last_exit: None,
            spec,
        };
        let slot = Slot::new(folder.to_owned(), machine.clone());
        self.save(&slot, &machine)?;
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        // Another may have taken the name while the disk was made.
        if slots
            .values()
            .any(|other| other.lock().spec.name == machine.spec.name)
        {
            return Err(Error::Conflict(format!(
                "there is a machine {} already; choose another name",
                machine.spec.name
            )));
        }
        slots.insert(id.clone(), slot);
        Ok(())
    }

    fn make_disk(
        &self,
        image: Option<&image::ImageId>,
        spec: &MachineSpec,
        folder: &Path,
        surroundings: &Surroundings,
    ) -> Result<Made> {
        // An image is looked at for its kernel even where the disk is another one.
        let base = match image {
            Some(image) if spec.kernel.is_none() || spec.disk_file.is_none() => Some(
                self.bases
                    .of_image(self.engine.images(), image, &spec.image)?,
            ),
            _ => None,
        };
        let mut initrd = base.as_ref().is_some_and(|base| base.initrd);
        if let Some(kernel) = &spec.kernel {
            // Its header only: what is packed stays so.
            Kernel::open(kernel, Protocol::BzImage).map_err(Error::room)?;
            copy_boot_file(kernel, &folder.join(bases::KERNEL))?;
            initrd = spec.initrd.is_some();
        }
        if let Some(file) = &spec.initrd {
            copy_boot_file(file, &folder.join(bases::INITRD))?;
            initrd = true;
        }
        let (format, disk) = match (&spec.disk_file, &base) {
            (Some(file), _) => disk::import(file, spec.disk, folder)?,
            (None, Some(base)) => {
                disk::make_overlay(base, spec, folder, surroundings)?;
                (Format::Qcow2, spec.disk)
            }
            (None, None) => return Err(Error::Invalid("a machine needs an image".into())),
        };
        Ok(Made {
            base: image.filter(|_| base.is_some()).map(bases::name_of),
            initrd,
            format,
            disk,
        })
    }

    /// Changes a machine; its disk can only grow, which a running guest is told of.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it runs and the change is of what a running guest cannot be given; what the host has no room
    /// for.
    pub fn update(&self, name: &str, change: &MachineChange) -> Result<()> {
        let slot = self.find(name)?;
        let mut machine = slot.lock();
        let of_hardware = change.cpus.is_some()
            || change.memory.is_some()
            || change.cpu.is_some()
            || change.append.is_some()
            || change.on_crash.is_some()
            || change.on_disk_full.is_some();
        if machine.run.is_some() && of_hardware {
            return Err(Error::Room {
                message: format!(
                    "machine {name} is running: its CPUs, memory, kernel words and policies for crashes and full disks can be changed when it is stopped"
                ),
                kind: base::Kind::Conflict,
                fix: Some(format!("berth machine stop {name}")),
            });
        }
        let mut next = machine.clone();
        let spec = &mut next.spec;
        spec.cpus = change.cpus.unwrap_or(spec.cpus).max(1);
        spec.memory = change.memory.unwrap_or(spec.memory);
        spec.cpu = change.cpu.unwrap_or(spec.cpu);
        spec.on_crash = change.on_crash.unwrap_or(spec.on_crash);
        spec.on_disk_full = change.on_disk_full.unwrap_or(spec.on_disk_full);
        spec.restart = change.restart.unwrap_or(spec.restart);
        spec.overcommit = change.overcommit.unwrap_or(spec.overcommit);
        if let Some(append) = &change.append {
            spec.append.clone_from(append);
        }
        if spec.memory < SMALLEST_MEMORY {
            return Err(Error::Invalid(format!(
                "a machine needs at least {} of memory",
                format_size(SMALLEST_MEMORY)
            )));
        }
        self.check_capacity(spec, 0)?;
        if let Some(size) = change.disk {
            let size = size.next_multiple_of(4096);
            if size < spec.disk {
                return Err(cannot_shrink(
                    &format!("the disk of machine {name}"),
                    spec.disk,
                ));
            }
            let path = slot.folder.join(disk::file_name(machine.format));
            grow_disk(&slot.folder, &machine, 0, (&path, machine.format), size)?;
            spec.disk = size;
        }
        for (place, size) in change.drives.iter().flatten() {
            let drive = next.drives.get_mut(*place).ok_or_else(|| {
                Error::NotFound(format!(
                    "machine {name} has no drive {}; see berth machine inspect {name}",
                    place + 1
                ))
            })?;
            let size = size.next_multiple_of(4096);
            if size < drive.size {
                return Err(cannot_shrink(
                    &format!("drive {} of machine {name}", place + 1),
                    drive.size,
                ));
            }
            let file = (drive.path.as_path(), drive.format);
            grow_disk(&slot.folder, &machine, place + 1, file, size)?;
            drive.size = size;
        }
        self.save(&slot, &next)?;
        *machine = next;
        drop(machine);
        self.watch_storage();
        Ok(())
    }

    /// Gives a machine another name. Its host name inside stays; other machines know it by the new one.
    ///
    /// # Errors
    /// A name in use.
    pub fn rename(&self, name: &str, to: &str) -> Result<()> {
        check_name(to)?;
        let slot = self.find(name)?;
        let taken = self
            .all()
            .iter()
            .any(|other| !Arc::ptr_eq(other, &slot) && other.lock().spec.name == to);
        if taken {
            return Err(Error::Conflict(format!(
                "there is a machine {to} already; choose another name"
            )));
        }
        let mut machine = slot.lock();
        let mut next = machine.clone();
        next.spec.name = to.to_owned();
        if let Some(endpoint) = next.run.as_mut().and_then(|run| run.endpoint.as_mut()) {
            endpoint.names = vec![to.to_owned()];
        }
        self.save(&slot, &next)?;
        *machine = next;
        if machine
            .run
            .as_ref()
            .is_some_and(|run| run.endpoint.is_some())
        {
            let names = vec![to.to_owned()];
            self.engine.networks().rename(machine.id.as_str(), &names);
        }
        Ok(())
    }

    /// Removes a machine and its disks.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it runs and `force` is not said.
    pub fn remove(&self, name: &str, force: bool) -> Result<()> {
        let slot = self.find(name)?;
        // From here on no policy starts it again, and with its lock no start is under way.
        slot.gone.store(true, Ordering::SeqCst);
        let machine = slot.lock();
        let key = machine.run.as_ref().map(|run| run.process);
        let id = machine.id.clone();
        drop(machine);
        let ended = match key {
            Some(_) if !force => Err(Error::Room {
                message: format!("machine {name} is running"),
                kind: base::Kind::Conflict,
                fix: Some(format!("berth machine stop {name}, or say --force")),
            }),
            Some(key) => self.kill_slot(&slot, key),
            None => Ok(()),
        };
        if let Err(error) = ended {
            slot.gone.store(false, Ordering::SeqCst);
            return Err(error);
        }
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        // The record goes first: what is left of a crash in between is swept at the next start.
        let _ = fs::remove_file(slot.folder.join(RECORD));
        fs::remove_dir_all(&slot.folder).map_err(Error::io(format!(
            "cannot remove {}",
            slot.folder.display()
        )))?;
        self.sweep_bases();
        Ok(())
    }
}

/// Whether there can be taps: root's daemon is told by the start what is missing.
fn tap_allowed() -> bool {
    base::userns::owner().is_none()
        || fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_host_name() {
        assert!(check_name("web-1").is_ok());
        for bad in ["", "-a", "a-", "a.b", "a/b", "ä"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name(&"a".repeat(64)).is_err());
    }
}
