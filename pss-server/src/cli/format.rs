//! `pssd format`.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use pss_core::key::CellId;

use crate::config::{CellFiles, ServerConfig, Tuning};

use super::{CliError, Exit, say};

/// Flags of `pssd format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// The cell's list of servers
    #[arg(
        long,
        value_name = "FILE",
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf"
    )]
    servers: PathBuf,
    /// Which of the listed servers this is
    #[arg(long, value_name = "N")]
    id: u8,
    /// The data directory, instead of the one in the list of servers
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, value_name = "FILE", env = "PSS_KEY")]
    key: Option<PathBuf>,
    /// The cell's id [default: derived from the key, or else from ids and hosts of the list]
    #[arg(long, value_name = "UUID")]
    cell: Option<CellId>,
    /// Remove everything that the directory holds
    #[arg(long)]
    force: bool,
}

/// Why a directory was not formatted.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It holds something.
    #[error("{}: not empty (it holds '{found}'); name another directory, or add --force to remove everything in it", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// A name in it.
        found: String,
    },
    /// It is no directory.
    #[error("{}: not a directory; name another path", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A server runs on it.
    #[error("{}: a server is running on it; stop that first", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The file system refuses.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

pub(super) fn run(args: &FormatArgs) -> Result<(), CliError> {
    let cell = CellFiles::read(&args.servers, args.key.as_deref())?;
    let path = args.path.clone();
    let config = cell.server(args.id, path, args.cell, Tuning::default())?;
    format(&config, args.force).map_err(|error| CliError::new(Exit::Failed, error))?;
    say(format!(
        "Formatted {} for server {} of cell {}. Start it with 'pssd start --id {}{}'.",
        config.path.display(),
        config.id,
        config.cell,
        config.id,
        more_flags(args),
    ));
    Ok(())
}

/// The flags that `pssd start` needs as well.
fn more_flags(args: &FormatArgs) -> String {
    let mut flags = String::new();
    let mut add = |flag: &str, value: String| flags.push_str(&format!(" --{flag} {value}"));
    if args.servers != Path::new("/etc/pss/server.conf") {
        add("servers", args.servers.display().to_string());
    }
    if let Some(path) = &args.path {
        add("path", path.display().to_string());
    }
    if let Some(key) = &args.key {
        add("key", key.display().to_string());
    }
    if let Some(cell) = args.cell {
        add("cell", cell.to_string());
    }
    flags
}

/// Makes the data directory of a server: empty, and marked with cell and server.
///
/// # Errors
/// [`FormatError`]; a directory that holds something is left as it is without `force`.
pub fn format(config: &ServerConfig, force: bool) -> Result<(), FormatError> {
    let path = &config.path;
    let failed = |action| {
        move |source| FormatError::Io {
            path: path.clone(),
            action,
            source,
        }
    };
    if path.exists() && !path.is_dir() {
        return Err(FormatError::NotADirectory { path: path.clone() });
    }
    std::fs::create_dir_all(path).map_err(failed("create the directory"))?;
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed("list the directory"))? {
        entries.push(entry.map_err(failed("list the directory"))?);
    }
    // A file system's own directory, when the data directory is its root.
    entries.retain(|entry| entry.file_name() != "lost+found");
    if let Some(first) = entries.first().filter(|_| !force) {
        return Err(FormatError::NotEmpty {
            path: path.clone(),
            found: first.file_name().to_string_lossy().into_owned(),
        });
    }
    for entry in entries {
        let kind = entry.file_type().map_err(failed("list the directory"))?;
        let removed = match kind.is_dir() {
            true => std::fs::remove_dir_all(entry.path()),
            false => std::fs::remove_file(entry.path()),
        };
        removed.map_err(failed("remove what it holds"))?;
    }
    create_identity(config).map_err(failed("write the identity"))
}

/// Writes the identity of a new server.
fn create_identity(config: &ServerConfig) -> io::Result<()> {
    let _ = config;
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests {
    use pss_core::servers::Servers;
    use pss_core::types::ServerId;

    use super::*;

    fn config(path: PathBuf) -> ServerConfig {
        let localhost = std::net::IpAddr::from([127, 0, 0, 1]);
        ServerConfig {
            id: ServerId(0),
            servers: Servers::new([(ServerId(0), localhost)]),
            path,
            key: None,
            cell: CellId([1; 16]),
            tuning: Tuning::default(),
        }
    }

    #[test]
    fn only_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        format(&config(path.clone()), false).unwrap();
        let error = format(&config(path.clone()), false);
        assert!(matches!(error, Err(FormatError::NotEmpty { .. })));
        std::fs::create_dir(path.join("sub")).unwrap();
        std::fs::write(path.join("sub/file"), "x").unwrap();
        format(&config(path.clone()), true).unwrap();
        assert!(!path.join("sub").exists());
    }

    #[test]
    fn not_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let error = format(&config(path.clone()), true);
        assert!(matches!(error, Err(FormatError::NotADirectory { .. })));
        assert_eq!(std::fs::read(path).unwrap(), b"precious");
    }
}
