//! `berth machine create` and `update`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base::Kind;
use clap::Args;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::{
    CpuChoice, MACHINES, Names, OnCrash, OnDiskFull, RestartPolicy, format_named, path_of, size,
};
use crate::client::{Client, json_body};
use crate::commands::container::for_each;
use crate::commands::create::{port_range, published};
use crate::commands::show::text;
use crate::failure::Failure;
use crate::output;
use crate::progress::Progress;

/// A guest's own options come from its image; these are the machine's.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Image with a kernel in /boot (berth image bootstrap --kernel).
    #[arg(long, required_unless_present = "kernel")]
    pub image: Option<String>,
    /// If the image is missing or has no kernel, make it of Debian's archive without asking.
    #[arg(long)]
    pub bootstrap: bool,
    /// Number of CPUs, at most the host's.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: u32,
    /// Memory.
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    pub memory: String,
    /// Size of the disk, of which what is not written takes no room; or a disk image (raw, qcow2) to copy. 10G if not given.
    #[arg(long, value_name = "SIZE|FILE")]
    pub disk: Option<String>,
    /// Size of the copy of a disk image, where that shall grow.
    #[arg(long, value_name = "SIZE", requires = "disk")]
    pub disk_size: Option<String>,
    /// A further disk: a new one of a size, or a file that is used where it lies. Behind NVMe, or with ,virtio behind
    /// virtio-blk.
    #[arg(long, value_name = "SIZE|FILE[,ro][,virtio][,format=raw|qcow2]")]
    pub drive: Vec<String>,
    /// Kernel instead of the image's.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of that kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Which CPU runs the guest.
    #[arg(long, value_enum, default_value_t)]
    pub cpu: CpuChoice,
    /// Network, shared with containers; user is one of the machine's own that needs no rights. If not given, bridge; user
    /// where an ordinary user may have no taps.
    #[arg(
        long,
        value_name = "NETWORK",
        default_value = "",
        hide_default_value = true
    )]
    pub network: String,
    /// Publish a port: [[ADDRESS:]HOST:]PORT[/tcp|udp].
    #[arg(short, long, value_name = "SPEC")]
    pub publish: Vec<String>,
    /// What follows a crash of the guest: a kernel panic or a triple fault.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub on_crash: OnCrash,
    /// What follows a write for which the host has no room.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub on_disk_full: OnDiskFull,
    /// When the machine is started again after its end, or after the host's.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub restart: RestartPolicy,
    /// Allow more memory than the host has.
    #[arg(long)]
    pub overcommit: bool,
    /// Further words of the kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// File with root's public keys for ssh.
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Vec<PathBuf>,
    /// root's password as crypt(3) writes it (mkpasswd, openssl passwd -6).
    #[arg(long, value_name = "HASH")]
    pub password_hash: Option<String>,
    /// The console logs root in without a question.
    #[arg(long)]
    pub autologin: bool,
    /// Start it at once.
    #[arg(long)]
    pub start: bool,
    /// Name, which is also the host name.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Number of CPUs, at most the host's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: Option<u32>,
    /// Memory.
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Size of the disk: larger than it is. A running guest is told of it; a Debian takes the new space at its next start,
    /// or with resize2fs /dev/nvme0n1.
    #[arg(long, value_name = "SIZE")]
    pub disk: Option<String>,
    /// Size of a further disk, the first being 1: larger than it is. A running guest is told of it.
    #[arg(long, value_name = "NUMBER=SIZE")]
    pub drive: Vec<String>,
    /// Which CPU runs the guest.
    #[arg(long, value_enum)]
    pub cpu: Option<CpuChoice>,
    /// What follows a crash of the guest.
    #[arg(long, value_enum, value_name = "POLICY")]
    pub on_crash: Option<OnCrash>,
    /// What follows a write for which the host has no room.
    #[arg(long, value_enum, value_name = "POLICY")]
    pub on_disk_full: Option<OnDiskFull>,
    /// When the machine is started again after its end.
    #[arg(long, value_enum, value_name = "POLICY")]
    pub restart: Option<RestartPolicy>,
    /// Allow more memory than the host has, or no longer.
    #[arg(long, value_name = "BOOL")]
    pub overcommit: Option<bool>,
    /// Further words of the kernel's command line, in place of those it has.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    #[command(flatten)]
    pub names: Names,
}

