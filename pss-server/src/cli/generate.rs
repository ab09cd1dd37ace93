//! `pss completions` and `pss man`: made from the same definitions as the programs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{CliError, Exit, print, say};
use crate::render::printable;

#[derive(Args, Debug)]
pub(super) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
    /// For which program [default: pss]
    #[arg(value_name = "PROGRAM", conflicts_with = "out")]
    program: Option<String>,
    /// Write those of all programs into this directory, each in a file named as the shell wants it
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct ManArgs {
    /// For which program [default: pss]
    #[arg(value_name = "PROGRAM", conflicts_with = "out")]
    program: Option<String>,
    /// Write those of all programs and their verbs into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// All programs, with the section of the manual that each belongs to.
fn programs() -> Vec<(Command, &'static str)> {
    vec![
        (super::Pss::command(), "1"),
        (super::Pssd::command(), "8"),
        (super::PssUp::command(), "1"),
        (export_nbd::args::Args::command(), "8"),
        (export_iscsi::args::Args::command(), "8"),
        (pss_fuse::cli::command(), "1"),
    ]
}

fn program(name: Option<&str>) -> Result<(Command, &'static str), CliError> {
    let name = name.unwrap_or("pss");
    let mut all = programs();
    let found = all
        .iter()
        .position(|(command, _)| command.get_name() == name);
    match found {
        Some(at) => Ok(all.swap_remove(at)),
        None => {
            let names: Vec<&str> = all.iter().map(|(command, _)| command.get_name()).collect();
            Err(CliError::usage(format!(
                "there is no program {}; use one of {}",
                printable(name),
                names.join(", ")
            )))
        }
    }
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<(), CliError> {
    let Some(dir) = &args.out else {
        let (mut command, _) = program(args.program.as_deref())?;
        let name = command.get_name().to_owned();
        let mut text = Vec::new();
        clap_complete::generate(args.shell, &mut command, name, &mut text);
        return print(&String::from_utf8_lossy(&text));
    };
    make_directory(dir)?;
    for (mut command, _) in programs() {
        let name = command.get_name().to_owned();
        clap_complete::generate_to(args.shell, &mut command, name, dir)
            .map_err(|error| failed(dir, &error))?;
    }
    say(format!("written to {}", dir.display()));
    Ok(())
}

pub(super) fn man(args: &ManArgs) -> Result<(), CliError> {
    let Some(dir) = &args.out else {
        let (command, section) = program(args.program.as_deref())?;
        return print(&String::from_utf8_lossy(&page(command, section)?));
    };
    make_directory(dir)?;
    for (mut command, section) in programs() {
        command.build();
        write_pages(dir, &command, section)?;
    }
    say(format!("written to {}", dir.display()));
    Ok(())
}

/// Writes the page of a command, such as `pss-volume.1`, and those of its verbs.
fn write_pages(dir: &Path, command: &Command, section: &str) -> Result<(), CliError> {
    let verbs = command.get_subcommands();
    for verb in verbs.filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        write_pages(dir, verb, section)?;
    }
    let name = command.get_display_name().unwrap_or(command.get_name());
    let file = dir.join(format!("{name}.{section}"));
    fs::write(&file, page(command.clone(), section)?).map_err(|error| failed(&file, &error))
}

fn page(command: Command, section: &str) -> Result<Vec<u8>, CliError> {
    let mut text = Vec::new();
    let man = Man::new(command).section(section).manual("PSS");
    man.render(&mut text)
        .map_err(|error| CliError::new(Exit::Failed, error))?;
    Ok(text)
}

fn make_directory(dir: &Path) -> Result<(), CliError> {
    fs::create_dir_all(dir).map_err(|error| failed(dir, &error))
}

fn failed(path: &Path, error: &io::Error) -> CliError {
    CliError::new(
        Exit::Failed,
        format!("cannot write {}: {error}", path.display()),
    )
}
