//! The small languages of single options: ports, mounts, devices, limits, as docker reads them.

use std::path::PathBuf;

use base::units::{parse_duration, parse_size};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

pub(super) fn wrong(option: &str, value: &str, wanted: &str) -> Failure {
    Failure::invalid(format!("--{option} {value:?}: {wanted} is wanted"))
}

pub(super) fn size(option: &str, value: &Option<String>) -> Result<Option<i64>, Failure> {
    value
        .as_deref()
        .map(|text| {
            if text == "-1" {
                return Ok(-1);
            }
            parse_size(text)
                .map(|n| n as i64)
                .map_err(|e| Failure::invalid(format!("--{option}: {e}")))
        })
        .transpose()
}

pub(super) fn pairs(option: &str, values: &[String]) -> Result<Map<String, Value>, Failure> {
    values
        .iter()
        .map(|value| {
            let (key, value) = value.split_once('=').unwrap_or((value, ""));
            if key.is_empty() {
                Err(wrong(option, value, "KEY=VALUE"))
            } else {
                Ok((key.to_owned(), json!(value)))
            }
        })
        .collect()
}

/// The lines of an environment or label file: no comments, no blanks.
pub(super) fn lines_of(path: &PathBuf) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::io(format!("cannot read {}", path.display()), &e))?;
    Ok(text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

/// `NAME=VALUE`; a bare `NAME` takes this process's own value and vanishes where there is none.
pub fn environment(files: &[PathBuf], variables: &[String]) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for file in files {
        all.extend(lines_of(file)?);
    }
    all.extend(variables.iter().cloned());
    let mut out = Vec::new();
    for variable in all {
        if variable.starts_with('=') || variable.is_empty() {
            return Err(wrong("env", &variable, "NAME=VALUE"));
        }
        if variable.contains('=') {
            out.push(variable);
        } else if let Ok(value) = std::env::var(&variable) {
            out.push(format!("{variable}={value}"));
        }
    }
    Ok(out)
}

/// One published port as docker writes it: container port with protocol, host address, host port.
pub type Published = (String, String, String);

pub fn port_range(option: &str, text: &str) -> Result<(u16, u16), Failure> {
    let bad = || wrong(option, text, "a port or a range, as in 8080 or 8000-8010,");
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (
        low.parse::<u16>().map_err(|_| bad())?,
        high.parse::<u16>().map_err(|_| bad())?,
    );
    if low == 0 || low > high {
        Err(bad())
    } else {
        Ok((low, high))
    }
}

/// `[[ADDRESS:]HOST:]PORT[/PROTOCOL]`, with ranges, as docker reads it.
pub fn published(spec: &str) -> Result<Vec<Published>, Failure> {
    let (rest, protocol) = spec.split_once('/').unwrap_or((spec, "tcp"));
    if !["tcp", "udp", "sctp"].contains(&protocol) {
        return Err(wrong("publish", spec, "protocol tcp, udp or sctp"));
    }
    let (front, container) = rest.rsplit_once(':').unwrap_or(("", rest));
    let (address, host) = match front.rsplit_once(':') {
        _ if front.starts_with('[') && front.ends_with(']') => (front, ""),
        Some((address, host)) => (address, host),
        None if front.contains('.') => (front, ""),
        None => ("", front),
    };
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong("publish", spec, "an IP address before the ports"));
    }
    let (low, high) = port_range("publish", container)?;
    let hosts = if host.is_empty() {
        None
    } else {
        Some(port_range("publish", host)?)
    };
    if let Some((first, last)) = hosts
        && last - first != high - low
    {
        if low == high {
            return Ok(vec![(
                format!("{low}/{protocol}"),
                address.to_owned(),
                host.to_owned(),
            )]);
        }
        return Err(wrong(
            "publish",
            spec,
            "as many host ports as container ports",
        ));
    }
    Ok((low..=high)
        .map(|port| {
            let host = hosts.map_or(String::new(), |(first, _)| {
                (first + (port - low)).to_string()
            });
            (format!("{port}/{protocol}"), address.to_owned(), host)
        })
        .collect())
}

/// `type=…,source=…,target=…`, comma-separated, as docker reads it.
pub(super) fn mount(spec: &str) -> Result<Value, Failure> {
    let mut mount = json!({"Type": "volume"});
    for field in spec.split(',') {
        let (key, value) = field
            .split_once('=')
            .map_or((field, None), |(k, v)| (k, Some(v)));
        let flag = || match value {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(wrong("mount", other, "true or false")),
        };
        let need = || value.ok_or_else(|| wrong("mount", field, "KEY=VALUE"));
        match key {
            "type" => mount["Type"] = json!(need()?),
            "source" | "src" => {
                let text = need()?;
                mount["Source"] = json!(text);
            }
            "target" | "dst" | "destination" => mount["Target"] = json!(need()?),
            "readonly" | "ro" => mount["ReadOnly"] = json!(flag()?),
            "consistency" => mount["Consistency"] = json!(need()?),
            "bind-propagation" => mount["BindOptions"]["Propagation"] = json!(need()?),
            "bind-nonrecursive" => mount["BindOptions"]["NonRecursive"] = json!(flag()?),
            "bind-create-src" => mount["BindOptions"]["CreateMountpoint"] = json!(flag()?),
            "volume-nocopy" => mount["VolumeOptions"]["NoCopy"] = json!(flag()?),
            "volume-driver" => mount["VolumeOptions"]["DriverConfig"]["Name"] = json!(need()?),
            "volume-subpath" => mount["VolumeOptions"]["Subpath"] = json!(need()?),
            "image-subpath" => mount["ImageOptions"]["Subpath"] = json!(need()?),
            "tmpfs-size" => {
                let bytes =
                    parse_size(need()?).map_err(|e| Failure::invalid(format!("--mount: {e}")))?;
                mount["TmpfsOptions"]["SizeBytes"] = json!(bytes);
            }
            "tmpfs-mode" => {
                let mode = u32::from_str_radix(need()?, 8)
                    .map_err(|_| wrong("mount", field, "an octal mode"))?;
                mount["TmpfsOptions"]["Mode"] = json!(mode);
            }
            _ => {
                return Err(wrong(
                    "mount",
                    field,
                    "type, source, target, readonly, bind-…, volume-…, image-… or tmpfs-…",
                ));
            }
        }
    }
    if mount["Target"].is_null() {
        return Err(wrong("mount", spec, "target=PATH"));
    }
    Ok(mount)
}