/// A path as the daemon reads it, whose working folder is another.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|e| Failure::io(format!("cannot resolve {}", path.display()), &e))
}

fn is_size(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
        && base::units::parse_size(text).is_ok()
        && !Path::new(text).exists()
}

fn parse_drive(spec: &str) -> Result<Value, Failure> {
    let mut source = spec;
    let (mut read_only, mut format, mut bus) = (false, None, "nvme");
    while let Some((before, word)) = source.rsplit_once(',') {
        match (word, word.strip_prefix("format=")) {
            ("ro", _) => read_only = true,
            ("virtio", _) => bus = "virtio",
            ("nvme", _) => bus = "nvme",
            (_, Some(name)) => format = Some(format_named("drive", name)?),
            _ => break,
        }
        source = before;
    }
    if is_size(source) {
        return Ok(json!({"size": size("drive", source)?, "read_only": read_only, "bus": bus}));
    }
    if !Path::new(source).exists() {
        return Err(Failure::new(
            Kind::NotFound,
            format!("--drive {source:?} is neither a size, as 20G, nor a file that is here"),
        ));
    }
    Ok(json!({
        "path": absolute(Path::new(source))?,
        "read_only": read_only,
        "bus": bus,
        "format": format,
    }))
}

fn ports(specs: &[String]) -> Result<Vec<Value>, Failure> {
    let mut ports = Vec::new();
    for spec in specs {
        for (port, address, host) in published(spec)? {
            let (number, protocol) = port.split_once('/').unwrap_or((&port, "tcp"));
            let range = if host.is_empty() {
                None
            } else {
                Some(port_range("publish", &host)?)
            };
            ports.push(json!({
                "container_port": number.parse::<u16>().unwrap_or(0),
                "protocol": protocol,
                "host_ip": (!address.is_empty()).then_some(address),
                "host_ports": range,
            }));
        }
    }
    Ok(ports)
}

pub async fn create(client: &Client, args: CreateArgs) -> Result<ExitCode, Failure> {
    let mut keys = Vec::new();
    for file in &args.ssh_key {
        let text = std::fs::read_to_string(file)
            .map_err(|e| Failure::io(format!("cannot read {}", file.display()), &e))?;
        keys.extend(
            text.lines()
                .filter(|l| !l.trim().is_empty())
                .map(str::to_owned),
        );
    }
    let mut disk = 0;
    let mut disk_file = None;
    match args.disk.as_deref() {
        Some(text) if is_size(text) => disk = size("disk", text)?,
        Some(text) if Path::new(text).exists() => disk_file = Some(absolute(Path::new(text))?),
        Some(text) => {
            return Err(Failure::new(
                Kind::NotFound,
                format!("--disk {text:?} is neither a size, as 20G, nor a file that is here"),
            ));
        }
        None => {}
    }
    if let Some(text) = &args.disk_size {
        disk = size("disk-size", text)?;
    }
    let path = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
    let drives = args
        .drive
        .iter()
        .map(|spec| parse_drive(spec))
        .collect::<Result<Vec<_>, _>>()?;
    let image = args.image.clone().unwrap_or_default();
    let body = json!({
        "name": args.name,
        "image": image,
        "cpus": args.cpus,
        "memory": size("memory", &args.memory)?,
        "disk": disk,
        "disk_file": disk_file,
        "kernel": path(&args.kernel)?,
        "initrd": path(&args.initrd)?,
        "drives": drives,
        "cpu": args.cpu.name(),
        "network": args.network,
        "ports": ports(&args.publish)?,
        "on_crash": args.on_crash.name(),
        "on_disk_full": args.on_disk_full.name(),
        "restart": args.restart.name(),
        "overcommit": args.overcommit,
        "append": args.append,
        "password_hash": args.password_hash,
        "ssh_keys": keys,
        "autologin": args.autologin,
    });
    let made: Result<Value, Failure> = client.post(MACHINES, &[], &body).await;
    let answer = match made {
        Err(failure) if lacks_kernel(&failure, &image) => {
            bootstrap(client, &image, args.bootstrap, failure).await?;
            client.post(MACHINES, &[], &body).await?
        }
        other => other?,
    };
    if args.start {
        client.act(&path_of(&args.name, "start"), &[]).await?;
    }
    output::line(text(&answer, "/id"));
    Ok(ExitCode::SUCCESS)
}

