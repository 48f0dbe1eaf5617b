//! The `uext` program; what it does goes by its name and its first argument.

fn main() {
    std::process::exit(uext_tools::cli::main(std::env::args_os()));
}
