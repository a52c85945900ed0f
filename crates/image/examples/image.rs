//! Drives the image room by hand: `image STORE bootstrap debian:bookworm | list | import FILE NAME | …`.

use std::path::Path;

use image::{Cancel, Event, Filter, ImportOptions, Reference, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let show = |event: Event| match (event.current, event.total) {
        (Some(current), Some(total)) => {
            eprintln!("{} {} {current}/{total}", event.id, event.status)
        }
        _ => eprintln!("{} {}", event.id, event.status),
    };
    let [store, verb, rest @ ..] = &words[..] else {
        return Err("image STORE VERB …".into());
    };
    let store = Store::open(Path::new(store))?;
    match (*verb, rest) {
        ("bootstrap", [name, packages @ ..]) => {
            let mut options = image::BootstrapOptions::named(name)?;
            options.with_kernel = packages.contains(&"--with-kernel");
            options.packages = packages
                .iter()
                .filter(|p| !p.starts_with("--"))
                .map(|p| (*p).to_owned())
                .collect();
            println!(
                "{}",
                image::bootstrap(&store, &options, &show, &Cancel::default())?
            );
        }
        ("list", _) => {
            for image in store.list(&Filter::default())? {
                println!(
                    "{} {:?} {} {}",
                    image.id.short(),
                    image.repo_tags,
                    image.size(),
                    image.created
                );
            }
        }
        ("import", [file, name]) => {
            let options = ImportOptions {
                reference: Some(Reference::parse(name)?),
                ..ImportOptions::default()
            };
            println!(
                "{}",
                store.import(std::fs::File::open(file)?, &options, &Cancel::default())?
            );
        }
        ("remove", [name]) => println!(
            "{:?}",
            store.remove(name, image::RemoveOptions::default(), &|_| Vec::new())?
        ),
        _ => return Err("unknown verb".into()),
    }
    Ok(())
}