/// Whether the image is what a bootstrap from Debian's archive would make.
fn lacks_kernel(failure: &Failure, image: &str) -> bool {
    let message = &failure.message;
    image.starts_with("debian:")
        && (message.contains("has no kernel") || message.contains("No such image"))
}

/// Makes the image with a kernel, where the user wants it.
async fn bootstrap(
    client: &Client,
    image: &str,
    wanted: bool,
    failure: Failure,
) -> Result<(), Failure> {
    let command = format!("berth image bootstrap {image} --kernel --tag {image}");
    if !wanted {
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return Err(failure.with_fix(format!("{command}, or say --bootstrap")));
        }
        eprint!("{}. Make it now with `{command}`? [Y/n] ", failure.message);
        let mut answer = String::new();
        std::io::stdin()
            .read_line(&mut answer)
            .map_err(|e| Failure::io("cannot read the answer", &e))?;
        if !matches!(answer.trim(), "" | "y" | "Y" | "yes") {
            return Err(failure.with_fix(command));
        }
    }
    let body = json!({"Name": image, "WithKernel": true, "Tags": [image]});
    let headers = [(CONTENT_TYPE.as_str(), "application/json".to_owned())];
    let response = client
        .send(
            Method::POST,
            "/berth/v1/images/bootstrap",
            &[],
            json_body(&body)?,
            &headers,
        )
        .await?;
    Progress::new(false).follow(response).await?;
    Ok(())
}

/// `NUMBER=SIZE`, as a place among the drives and bytes.
fn drive_size(spec: &str) -> Result<(usize, u64), Failure> {
    let parts = spec.split_once('=');
    match parts.map(|(number, text)| (number.parse::<usize>(), text)) {
        Some((Ok(number @ 1..), text)) => Ok((number - 1, size("drive", text)?)),
        _ => Err(Failure::invalid(format!(
            "--drive {spec:?} is not NUMBER=SIZE, as 1=20G for the first drive"
        ))),
    }
}

pub async fn update(client: &Client, args: UpdateArgs) -> Result<ExitCode, Failure> {
    let bytes = |option: &str, text: &Option<String>| {
        text.as_deref().map(|text| size(option, text)).transpose()
    };
    let drives = args
        .drive
        .iter()
        .map(|spec| drive_size(spec))
        .collect::<Result<std::collections::BTreeMap<usize, u64>, _>>()?;
    let change = json!({
        "cpus": args.cpus,
        "memory": bytes("memory", &args.memory)?,
        "disk": bytes("disk", &args.disk)?,
        "drives": (!drives.is_empty()).then_some(drives),
        "cpu": args.cpu.map(CpuChoice::name),
        "on_crash": args.on_crash.map(OnCrash::name),
        "on_disk_full": args.on_disk_full.map(OnDiskFull::name),
        "restart": args.restart.map(RestartPolicy::name),
        "overcommit": args.overcommit,
        "append": args.append,
    });
    if change
        .as_object()
        .is_some_and(|fields| fields.values().all(Value::is_null))
    {
        return Err(Failure::invalid("nothing to change was said; see --help"));
    }
    let headers = [(CONTENT_TYPE.as_str(), "application/json".to_owned())];
    for_each(&args.names.machines, async |name| {
        client
            .send(
                Method::POST,
                &path_of(name, "update"),
                &[],
                json_body(&change)?,
                &headers,
            )
            .await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_is_a_size_or_a_file() {
        let drive = parse_drive("20G").unwrap();
        assert_eq!(drive["size"], 20u64 << 30);
        let drive = parse_drive("/dev/null,ro,format=raw").unwrap();
        assert_eq!(drive["path"], "/dev/null");
        assert_eq!(parse_drive("/no/such/file").unwrap_err().code, 3);
        assert_eq!(drive["format"], "raw");
        assert_eq!(drive["read_only"], true);
        assert!(parse_drive("x,format=vdi").is_err());
        assert_eq!(parse_drive("20G,virtio").unwrap()["bus"], "virtio");
        assert_eq!(drive_size("2=1G").unwrap(), (1, 1 << 30));
        for wrong in ["1G", "0=1G", "x=1G", "1=x"] {
            assert!(drive_size(wrong).is_err(), "{wrong}");
        }
    }
}
