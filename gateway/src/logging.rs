//! Log lines to stderr, or to syslog with a tag.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use syslog::{Facility, Formatter3164, Logger, LoggerBackend};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Names another syslog socket, for tests and containers.
pub const SOCKET_VARIABLE: &str = "PSS_SYSLOG_SOCKET";
const SOCKETS: [&str; 3] = ["/dev/log", "/var/run/syslog", "/var/run/log"];
/// Longer lines are cut; a datagram has an end.
const LINE_BYTES_MAX: usize = 8192;

/// Where log lines go.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// The machine's syslog, facility daemon.
    Syslog,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum LogLevel {
    /// What a person must act on.
    Error,
    /// And what heals itself.
    Warn,
    /// And rare changes of state.
    Info,
    /// And connections and requests.
    Debug,
    /// And every message.
    Trace,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> LevelFilter {
        match level {
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        }
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No syslog socket takes datagrams.
    #[error("no syslog at {tried}: {source}; start a syslog daemon, or use --log stderr")]
    NoSyslog {
        /// The sockets that were tried.
        tried: String,
        /// What came of the last.
        source: io::Error,
    },
}

/// Installs the log of this process.
///
/// # Errors
/// [`LogError`].
pub fn init(target: LogTarget, level: LogLevel, tag: &str) -> Result<(), LogError> {
    let level = LevelFilter::from(level);
    match target {
        LogTarget::Stderr => tracing_subscriber::fmt()
            .with_max_level(level)
            .with_target(false)
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .with_writer(io::stderr)
            .init(),
        LogTarget::Syslog => {
            let sockets = match std::env::var_os(SOCKET_VARIABLE) {
                Some(path) => vec![PathBuf::from(path)],
                None => SOCKETS.iter().map(PathBuf::from).collect(),
            };
            // Syslog has time and level of its own.
            tracing_subscriber::fmt()
                .with_max_level(level)
                .with_target(false)
                .with_ansi(false)
                .with_level(false)
                .without_time()
                .with_writer(Syslog::open(&sockets, tag)?)
                .init();
        }
    }
    Ok(())
}

/// Installs the log of a whole cell in one process, on stderr.
///
/// `quiet` are directives of tracing's EnvFilter for what is no news there; who asks for more than warnings gets
/// it all.
pub fn init_cell(level: LogLevel, quiet: &str) {
    let level = LevelFilter::from(level);
    let directives = match level {
        LevelFilter::WARN => format!("warn,{quiet}"),
        level => level.to_string(),
    };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(directives))
        .with_target(false)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .with_writer(io::stderr)
        .init();
}

/// Writes lines as RFC 3164 datagrams to the local syslog.
///
/// Never waits: a server must not stand still because its syslog daemon does. A line that finds no
/// room is dropped, and how many were is said with the next that does.
struct Syslog {
    socket: PathBuf,
    tag: String,
    state: Mutex<State>,
}

struct State {
    logger: Logger<LoggerBackend, Formatter3164>,
    dropped: u64,
}

impl Syslog {
    fn open(sockets: &[PathBuf], tag: &str) -> Result<Syslog, LogError> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for socket in sockets {
            match connect(socket, tag) {
                Ok(logger) => {
                    return Ok(Syslog {
                        socket: socket.clone(),
                        tag: tag.to_owned(),
                        state: Mutex::new(State { logger, dropped: 0 }),
                    });
                }
                Err(error) => last = error,
            }
        }
        let tried: Vec<_> = sockets
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Err(LogError::NoSyslog {
            tried: tried.join(", "),
            source: last,
        })
    }

    fn send(&self, level: Level, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match state.dropped {
            0 => line.to_owned(),
            dropped => format!("{line} ({dropped} lines before this one were dropped)"),
        };
        let sent =
            state.send(level, &line) || self.reconnect(&mut state) && state.send(level, &line);
        match sent {
            true => state.dropped = 0,
            false => state.dropped += 1,
        }
    }

    /// The daemon was restarted, maybe: its socket is another now.
    fn reconnect(&self, state: &mut State) -> bool {
        match connect(&self.socket, &self.tag) {
            Ok(logger) => {
                state.logger = logger;
                true
            }
            Err(_) => false,
        }
    }
}

impl State {
    fn send(&mut self, level: Level, line: &str) -> bool {
        let sent = match level {
            Level::ERROR => self.logger.err(line),
            Level::WARN => self.logger.warning(line),
            Level::INFO => self.logger.info(line),
            Level::DEBUG | Level::TRACE => self.logger.debug(line),
        };
        sent.is_ok()
    }
}

fn connect(socket: &Path, tag: &str) -> io::Result<Logger<LoggerBackend, Formatter3164>> {
    let datagrams = UnixDatagram::unbound()?;
    datagrams.connect(socket)?;
    datagrams.set_nonblocking(true)?;
    let formatter = Formatter3164 {
        facility: Facility::LOG_DAEMON,
        hostname: None,
        process: tag.to_owned(),
        pid: std::process::id(),
    };
    Ok(Logger::new(LoggerBackend::Unix(datagrams), formatter))
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            syslog: self,
            level: Level::INFO,
            text: Vec::new(),
        }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line<'a> {
        let mut line = self.make_writer();
        line.level = *metadata.level();
        line
    }
}

/// One line of the log; sent when dropped.
struct Line<'a> {
    syslog: &'a Syslog,
    level: Level,
    text: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = LINE_BYTES_MAX - self.text.len();
        self.text.extend_from_slice(&bytes[..bytes.len().min(room)]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.text);
        // A line break would let what is logged forge a line of its own.
        let line = text.trim_end().replace(['\n', '\r'], " ");
        if !line.is_empty() {
            self.syslog.send(self.level, &line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 16384];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    fn bind(path: &Path) -> UnixDatagram {
        let socket = UnixDatagram::bind(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        socket
    }

    #[test]
    fn lines_carry_tag_and_severity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let socket = bind(&path);
        let syslog = Syslog::open(std::slice::from_ref(&path), "pssd_3").unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_level(false)
            .without_time()
            .with_target(false)
            .with_writer(syslog)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(server = 3, "disk\nfailed");
            tracing::info!("{}", "x".repeat(20_000));
        });
        // Facility daemon is 3, severity error 3: <27>.
        let line = receive(&socket);
        let tag = format!("pssd_3[{}]: disk failed server=3", std::process::id());
        assert!(line.starts_with("<27>") && line.ends_with(&tag), "{line}");
        let line = receive(&socket);
        assert!(line.starts_with("<30>") && line.len() < LINE_BYTES_MAX + 100);
    }

    #[test]
    fn a_restarted_or_stuck_daemon_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let socket = bind(&path);
        let syslog = Syslog::open(std::slice::from_ref(&path), "pssd_0").unwrap();
        // More than any socket buffer takes, and nobody reads.
        for _ in 0..5000 {
            syslog.send(Level::INFO, &"x".repeat(1000));
        }
        drop(socket);
        std::fs::remove_file(&path).unwrap();
        syslog.send(Level::INFO, "lost");
        let socket = bind(&path);
        syslog.send(Level::WARN, "back");
        let line = receive(&socket);
        assert!(
            line.contains("back (") && line.contains("were dropped"),
            "{line}"
        );
    }

    #[test]
    fn no_daemon_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = Syslog::open(&[dir.path().join("none")], "pssd_0");
        let message = error.err().unwrap().to_string();
        assert!(message.contains("--log stderr"), "{message}");
    }
}
