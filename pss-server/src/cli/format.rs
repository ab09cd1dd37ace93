//! `pssd format`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use pss_core::disk::files::{FileDisk, LOCK_FILE, check_is_in_one_place};
use pss_core::key::CellId;
use pss_core::storage::{Identity, IdentityFacts, StorageError};
use pss_core::types::{Ballot, GroupId, Incarnation, ServerId};
use pss_core::wire::client::ServerStatus;

use crate::config::{CellFiles, ServerConfig, Tuning};

use super::cell::Access;
use super::measure::{self, Measured, measure};
use super::{CellArgs, CliError, Exit, confirm, parse_id, say};

/// Servers that run answer within this time.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

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
    #[arg(long, value_name = "N", value_parser = parse_id)]
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
    /// Replace what a server has left in the directory; all its data there are lost
    #[arg(long)]
    force: bool,
    /// The server's disk is new or its data are lost: it learns everything from the others before it counts again
    #[arg(long)]
    replace: bool,
}

/// Why a directory was not formatted.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It holds something.
    #[error("{}: not empty (it holds '{found}'); name another directory, or add --force to remove what a PSS server has left there", path.display())]
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
    /// The files of a server cannot be made.
    #[error("{}: cannot format it: {source}", path.display())]
    Storage {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: StorageError,
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
    let life = life(args, &config)?;
    let measured = format_life(&config, args.force, life)
        .map_err(|error| CliError::new(Exit::Failed, error))?;
    let more = match life.rejoining {
        true => {
            " It learns everything from the others and counts when it has; 'pss status' shows how far it is."
        }
        false => "",
    };
    say(format!(
        "Formatted {} for server {} of cell {}. Start it with 'pssd start --id {}{}'.{more}",
        config.path.display(),
        config.id,
        config.cell,
        config.id,
        more_flags(args),
    ));
    say(measured.text());
    Ok(())
}

/// Formats the directory of a listed server. If it holds something, asks before it is replaced.
///
/// # Errors
/// Those of `pssd format`; also if the answer is not yes, or nobody can be asked.
pub(super) fn run_asking(
    servers: &Path,
    key: Option<&Path>,
    id: u8,
    yes: bool,
) -> Result<(), CliError> {
    let args = |force| FormatArgs {
        servers: servers.to_owned(),
        id,
        path: None,
        key: key.map(Path::to_owned),
        cell: None,
        force,
        replace: false,
    };
    let files = CellFiles::read(servers, key)?;
    let path = files.server(id, None, None, Tuning::default())?.path;
    let found = first_entry(&path).ok().flatten();
    if found.is_some() && !yes {
        confirm(&format!(
            "{} is not empty: all data of server {id} in it will be lost.",
            path.display()
        ))?;
    }
    run(&args(found.is_some()))
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

/// Marks the data directory of a server with cell and server, and makes it ready for a first start.
///
/// # Errors
/// [`FormatError`]; a directory that holds something is left as it is without `force`, and with it
/// loses only what a server has made.
pub fn format(config: &ServerConfig, force: bool) -> Result<(), FormatError> {
    let life = Life {
        incarnation: incarnation(0),
        rejoining: false,
    };
    format_life(config, force, life).map(drop)
}

fn format_life(config: &ServerConfig, force: bool, life: Life) -> Result<Measured, FormatError> {
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
    std::fs::create_dir_all(path).map_err(failed("make the directory"))?;
    // Said before it is called not empty, which a mount point in it makes it.
    check_is_in_one_place(path).map_err(failed("use the directory"))?;
    let found = first_entry(path).map_err(failed("list the directory"))?;
    if let Some(found) = found.filter(|_| !force) {
        return Err(FormatError::NotEmpty {
            path: path.clone(),
            found,
        });
    }
    let disk = FileDisk::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => FormatError::InUse { path: path.clone() },
        _ => failed("lock the directory")(error),
    })?;
    let measured = measure(&disk, path).map_err(failed("write to it"))?;
    Identity::create(Arc::new(disk), facts(config, life), force).map_err(|source| {
        FormatError::Storage {
            path: path.clone(),
            source,
        }
    })?;
    Ok(measured)
}

