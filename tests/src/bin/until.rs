//! `until TEXT PROGRAM ARGS...`: runs a program until it has said TEXT, then sends SIGINT, as a person types Ctrl-C. What
//! the program says, and its exit code, are passed on. For transcripts of programs that do not end by themselves.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// A program that does not say what is waited for gets its SIGINT all the same.
const PATIENCE: Duration = Duration::from_secs(40);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(text), Some(program)) = (args.next(), args.next()) else {
        eprintln!("usage: until TEXT PROGRAM ARGS...");
        return ExitCode::from(2);
    };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be run");
    let (said, is_said) = channel();
    let stdout = pass_on(child.stdout.take(), std::io::stdout(), &text, said.clone());
    let stderr = pass_on(child.stderr.take(), std::io::stderr(), &text, said);
    stop_when(&is_said, child.id());
    let status = child.wait().expect("it is our child");
    for stream in [stdout, stderr] {
        stream.join().expect("lines can be passed on");
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    ExitCode::from(code.unwrap_or(128))
}

/// Passes on what comes, and tells when a line has the text.
fn pass_on(
    from: Option<impl Read + Send + 'static>,
    mut to: impl Write + Send + 'static,
    text: &str,
    said: Sender<()>,
) -> std::thread::JoinHandle<()> {
    let text = text.to_owned();
    let from = from.expect("it is piped");
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            writeln!(to, "{line}").expect("whoever plays the transcript reads");
            if line.contains(&text) {
                // It was said before.
                let _ = said.send(());
            }
        }
    })
}

/// Sends SIGINT when the text was said; nothing if the program has ended without.
fn stop_when(is_said: &Receiver<()>, pid: u32) {
    match is_said.recv_timeout(PATIENCE) {
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {}
        _ => {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("it is no zero");
            // It may have ended meanwhile.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
    }
}