/// Makes a relative bind source absolute: the daemon has another working folder.
pub(super) fn bind(spec: &str) -> Result<String, Failure> {
    if spec.starts_with('.') || spec.starts_with('~') {
        let (source, rest) = spec
            .split_once(':')
            .ok_or_else(|| wrong("volume", spec, "SOURCE:TARGET"))?;
        let absolute = std::path::absolute(source)
            .map_err(|e| Failure::io(format!("cannot resolve {source}"), &e))?;
        return Ok(format!("{}:{rest}", absolute.display()));
    }
    Ok(spec.to_owned())
}

pub(super) fn device(spec: &str) -> Value {
    let mut parts = spec.splitn(3, ':');
    let host = parts.next().unwrap_or_default();
    let (mut inside, mut access) = (host, "rwm");
    if let Some(second) = parts.next() {
        if second.starts_with('/') {
            inside = second;
            access = parts.next().unwrap_or("rwm");
        } else {
            access = second;
        }
    }
    json!({"PathOnHost": host, "PathInContainer": inside, "CgroupPermissions": access})
}

pub(super) fn rate(option: &str, spec: &str, bytes: bool) -> Result<Value, Failure> {
    let bad = || wrong(option, spec, "DEVICE:RATE");
    let (path, rate) = spec.rsplit_once(':').ok_or_else(bad)?;
    let rate = if bytes {
        parse_size(rate).map_err(|_| bad())?
    } else {
        rate.parse().map_err(|_| bad())?
    };
    Ok(json!({"Path": path, "Rate": rate}))
}

pub(super) fn ulimit(spec: &str) -> Result<Value, Failure> {
    let bad = || wrong("ulimit", spec, "NAME=SOFT[:HARD]");
    let (name, limits) = spec.split_once('=').ok_or_else(bad)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| {
        if text == "unlimited" {
            Ok(-1)
        } else {
            text.parse::<i64>().map_err(|_| bad())
        }
    };
    Ok(json!({"Name": name, "Soft": number(soft)?, "Hard": number(hard)?}))
}

pub(super) fn nanoseconds(option: &str, value: &Option<String>) -> Result<Option<u64>, Failure> {
    value
        .as_deref()
        .map(|text| {
            parse_duration(text)
                .map(|d| d.as_nanos() as u64)
                .map_err(|e| Failure::invalid(format!("--{option}: {e}")))
        })
        .transpose()
}

pub(super) fn restart_policy(text: &str) -> Result<Value, Failure> {
    let (name, tries) = text.split_once(':').unwrap_or((text, "0"));
    let tries: i64 = tries
        .parse()
        .map_err(|_| wrong("restart", text, "on-failure:TRIES"))?;
    if !["", "no", "always", "unless-stopped", "on-failure"].contains(&name)
        || (tries != 0 && name != "on-failure")
    {
        return Err(wrong(
            "restart",
            text,
            "no, always, unless-stopped or on-failure[:TRIES]",
        ));
    }
    Ok(json!({"Name": name, "MaximumRetryCount": tries}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(p: &str, a: &str, h: &str) -> Published {
        (p.into(), a.into(), h.into())
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        assert_eq!(published("80").unwrap(), [port("80/tcp", "", "")]);
        assert_eq!(published("8080:80").unwrap(), [port("80/tcp", "", "8080")]);
        assert_eq!(
            published("127.0.0.1:8080:80/udp").unwrap(),
            [port("80/udp", "127.0.0.1", "8080")]
        );
        assert_eq!(
            published("127.0.0.1::80").unwrap(),
            [port("80/tcp", "127.0.0.1", "")]
        );
        assert_eq!(
            published("[::1]:8080:80").unwrap(),
            [port("80/tcp", "::1", "8080")]
        );
        assert_eq!(
            published("7000-7001:80-81").unwrap(),
            [port("80/tcp", "", "7000"), port("81/tcp", "", "7001")]
        );
        assert_eq!(
            published("7000-7005:80").unwrap(),
            [port("80/tcp", "", "7000-7005")]
        );
        for bad in ["", "x", "80/icmp", "70000:80", "1-3:5-9", "host:1:2"] {
            assert!(published(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mount_needs_a_target() {
        assert!(mount("type=bind,source=/a").is_err());
        let read_only = mount("type=bind,src=/a,dst=/b,ro").unwrap();
        assert_eq!(read_only["ReadOnly"], true);
        assert!(mount("type=bind,dst=/b,colour=red").is_err());
    }

    #[test]
    fn a_device_has_three_parts() {
        assert_eq!(device("/dev/fuse:rw")["CgroupPermissions"], "rw");
        assert_eq!(device("/dev/fuse:/dev/x:r")["PathInContainer"], "/dev/x");
    }

    proptest! {
        #[test]
        fn no_option_text_panics(text in ".{0,40}") {
            let _ = published(&text);
            let _ = mount(&text);
            let _ = ulimit(&text);
            let _ = rate("x", &text, true);
            let _ = restart_policy(&text);
            let _ = device(&text);
        }
    }
}