/// Which life of its server a data directory begins.
#[derive(Clone, Copy, Debug)]
struct Life {
    incarnation: Incarnation,
    /// It replaces another one.
    rejoining: bool,
}

/// Finds out from the other servers which life this is, and whether it may begin.
///
/// # Errors
/// The server runs; or the cell knows an earlier life, and nobody said that this one replaces it; or too few servers
/// are there to let it in.
fn life(args: &FormatArgs, config: &ServerConfig) -> Result<Life, CliError> {
    let failed = |message| Err(CliError::new(Exit::Failed, message));
    let id = config.id;
    let listed = config.servers.ids().into_iter();
    let core = listed.filter(|id| id.is_core()).count();
    let alone = format!(
        "a cell of {core} core {} does not work without server {id}, so nobody can let it in with a new disk. If a server \
         is left that holds the data, stop it, list it alone in its server.conf, start it, and export the volumes into a new cell \
         ('pss volume export')",
        if core == 1 { "server" } else { "servers" },
    );
    if args.replace && id.is_core() && core < 3 {
        return failed(format!("--replace: {alone}"));
    }
    let statuses = match others(args) {
        Ok(statuses) => statuses,
        // With an id of its own the cell is not the one that the list stands for.
        Err(error) if args.replace && args.cell.is_none() => return Err(error),
        Err(error) => {
            say(format!(
                "Nobody could be asked whether the cell exists: {error}"
            ));
            BTreeMap::new()
        }
    };
    if let Some(running) = statuses.get(&id) {
        let pid = running.pid;
        return failed(format!("server {id} runs (pid {pid}): stop it first"));
    }
    let lives = statuses
        .values()
        .map(|status| status.lives.get(usize::from(id.0)));
    let known = lives.flatten().copied().max().unwrap_or_default();
    let life = |rejoining| Life {
        incarnation: incarnation(known.max(earlier(config))),
        rejoining,
    };
    if !id.is_core() {
        // Learners have nothing to forget.
        return Ok(life(false));
    }
    let lists = statuses.values().filter_map(|it| it.members.as_ref());
    let members = lists.max_by_key(|it| (it.epoch, it.version));
    if args.replace && members.is_some_and(|it| it.get(id).is_none()) {
        say(format!(
            "Server {id} is none of the cell's now: 'pss server add {id} HOST PATH' takes it in, once it is started."
        ));
        return Ok(life(true));
    }
    if args.replace {
        enough(core, &statuses)?;
        return Ok(life(true));
    }
    if known > 0 {
        return failed(match core {
            0..3 => format!("the cell runs and knows server {id}: {alone}"),
            _ => format!(
                "the cell runs and knows server {id}, so it must not begin as if it had never been; if its disk is new or \
                 its data are lost, use 'pssd format --replace'"
            ),
        });
    }
    // Nobody has said yet which life of it counts, so it may have had one.
    let holds_data = core > 2 && statuses.values().any(|status| status.applied > 0);
    if holds_data {
        say(format!(
            "The cell exists already: server {id} learns everything from the others first."
        ));
    }
    Ok(life(holds_data))
}

/// Whether enough other core servers are there to let a server with a new disk in.
fn enough(core: usize, statuses: &BTreeMap<ServerId, ServerStatus>) -> Result<(), CliError> {
    let failed = |message| Err(CliError::new(Exit::Failed, message));
    let majority = core / 2 + 1;
    let others = statuses.values().filter(|status| status.server.is_core());
    if let Some(old) = others.clone().find(|status| status.lives.is_empty()) {
        let server = old.server;
        return failed(format!(
            "server {server} is of an older version, which cannot let a server with a new disk in: upgrade it first"
        ));
    }
    let learning = others.clone().find(|status| status.rejoining);
    let whole = others.filter(|status| !status.rejoining).count();
    if whole >= majority {
        return Ok(());
    }
    let why = match learning {
        Some(learning) => format!(
            "; server {} has a new disk itself and is still learning: wait until 'pss status' calls it current",
            learning.server
        ),
        None => ": start them first".to_owned(),
    };
    failed(format!(
        "--replace: {majority} other core servers with all data must be there to let this one in, and {whole} answer{}{why}",
        if whole == 1 { "s" } else { "" },
    ))
}

