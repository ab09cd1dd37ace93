//! `suite [--at-once N] [NAMES...]`: runs all test programs of the workspace, several at once.
//!
//! Most tests of PSS wait for elections, leases and clients more than they work, and `cargo test` runs one program after
//! the other. What a program says is shown when it has ended, and at the end which ones failed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::Value;

/// Those that take longest; the rest fits in beside them. A wrong order costs time and nothing else.
const FIRST: [&str; 9] = [
    "chaos",
    "simulation",
    "processes",
    "recovery",
    "cli_image",
    "fuse",
    "iscsi_capture",
    "conformance_iscsi",
    "slow_disk",
];

#[derive(Parser)]
struct Args {
    /// Programs that run at the same time
    #[arg(long, value_name = "N", default_value_t = default_at_once())]
    at_once: usize,
    /// Only programs with one of these names, such as 'processes'
    names: Vec<String>,
}

/// One more than there are cores.
fn default_at_once() -> usize {
    thread::available_parallelism().map_or(2, |it| it.get()) + 1
}

struct TestProgram {
    name: String,
    file: PathBuf,
    /// Cargo runs tests in the directory of their package.
    package: PathBuf,
}

struct Ended {
    status: ExitStatus,
    took: Duration,
    output: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let mut programs = build()?;
    if !args.names.is_empty() {
        programs.retain(|it| args.names.iter().any(|name| is_named(it, name)));
        if programs.is_empty() {
            bail!("no test program is named {}", args.names.join(" or "));
        }
    }
    let rank = |it: &TestProgram| FIRST.iter().position(|name| is_named(it, name));
    programs.sort_by_key(|it| rank(it).unwrap_or(FIRST.len()));

    let started = Instant::now();
    let count = programs.len();
    let waiting = Mutex::new(VecDeque::from(programs));
    let failed = Mutex::new(Vec::new());
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    };
    thread::scope(|scope| {
        for _ in 0..args.at_once.max(1) {
            scope.spawn(|| {
                while let Some(program) = next() {
                    let ended = run(&program);
                    // Held while it is shown, so that outputs do not mix.
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    if !show(&program, ended) {
                        failed.push(program.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let seconds = started.elapsed().as_secs();
    if failed.is_empty() {
        println!("{count} test programs passed in {seconds} s");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{} of {count} test programs FAILED in {seconds} s: {}",
        failed.len(),
        failed.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

/// `processes` names `tests/processes.rs`, and `pss-core` the unit tests of that package.
fn is_named(program: &TestProgram, name: &str) -> bool {
    program.name == name || program.name.rsplit(' ').next() == Some(name)
}

/// Builds all tests; returns their programs.
fn build() -> anyhow::Result<Vec<TestProgram>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = [
        "test",
        "--workspace",
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ];
    let built = Command::new(cargo)
        .args(flags)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be run")?;
    if !built.status.success() {
        bail!("the tests cannot be built");
    }
    let mut programs = Vec::new();
    for line in String::from_utf8_lossy(&built.stdout).lines() {
        let message: Value = serde_json::from_str(line).context("cargo's messages are JSON")?;
        let (Some(file), Some(manifest)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
        ) else {
            continue;
        };
        if message["profile"]["test"] != true {
            continue;
        }
        let package = Path::new(manifest)
            .parent()
            .context("a manifest lies in a directory")?;
        let package_name = package.file_name().unwrap_or_default().to_string_lossy();
        let target = message["target"]["name"].as_str().unwrap_or_default();
        programs.push(TestProgram {
            name: format!("{package_name} {target}"),
            file: file.into(),
            package: package.to_owned(),
        });
    }
    if programs.is_empty() {
        bail!("cargo names no test programs");
    }
    Ok(programs)
}

fn run(program: &TestProgram) -> io::Result<Ended> {
    let mut output = tempfile::tempfile()?;
    let started = Instant::now();
    let status = Command::new(&program.file)
        .current_dir(&program.package)
        .env("CARGO_MANIFEST_DIR", &program.package)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .status()?;
    let took = started.elapsed();
    let output = text(&mut output)?;
    Ok(Ended {
        status,
        took,
        output,
    })
}

fn text(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether it passed.
fn show(program: &TestProgram, ended: io::Result<Ended>) -> bool {
    let mut out = io::stdout().lock();
    // Nobody may be reading any more; what failed is still told by the exit code.
    let _ = match &ended {
        Ok(it) => writeln!(
            out,
            "== {} {} ({:.1} s)\n{}",
            program.name,
            if it.status.success() {
                "passed"
            } else {
                "FAILED"
            },
            it.took.as_secs_f64(),
            it.output.trim()
        ),
        Err(error) => writeln!(out, "== {} FAILED: it cannot be run: {error}", program.name),
    };
    ended.is_ok_and(|it| it.status.success())
}
