//! `pss-fuse mount` and `umount`, and `mount.fuse.pss` for /etc/fstab.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::{Args, Parser};
use pss_gateway::logging::{LogLevel, LogTarget};
use pss_gateway::program::{self, parse_time};
use sd_notify::NotifyState;
use tracing::{info, warn};

use super::{CellArgs, CliError, Exit, say, start_log};
use crate::fuse::{Fuse, Look};
use crate::mount::{self, END_LIMIT, MountError};

/// Set for the process that stays in the background.
const BACKGROUND_VARIABLE: &str = "PSS_FUSE_BACKGROUND";
/// What it says when the mount works.
const READY: &str = "mounted";
/// It has so much longer than the cell may take to answer.
const READY_MARGIN: Duration = Duration::from_secs(30);
/// A mount in use is tried again after this.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

#[derive(Args, Clone, Debug)]
pub(super) struct MountArgs {
    /// Where; must exist
    directory: PathBuf,
    /// Stay in the foreground, and log to standard error
    #[arg(long, short)]
    foreground: bool,
    /// Write the process id to this file when the mount works
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Where to log [default: syslog in the background, else stderr]
    #[arg(long)]
    log: Option<LogTarget>,
    /// Let other users see it, not just the one who mounts
    #[arg(long)]
    allow_other: bool,
    /// Owner of all files [default: who mounts]
    #[arg(long, value_name = "ID", value_parser = parse_owner)]
    uid: Option<u32>,
    /// Group of all files [default: that of who mounts]
    #[arg(long, value_name = "ID", value_parser = parse_owner)]
    gid: Option<u32>,
    /// Permissions of files, octal
    #[arg(long, value_name = "MODE", default_value = "0440", value_parser = parse_mode)]
    file_mode: u16,
    /// Permissions of directories, octal
    #[arg(long, value_name = "MODE", default_value = "0550", value_parser = parse_mode)]
    dir_mode: u16,
    /// For so long names and attributes may be as they were; data never are. 0s: ask each time
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_ttl)]
    metadata_ttl: Duration,
    /// List the directory of whole volumes, .volumes, too; it is there in any case
    #[arg(long)]
    show_volumes: bool,
}

#[derive(Args, Clone, Debug)]
pub(super) struct UmountArgs {
    /// Where it is mounted
    directory: PathBuf,
    /// If it is in use, wait until it is not
    #[arg(long)]
    wait: bool,
    /// If it is in use, take it away from new users; open files stay open as long as its process runs
    #[arg(long, conflicts_with = "wait")]
    lazy: bool,
}

/// What mount(8) calls to mount a file system of type fuse.pss
#[derive(Debug, Parser)]
#[command(name = "mount.fuse.pss", version, after_help = HELPER_HELP)]
struct Helper {
    /// The cell: pss for that of /etc/pss/server.conf, or pss:FILE for that of another server.conf
    source: String,
    /// Where
    directory: PathBuf,
    /// Options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Type of the file system
    #[arg(short = 't', value_name = "TYPE", hide = true)]
    fs_type: Option<String>,
    /// Do not write /etc/mtab; it is never written
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Ignore options that are not known
    #[arg(short = 's')]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    fake: bool,
    /// Say what is done
    #[arg(short = 'v')]
    verbose: bool,
}

const HELPER_HELP: &str = "\
Options: the long options of 'pss-fuse mount' with '_' or '-', such as allow_other, uid=1000, file_mode=0444,
timeout=10s, stale, show_volumes, key=FILE. A line of /etc/fstab:
  pss  /mnt/pss  fuse.pss  ro,_netdev,nofail,allow_other  0 0";

