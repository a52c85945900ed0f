//! Release builds carry the OCI runtime a second time, as a small static program of its own, which `berth oci run`
//! executes (src/stage): containers are started by a process of a few hundred KiB instead of this whole binary.

use std::env;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(stage)");
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let target = env::var("TARGET").unwrap_or_default();
    if !["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"].contains(&target.as_str()) {
        return;
    }
    // Start-up is relocations before all else: packed, they are a fraction to read.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    match build(&target) {
        Ok(stage) => {
            println!("cargo:rustc-cfg=stage");
            if target.starts_with("x86_64") {
                // Entered before the dynamic linker (src/stage/entry.rs), which loads it where it is wanted.
                println!("cargo:rustc-link-arg-bins=-Wl,--no-dynamic-linker,-e,berth_entry");
            }
            println!("cargo:rustc-env=BERTH_STAGE={}", stage.display());
            println!("cargo:rustc-env=BERTH_STAGE_HASH={:016x}", hash(&stage));
        }
        Err(reason) => println!(
            "cargo:warning=the OCI runtime is not built as a program of its own ({reason}): `berth oci` works, with more memory"
        ),
    }
}

fn build(target: &str) -> Result<PathBuf, String> {
    let variable = |name: &str| env::var(name).map_err(|_| format!("{name} is not set"));
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let root = manifest
        .ancestors()
        .nth(2)
        .ok_or("the workspace is not where it should be")?;
    for path in ["crates/oci", "crates/base", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    // <target directory>/<profile>/build/berth-<hash>/out: all profiles share what is built for this.
    let out = PathBuf::from(variable("OUT_DIR")?);
    let output = out.ancestors().nth(4).unwrap_or(&out).join("stage");
    let done = Command::new(variable("CARGO")?)
        .current_dir(root)
        .args([
            "rustc",
            "--locked",
            "--profile",
            "stage",
            "--package",
            "oci",
        ])
        .args(["--bin", "berth-oci", "--target", target, "--target-dir"])
        .arg(&output)
        .args(["--", "-C", "link-arg=-Wl,-z,pack-relative-relocs"])
        // What the outer build is told (lints, wrappers, flags) is not meant for this one.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET_DIR")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        let last = said.lines().find(|line| line.starts_with("error"));
        return Err(last.unwrap_or("cargo failed").to_owned());
    }
    Ok(output.join(target).join("stage/berth-oci"))
}

fn hash(path: &Path) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(&std::fs::read(path).unwrap_or_default());
    hasher.finish()
}
