//! `pss key`.

use std::path::PathBuf;

use clap::Subcommand;
use pss_core::key::{CellKey, KEY_FILE_DEFAULT, KeyError};
use serde_json::json;

use super::{CellArgs, CliError, Exit, print, print_json, say};

#[derive(Debug, Subcommand)]
pub(super) enum KeyVerb {
    /// Makes a new random cell key; an existing file is never replaced
    New {
        /// Where to write it
        #[arg(default_value = KEY_FILE_DEFAULT)]
        file: PathBuf,
    },
}

pub(super) fn run(args: &CellArgs, verb: KeyVerb) -> Result<(), CliError> {
    let KeyVerb::New { file } = verb;
    CellKey::generate()
        .and_then(|key| key.write_new(&file))
        .map_err(|error| {
            let exit = match error {
                KeyError::Exists { .. } => Exit::Busy,
                _ => Exit::Failed,
            };
            CliError::new(exit, error)
        })?;
    let path = file.display().to_string();
    if args.json {
        return print_json(&json!({ "schema": "pss.key.new/1", "file": path }));
    }
    say("A new cell key; copy the file to every server and gateway of the cell:");
    print(&format!("{path}\n"))
}
