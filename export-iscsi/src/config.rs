//! Configuration files: tgt's targets.conf ([`targets_conf`], whose syntax is in [`general`]) and pss.toml
//! ([`pss_toml`]). Both give a [`Catalog`], and say file and line of what they cannot use.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::catalog::{Catalog, TargetEntry};

pub mod general;
pub mod pss_toml;
pub mod targets_conf;

/// Something about a configuration that a person should know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// File.
    pub file: PathBuf,
    /// Line, from 1; 0 for the whole file.
    pub line: usize,
    /// Whether the configuration can be used all the same.
    pub is_warning: bool,
    /// What.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem {
            file, line, text, ..
        } = self;
        match line {
            0 => write!(f, "{}: {text}", file.display()),
            _ => write!(f, "{}:{line}: {text}", file.display()),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<Problem>);

/// A configuration, and what a person should know about it.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// What to export.
    pub catalog: Catalog,
    /// Warnings.
    pub warnings: Vec<Problem>,
}

/// Reads a configuration: pss.toml if the name ends in `.toml`, targets.conf otherwise.
///
/// # Errors
/// [`ConfigError`] with all that is wrong.
pub fn load(file: &Path) -> Result<Loaded, ConfigError> {
    let loaded = match file.extension().is_some_and(|it| it == "toml") {
        true => pss_toml::load(file),
        false => targets_conf::load(file),
    };
    loaded.map(|mut loaded| {
        for target in loaded.catalog.targets.values() {
            warn_of_secrets(file, target, &mut loaded.warnings);
        }
        loaded
    })
}

/// What initiators in the field cannot use.
fn warn_of_secrets(file: &Path, target: &TargetEntry, warnings: &mut Vec<Problem>) {
    let outgoing = target.accounts.outgoing.iter();
    for account in target.accounts.incoming.iter().chain(outgoing) {
        if !account.secret.fits_windows() {
            warnings.push(Problem {
                file: file.to_owned(),
                line: 0,
                is_warning: true,
                text: format!(
                    "target {}: the secret of user {:?} does not have 12 to 16 bytes; Windows refuses it",
                    target.name, account.name
                ),
            });
        }
    }
}