/// What the servers say that run.
fn others(args: &FormatArgs) -> Result<BTreeMap<ServerId, ServerStatus>, CliError> {
    let cell = CellArgs {
        servers: args.servers.clone(),
        key: args.key.clone(),
        timeout: ASK_TIMEOUT,
        json: false,
    };
    let answers = Access::connect(&cell)?.answers()?;
    Ok(answers.statuses)
}

/// Which life the directory has now, if it can be told.
fn earlier(config: &ServerConfig) -> u64 {
    if !config.path.is_dir() {
        return 0;
    }
    let Ok(disk) = FileDisk::open(&config.path) else {
        return 0;
    };
    let identity = Identity::open(Arc::new(disk));
    identity.map_or(0, |identity| identity.facts().incarnation.0)
}

/// A directory that is formatted again is a later life of the server, so its incarnation must be higher than any
/// before. Of those it may know nothing: hence the time.
pub(super) fn incarnation(known: u64) -> Incarnation {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since_1970.unwrap_or_default().as_millis() as u64;
    Incarnation(now.max(known + 1))
}

/// The identity of a new directory.
fn facts(config: &ServerConfig, life: Life) -> IdentityFacts {
    IdentityFacts {
        group: GroupId(0),
        cell: config.cell.0,
        server: config.id,
        incarnation: life.incarnation,
        promised: Ballot::default(),
        rejoining: life.rejoining,
        discards: false,
    }
}

/// A name in a directory that speaks against formatting it.
fn first_entry(path: &Path) -> io::Result<Option<String>> {
    // The first two are left by a format that was refused or cut short.
    let harmless = |name: &OsStr| {
        [LOCK_FILE, measure::FILE, "lost+found"]
            .iter()
            .any(|it| name == *it)
    };
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if !harmless(&name) {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
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
            source: None,
            is_truth: false,
        }
    }

    #[test]
    fn only_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        format(&config(path.clone()), false).unwrap();
        let error = format(&config(path.clone()), false);
        assert!(matches!(error, Err(FormatError::NotEmpty { .. })));
        std::fs::create_dir(path.join("data")).unwrap();
        std::fs::write(path.join("data/file"), "x").unwrap();
        std::fs::write(path.join("foreign"), "x").unwrap();
        format(&config(path.clone()), true).unwrap();
        assert!(!path.join("data/file").exists());
        assert!(path.join("foreign").exists());
    }

    #[test]
    fn the_identity_says_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let read = || {
            let disk = Arc::new(FileDisk::open(&path).unwrap());
            Identity::open(disk).unwrap().facts()
        };
        format(&config(path.clone()), false).unwrap();
        let first = read();
        assert_eq!((first.server, first.cell), (ServerId(0), [1; 16]));
        std::thread::sleep(std::time::Duration::from_millis(2));
        format(&config(path.clone()), true).unwrap();
        assert!(read().incarnation > first.incarnation);
    }

    #[test]
    fn not_under_a_running_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        format(&config(path.clone()), false).unwrap();
        let _running = FileDisk::open(&path).unwrap();
        let error = format(&config(path.clone()), true);
        assert!(matches!(error, Err(FormatError::InUse { .. })));
    }

    #[test]
    fn not_over_several_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pss");
        std::fs::create_dir(&path).unwrap();
        std::os::unix::fs::symlink("/proc", path.join("log")).unwrap();
        for force in [false, true] {
            let error = format(&config(path.clone()), force).unwrap_err();
            let text = error.to_string();
            let part = path.join("log").display().to_string();
            assert!(text.contains(&part), "{text}");
            assert!(
                text.contains("not on the same mounted file system"),
                "{text}"
            );
        }
        assert!(!path.join("identity.0").exists());
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