pub(super) fn run(cell: &CellArgs, args: &MountArgs) -> Result<(), CliError> {
    mount::check_place(&args.directory)?;
    let is_background = std::env::var_os(BACKGROUND_VARIABLE).is_some();
    if !args.foreground && !is_background {
        return run_in_background(cell.timeout);
    }
    let mut args = args.clone();
    let mut cell = cell.clone();
    if is_background {
        // Relative paths are those of the caller.
        for path in [&mut args.directory, &mut cell.servers]
            .into_iter()
            .chain(args.pid_file.as_mut())
            .chain(cell.key.as_mut())
        {
            *path = std::path::absolute(&*path)?;
        }
        std::env::set_current_dir("/")?;
    }
    let target = match args.log {
        Some(target) => target,
        None if is_background => LogTarget::Syslog,
        None => LogTarget::Stderr,
    };
    match start_log(target, cell.log_level.unwrap_or(LogLevel::Info)) {
        // A machine without syslog still wants its mount.
        Err(error) if args.log.is_none() && is_background => {
            say(format!("{error}; nothing will be logged in the background"));
        }
        result => result?,
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    let result = runtime.block_on(serve(&cell, &args, handle, is_background));
    // Requests that are under way belong to a mount that is gone.
    runtime.shutdown_background();
    result
}

async fn serve(
    cell: &CellArgs,
    args: &MountArgs,
    runtime: tokio::runtime::Handle,
    is_background: bool,
) -> Result<(), CliError> {
    let mut stop = std::pin::pin!(program::stop_signal()?);
    let namespace = cell.open(args.show_volumes)?;
    // Found out before anything is mounted.
    let volumes = tokio::select! {
        () = &mut stop => {
            return Err(CliError::new(Exit::Failed, "stopped before it was mounted"));
        }
        volumes = namespace.volumes() => volumes,
    };
    volumes.map_err(|error| CliError::at("/", &error))?;
    let look = Look {
        uid: args
            .uid
            .unwrap_or_else(|| rustix::process::geteuid().as_raw()),
        gid: args
            .gid
            .unwrap_or_else(|| rustix::process::getegid().as_raw()),
        file_mode: args.file_mode,
        directory_mode: args.dir_mode,
        metadata_ttl: args.metadata_ttl,
    };
    let fuse = Fuse::new(namespace, look, runtime);
    let mut mounted = mount::mount(&args.directory, fuse, "pss", args.allow_other)?;
    let pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    program::tell_manager(NotifyState::Ready);
    info!("mounted on {}", args.directory.display());
    if is_background {
        leave_caller()?;
    }
    let ended = tokio::select! {
        () = &mut stop => None,
        result = mounted.ended() => Some(result),
    };
    drop(pid_file);
    match ended {
        None => {
            // Also while files are open: who stops this process wants no dead mount.
            mounted.unmount()?;
            let _ = tokio::time::timeout(END_LIMIT, mounted.ended()).await;
        }
        Some(Ok(())) => info!("unmounted by somebody else"),
        Some(Err(error)) => warn!("the kernel has ended the session: {error}"),
    }
    Ok(())
}

/// Tells the caller that the mount works, and lets go of its terminal.
fn leave_caller() -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    // A caller that is gone, by Ctrl-C, does not want it any more.
    writeln!(out, "{READY}").and_then(|()| out.flush())?;
    // From now on Ctrl-C is meant for others.
    let _ = rustix::process::setsid();
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).map_err(io::Error::from)?;
    rustix::stdio::dup2_stdout(&null).map_err(io::Error::from)?;
    rustix::stdio::dup2_stderr(&null).map_err(io::Error::from)?;
    Ok(())
}

/// Starts this program again, and returns when it has mounted or failed.
fn run_in_background(cell_timeout: Duration) -> Result<(), CliError> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let mut child = Command::new(std::env::current_exe()?)
        .arg0(name)
        .args(arguments)
        .env(BACKGROUND_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let limit = cell_timeout + READY_MARGIN;
    let is_ready = match await_ready(&mut child).recv_timeout(limit) {
        Ok(is_ready) => is_ready,
        Err(_) => {
            let _ = child.kill();
            let _ = child.wait();
            let message = format!("the mount did not come about within {limit:?}");
            return Err(CliError::new(Exit::Timeout, message));
        }
    };
    if is_ready {
        return Ok(());
    }
    // It has said why.
    let code = child.wait()?.code().unwrap_or(Exit::Failed as i32);
    std::process::exit(code);
}

/// Gives whether the process says that it is ready, or ends without.
fn await_ready(child: &mut Child) -> mpsc::Receiver<bool> {
    let (sender, receiver) = mpsc::channel();
    let out = child.stdout.take().expect("stdout is piped");
    thread::spawn(move || {
        let mut lines = BufReader::new(out).lines();
        let is_ready = matches!(lines.next(), Some(Ok(line)) if line == READY);
        let _ = sender.send(is_ready);
    });
    receiver
}

/// A file with the process id, as long as it is of use.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> Result<PidFile, CliError> {
        let written = std::fs::write(path, format!("{}\n", std::process::id()));
        written.map_err(|error| {
            let message = format!("cannot write {}: {error}", path.display());
            CliError::new(Exit::Failed, message)
        })?;
        Ok(PidFile(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(super) fn unmount(args: &UmountArgs) -> Result<(), CliError> {
    let mut has_waited = false;
    loop {
        match mount::unmount(&args.directory, args.lazy) {
            Err(MountError::Busy(_)) if args.wait => thread::sleep(BUSY_PAUSE),
            // Somebody else was faster.
            Err(MountError::NotMounted(_)) if has_waited => return Ok(()),
            result => return Ok(result?),
        }
        has_waited = true;
    }
}

/// `mount.fuse.pss`.
pub(super) fn run_helper() -> Result<(), CliError> {
    let helper = Helper::parse();
    let arguments = translate(&helper)?;
    let parsed = super::PssFuse::try_parse_from(&arguments).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let first = first.strip_prefix("error: ").unwrap_or(first);
        CliError::new(Exit::Usage, format!("mount options: {first}"))
    })?;
    if helper.verbose {
        say(format_args!("runs '{}'", arguments.join(" ")));
    }
    match helper.fake {
        true => Ok(()),
        false => super::run(parsed),
    }
}

