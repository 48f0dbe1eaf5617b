//! The `uext` program: each tool is a subcommand, or the program by another name.

use std::ffi::OsString;
use std::path::Path;
use std::process::exit;

fn main() {
    let args: Vec<OsString> = std::env::args_os().collect();
    let called_as = args.first().and_then(|name| Path::new(name).file_name());
    let called_as = called_as.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let (command, args) = match called_as.as_str() {
        "fsck.uext" => ("fsck".to_owned(), args),
        _ => match args.split_first() {
            Some((_, rest)) if !rest.is_empty() => {
                (rest[0].to_string_lossy().into_owned(), rest.to_vec())
            }
            _ => (String::new(), Vec::new()),
        },
    };
    match command.as_str() {
        "fsck" => exit(uext_tools::fsck::main(args)),
        "" => usage("no command"),
        other => usage(&format!("unknown command {other:?}")),
    }
}

fn usage(problem: &str) -> ! {
    eprintln!("uext: {problem}; the commands are: fsck");
    exit(16)
}
