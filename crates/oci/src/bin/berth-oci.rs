//! The runtime alone, for this crate's own tests and measurements. What users run is `berth oci`.

fn main() -> std::process::ExitCode {
    oci::cli::main(std::env::args_os())
}