/// The command line of `pss-fuse` that does what mount(8) asks for.
fn translate(helper: &Helper) -> Result<Vec<String>, CliError> {
    let usage = |message: String| CliError::new(Exit::Usage, message);
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| usage(format!("{} is no UTF-8", path.display())))
    };
    let mut arguments = vec!["pss-fuse".to_owned(), "mount".to_owned()];
    arguments.push(text(&helper.directory)?);
    match helper.source.split_once(':') {
        None if helper.source == "pss" => {}
        Some(("pss", file)) if file.starts_with('/') => {
            arguments.push(format!("--servers={file}"));
        }
        _ => {
            return Err(usage(format!(
                "source '{}': write pss for the cell of /etc/pss/server.conf, or pss:FILE with the absolute path of another server.conf",
                super::printable(&helper.source)
            )));
        }
    }
    for option in &helper.options {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option.as_str(), None),
        };
        let name = name.replace('_', "-");
        match name.as_str() {
            // Of mount(8) and systemd, or what holds in any case.
            ""
            | "ro"
            | "rw"
            | "-netdev"
            | "nofail"
            | "auto"
            | "noauto"
            | "defaults"
            | "user"
            | "nouser"
            | "users"
            | "nodev"
            | "nosuid"
            | "noexec"
            | "async"
            | "noatime"
            | "relatime"
            | "nodiratime"
            | "default-permissions" => {}
            comment if comment.starts_with("x-") || comment == "comment" => {}
            "allow-other" | "stale" | "show-volumes" | "foreground" => match value {
                None => arguments.push(format!("--{name}")),
                Some(_) => return Err(usage(format!("mount option {name} takes no value"))),
            },
            "uid" | "gid" | "file-mode" | "dir-mode" | "metadata-ttl" | "timeout" | "servers"
            | "key" | "log" | "log-level" | "pid-file" => match value {
                Some(value) => arguments.push(format!("--{name}={value}")),
                None => return Err(usage(format!("mount option {name} takes a value"))),
            },
            _ if helper.sloppy => {}
            _ => {
                let option = super::printable(option);
                return Err(usage(format!(
                    "mount option '{option}' is not known; 'mount.fuse.pss --help' names them"
                )));
            }
        }
    }
    Ok(arguments)
}

fn parse_owner(text: &str) -> Result<u32, String> {
    let number = "write a number, such as 1000; 'id NAME' tells those of a user";
    text.parse().map_err(|_| number.to_owned())
}

fn parse_mode(text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode & !0o222),
        _ => Err("write permissions as octal digits, such as 0444".to_owned()),
    }
}

fn parse_ttl(text: &str) -> Result<Duration, String> {
    match text.trim_end_matches(|c: char| c.is_ascii_alphabetic()) {
        "0" => Ok(Duration::ZERO),
        _ => parse_time(text),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn translated(source: &str, options: &str) -> Result<String, String> {
        let arguments = ["mount.fuse.pss", source, "/mnt/pss", "-o", options];
        let helper = Helper::try_parse_from(arguments).expect("is a command line");
        match translate(&helper) {
            Ok(arguments) => {
                super::super::PssFuse::try_parse_from(&arguments).expect("pss-fuse takes it");
                Ok(arguments.join(" "))
            }
            Err(error) => Err(error.message),
        }
    }

    #[test]
    fn commands_are_sound() {
        Helper::command().debug_assert();
    }

    #[test]
    fn lines_of_fstab() {
        let line = translated("pss", "ro,_netdev,nofail,allow_other,x-systemd.automount");
        assert_eq!(line.as_deref(), Ok("pss-fuse mount /mnt/pss --allow-other"));
        let line = translated("pss:/etc/b.conf", "rw,file_mode=0444,timeout=2s,stale");
        assert_eq!(
            line.as_deref(),
            Ok(
                "pss-fuse mount /mnt/pss --servers=/etc/b.conf --file-mode=0444 --timeout=2s --stale"
            )
        );
        for (source, options, part) in [
            ("pss", "colour=red", "colour=red"),
            ("pss", "uid", "takes a value"),
            ("pss", "stale=1", "takes no value"),
            ("vol001", "ro", "vol001"),
            ("pss:vol001", "ro", "absolute path"),
        ] {
            let error = translated(source, options).expect_err("is wrong");
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn modes_never_let_write() {
        assert_eq!(parse_mode("0444"), Ok(0o444));
        assert_eq!(parse_mode("755"), Ok(0o555));
        assert!(parse_mode("888").is_err());
        assert!(parse_mode("7777").is_err());
        assert_eq!(parse_ttl("0"), Ok(Duration::ZERO));
        assert_eq!(parse_ttl("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_ttl("500ms"), Ok(Duration::from_millis(500)));
        assert!(parse_ttl("x").is_err());
    }
}
