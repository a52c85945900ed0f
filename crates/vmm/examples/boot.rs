//! Boots a kernel as `berth machine boot` does:
//! `boot --kernel K [--initrd I] [--append "…"] [--disk F]… [--cpus N] [--memory SIZE] [--cpu auto|kvm|soft]
//!  [--model max|x86-64-v2|x86-64-v3] [--protocol linux64|pvh|bzimage] [--debug-exit] [--verbose]`

use std::process::ExitCode;

use vmm::boot::{BootConfig, Outcome, parse_model, run};

fn parse() -> Result<BootConfig, String> {
    let mut config = BootConfig::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{flag} wants a value"))
        };
        match flag.as_str() {
            "--kernel" => config.kernel = value()?.into(),
            "--initrd" => config.initrd = Some(value()?.into()),
            "--append" => config.append = value()?,
            "--disk" => config.disks.push(value()?.parse()?),
            "--tap" => config.taps.push(value()?),
            "--cpus" => {
                config.machine.cpus = value()?.parse().map_err(|_| "--cpus wants a number")?
            }
            "--memory" => {
                config.machine.memory =
                    base::units::parse_size(&value()?).map_err(|e| e.to_string())?
            }
            "--cpu" => config.machine.cpu = value()?.parse()?,
            "--model" => config.machine.model = parse_model(&value()?)?,
            "--protocol" => config.protocol = value()?.parse()?,
            "--debug-exit" => config.machine.debug_exit = true,
            "--verbose" => config.verbose = true,
            _ => return Err(format!("unknown flag {flag}")),
        }
    }
    Ok(config)
}

fn main() -> ExitCode {
    let config = match parse() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    match run(config) {
        Ok(Outcome::PowerOff) => ExitCode::SUCCESS,
        Ok(Outcome::DebugExit(code)) => ExitCode::from(code),
        Ok(outcome) => {
            eprintln!("the machine ended: {outcome:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
