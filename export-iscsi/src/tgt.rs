//! tgt's command line for what tgt's users have in their fingers and scripts: `tgtadm` ([`admin`]) and
//! `tgt-admin` ([`batch`]), over the control socket, in tgt's layout ([`layout`], [`dump`]).

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::control::client::{ClientError, ask};
use crate::control::protocol::{Failure, Kind, Request};
use crate::control::report::{Sessions, Targets};

pub mod admin;
pub mod batch;
pub mod dump;
pub mod layout;

/// Longer than the cell's own time for a volume.
const PATIENCE: Duration = Duration::from_secs(30);
/// What tgtadm ends with when a request is refused: EINVAL.
const REFUSED: u8 = 22;
/// What tgtadm ends with when there is no server: ENOTCONN.
const NOT_CONNECTED: u8 = 107;

/// The server, asked.
pub(crate) struct Server<'a> {
    control: &'a Path,
}

impl Server<'_> {
    fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ClientError> {
        ask(self.control, request, PATIENCE)
    }

    /// Does a change; warnings go to standard error.
    fn change(&self, program: &str, request: &Request) -> Result<(), ClientError> {
        let answer: Value = self.ask(request)?;
        for key in ["warnings", "missing"] {
            for text in answer[key].as_array().into_iter().flatten() {
                tell(program, text.as_str().unwrap_or_default());
            }
        }
        if let Some(reason) = answer["not_noted"].as_str() {
            let text = format!("this may be missing from 'pss events': {reason}");
            tell(program, text);
        }
        Ok(())
    }

    fn targets(&self) -> Result<Targets, ClientError> {
        self.ask(&Request::Targets)
    }

    fn sessions(&self) -> Result<Sessions, ClientError> {
        self.ask(&Request::Sessions)
    }
}

fn usage(text: impl Display) -> ClientError {
    Failure::new(Kind::Usage, text).into()
}

/// Says something on standard error, if it is still there.
fn tell(program: &str, text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{program}: {text}");
}

/// Writes data; a reader that went away early is no failure.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn finish(program: &str, result: Result<(), ClientError>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    tell(program, &error);
    ExitCode::from(match error {
        ClientError::Absent { .. } => NOT_CONNECTED,
        _ => REFUSED,
    })
}

/// What the program was called as, so that messages name what people typed.
fn called_as(usual: &str) -> String {
    let first = std::env::args_os().next().map(PathBuf::from);
    let name = first.as_deref().and_then(Path::file_name);
    name.map_or(usual.to_owned(), |it| it.to_string_lossy().into_owned())
}

/// Parses a command line; a wrong one ends the program as tgt's do.
fn parse<T: clap::Parser>() -> Result<T, ExitCode> {
    T::try_parse().map_err(|error| {
        let _ = error.print();
        match error.use_stderr() {
            true => ExitCode::from(REFUSED),
            false => ExitCode::SUCCESS,
        }
    })
}
