//! `pss config`: is a configuration file right, before anything uses it?

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use export_iscsi::config;
use serde_json::json;

use super::{CellArgs, CliError, Exit, print, print_json};
use crate::config::CellFiles;

#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Says what is wrong with a server.conf, a targets.conf or a pss.toml, or what to know about it
    Check {
        /// The file; which kind it is follows from its name and content
        file: PathBuf,
    },
}

pub(super) fn run(args: &CellArgs, verb: ConfigVerb) -> Result<(), CliError> {
    match verb {
        ConfigVerb::Check { file } => check(args, &file),
    }
}

/// What a file was found to be.
struct Checked {
    kind: &'static str,
    /// What it says, in a sentence.
    summary: String,
    /// What a person should know about it.
    warnings: Vec<String>,
}

fn check(args: &CellArgs, file: &Path) -> Result<(), CliError> {
    let checked = match is_of_targets(file) {
        true => check_targets(file)?,
        false => check_servers(args, file)?,
    };
    if args.json {
        return print_json(&json!({
            "schema": "pss.config.check/1",
            "file": file.display().to_string(),
            "kind": checked.kind,
            "summary": checked.summary,
            "warnings": checked.warnings,
        }));
    }
    let mut text = format!("{}: {}\n", file.display(), checked.summary);
    for warning in checked.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    print(&text)
}

/// Whether a file is about iSCSI targets. One that cannot be read is not: whoever reads it next says why.
fn is_of_targets(file: &Path) -> bool {
    if file.extension().is_some_and(|end| end == "toml") {
        return true;
    }
    let is_named = file.file_name().is_some_and(|name| name == "targets.conf");
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut words = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    is_named || words.any(|word| word == "<target" || word == "default-driver")
}

fn check_targets(file: &Path) -> Result<Checked, CliError> {
    let loaded =
        config::load(file).map_err(|error| CliError::new(Exit::Usage, error.to_string()))?;
    Ok(Checked {
        kind: "iscsi",
        summary: loaded.catalog.summary(),
        warnings: loaded.warnings.iter().map(ToString::to_string).collect(),
    })
}

fn check_servers(args: &CellArgs, file: &Path) -> Result<Checked, CliError> {
    let files = CellFiles::read(file, args.key.as_deref())?;
    let core = files.servers.core().len();
    let others = files.servers.ids().len() - core;
    let may_fail = core - files.servers.majority();
    let mut summary = match core {
        1 => "1 server decides".to_owned(),
        core => format!("{core} servers decide"),
    };
    if others > 0 {
        let hold = if others == 1 { "holds" } else { "hold" };
        summary.push_str(&format!(", {others} more {hold} copies"));
    }
    summary.push_str(&match may_fail {
        0 => "; none may fail".to_owned(),
        1 => "; any 1 may fail".to_owned(),
        more => format!("; any {more} may fail"),
    });
    let mut warnings = Vec::new();
    if core.is_multiple_of(2) {
        warnings.push(format!(
            "{core} servers decide: no more of them may fail than of {}, and each is one more that can",
            core - 1
        ));
    }
    let mut hosts: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for (id, address) in files.servers.iter() {
        hosts.entry(address).or_default().push(id.to_string());
    }
    for (address, ids) in hosts {
        if ids.len() > 1 {
            warnings.push(format!(
                "servers {} are on one machine, {address}: they fail together",
                ids.join(" and ")
            ));
        }
    }
    if files.key.is_none() {
        warnings.push(
            "the cell has no key: its servers can be on loopback addresses only, and let anybody on this machine in; make one with 'pss key new'"
                .to_owned(),
        );
    }
    Ok(Checked {
        kind: "servers",
        summary,
        warnings,
    })
}
