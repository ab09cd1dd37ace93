//! `pss-fuse ls`, `stat`, `read` and `map`: ask the servers, without a mount.

use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::io::{self, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use pss_core::size::{Size, parse_size};
use pss_core::types::ServerId;
use pss_core::volume::device::{Extent, ReadPart};
use pss_core::wire::client::REQUEST_BYTES_MAX;
use pss_gateway::logging::LogTarget;
use pss_gateway::progress::Progress;
use pss_gateway::text::{counted, printable_json};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{CellArgs, CliError, Exit, print, printable, say, start_log};
use crate::error::FsError;
use crate::namespace::{Attributes, Entry, Namespace};
use crate::node::Node;

/// Reads under way at a time, of 1 MiB each.
const READS_AHEAD: usize = 4;
/// A read under way.
type Reading = JoinHandle<Result<Vec<ReadPart>, FsError>>;

#[derive(Args, Clone, Debug)]
pub(super) struct LsArgs {
    /// A directory, or a file
    #[arg(default_value = "/")]
    path: String,
    /// Show kind, size, space, last change
    #[arg(long, short)]
    long: bool,
    /// List what is below, too
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Also the directory of whole volumes, .volumes
    #[arg(long, short)]
    all: bool,
    /// End each name by a NUL byte, for xargs -0
    #[arg(short = '0', long, conflicts_with_all = ["long", "json"])]
    null: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Clone, Debug)]
pub(super) struct StatArgs {
    /// Files and directories
    #[arg(required = true)]
    paths: Vec<String>,
    /// Print this for each path, with a line break: %n name, %s size, %b space in blocks of %B bytes, %Y time of the last
    /// change in seconds since 1970, %y the same for people, %i inode number, %h links, %F kind, %% a percent sign
    #[arg(long, short = 'c', conflicts_with = "json")]
    format: Option<String>,
    /// Also read the data of files and give their SHA-256
    #[arg(long)]
    digest: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ReadArgs {
    /// A chunk, or a whole volume such as /.volumes/vol001
    path: String,
    /// Where to write the data [default: standard output]
    #[arg(conflicts_with = "out")]
    file: Option<PathBuf>,
    /// The same; - is standard output
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Begin here
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_offset)]
    offset: u64,
    /// Read so much [default: to the end]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    length: Option<u64>,
}

#[derive(Args, Clone, Debug)]
pub(super) struct MapArgs {
    /// A chunk or a whole volume; of a volume's directory, the volume is taken
    path: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn ls(cell: &CellArgs, args: &LsArgs) -> Result<(), CliError> {
    look(cell, args.all, async |namespace: Arc<Namespace>| {
        let path = args.path.as_str();
        let start = namespace
            .resolve(path)
            .await
            .map_err(|error| CliError::at(path, &error))?;
        let mut listed = Vec::new();
        match start.node.is_directory() {
            true => list(&namespace, args, start.node, path, "", &mut listed).await?,
            false => listed.push(Entry {
                name: path.to_owned(),
                attributes: start,
            }),
        }
        if args.json {
            let entries: Vec<Value> = listed.iter().map(entry_json).collect();
            let mut answer = json!({
                "schema": "pss.fuse.ls/1",
                "path": path,
                "entries": entries,
            });
            add_freshness(&namespace, &mut answer).await;
            return print_json(&answer);
        }
        say_freshness(&namespace).await;
        let mut text = Vec::new();
        for entry in &listed {
            if args.long {
                text.extend(long_line(entry).into_bytes());
            }
            match args.null {
                true => text.extend(entry.name.as_bytes()),
                false => text.extend(printable(&entry.name).into_bytes()),
            }
            text.push(match args.null {
                true => 0,
                false => b'\n',
            });
        }
        print(&text)
    })
}

/// Adds what is in a directory, with names from where the listing began.
async fn list(
    namespace: &Namespace,
    args: &LsArgs,
    node: Node,
    path: &str,
    prefix: &str,
    listed: &mut Vec<Entry>,
) -> Result<(), CliError> {
    let entries = match namespace.list(node).await {
        Ok(entries) => entries,
        // Emptied while it was walked through.
        Err(FsError::NotFound) if !prefix.is_empty() => return Ok(()),
        Err(error) => return Err(CliError::at(path, &error)),
    };
    for entry in entries {
        let name = format!("{prefix}{}", entry.name);
        let node = entry.attributes.node;
        let below = format!("{name}/");
        listed.push(Entry { name, ..entry });
        if args.recursive && node.is_directory() {
            Box::pin(list(namespace, args, node, path, &below, listed)).await?;
        }
    }
    Ok(())
}

fn long_line(entry: &Entry) -> String {
    let attributes = &entry.attributes;
    let kind = match attributes.node.is_directory() {
        true => 'd',
        false => '-',
    };
    format!(
        "{kind} {:>15} {:>15} {:>20} ",
        attributes.size_bytes,
        attributes.allocated_bytes,
        time_text(attributes.changed_ms)
    )
}

fn entry_json(entry: &Entry) -> Value {
    let mut value = attributes_json(&entry.attributes);
    value["name"] = json!(entry.name);
    value
}

fn attributes_json(attributes: &Attributes) -> Value {
    json!({
        "kind": kind(attributes.node),
        "inode": attributes.node.inode(),
        "links": attributes.links,
        "size_bytes": attributes.size_bytes,
        "allocated_bytes": attributes.allocated_bytes,
        "changed_ms": attributes.changed_ms,
        "slot": attributes.changed.0,
    })
}

pub(super) fn stat(cell: &CellArgs, args: &StatArgs) -> Result<(), CliError> {
    // A wrong format is found before the cell is asked.
    if let Some(format) = &args.format {
        formatted(format, "", &Attributes::NOTHING)?;
    }
    look(cell, true, async |namespace: Arc<Namespace>| {
        let mut values = Vec::new();
        let mut text = String::new();
        for path in &args.paths {
            let at = |error: FsError| CliError::at(path, &error);
            let found = namespace.resolve(path).await.map_err(at)?;
            if let Some(format) = &args.format {
                text.push_str(&formatted(format, path, &found)?);
                text.push('\n');
                continue;
            }
            // Who asks for a volume wants to know how large that is, not its directory.
            let shown = match found.node {
                Node::Volume(volume) => {
                    let image = namespace
                        .attributes(Node::Image(volume))
                        .await
                        .map_err(at)?;
                    Attributes {
                        node: found.node,
                        ..image
                    }
                }
                _ => found,
            };
            let (digest, shown) = match args.digest && !found.node.is_directory() {
                // Of the same moment.
                true => {
                    let progress = Progress::new("reading", found.size_bytes);
                    let digest = namespace.digest(found.node, |bytes| progress.reach(bytes));
                    let (digest, shown) = digest.await.map_err(at)?;
                    (Some(digest), shown)
                }
                false => (None, shown),
            };
            let copies = namespace.copies(shown.changed).await;
            if args.json {
                let mut value = attributes_json(&shown);
                value["path"] = json!(path);
                value["copies"] = json!(copies);
                value["sha256"] = json!(digest);
                values.push(value);
            } else {
                text.push_str(&stat_text(path, &shown, &copies, digest.as_deref()));
            }
        }
        if args.json {
            let mut answer = json!({ "schema": "pss.fuse.stat/1", "files": values });
            add_freshness(&namespace, &mut answer).await;
            return print_json(&answer);
        }
        say_freshness(&namespace).await;
        print(text.as_bytes())
    })
}

fn stat_text(path: &str, found: &Attributes, copies: &[ServerId], digest: Option<&str>) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:>9}: {value}\n"));
    line("path", printable(path));
    line("kind", kind(found.node).to_owned());
    line("inode", found.node.inode().to_string());
    if found.size_bytes > 0 {
        let size = |bytes: u64| format!("{bytes} ({})", Size(bytes));
        line("size", size(found.size_bytes));
        line("allocated", size(found.allocated_bytes));
    }
    line("changed", time_text(found.changed_ms));
    line("slot", found.changed.to_string());
    let copies: Vec<String> = copies.iter().map(ServerId::to_string).collect();
    line(
        "copies",
        match copies.as_slice() {
            [] => "none is known to be current".to_owned(),
            [one] => format!("current on server {one}"),
            all => format!("current on servers {}", all.join(", ")),
        },
    );
    if let Some(digest) = digest {
        line("sha256", digest.to_owned());
    }
    text
}

/// A line as the format says.
fn formatted(format: &str, path: &str, found: &Attributes) -> Result<String, CliError> {
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let part = match rest.next() {
            Some('n') => path.to_owned(),
            Some('s') => found.size_bytes.to_string(),
            Some('b') => found.allocated_bytes.div_ceil(512).to_string(),
            Some('B') => "512".to_owned(),
            Some('Y') => (found.changed_ms / 1000).to_string(),
            Some('y') => time_text(found.changed_ms),
            Some('i') => found.node.inode().to_string(),
            Some('h') => found.links.to_string(),
            Some('F') => kind(found.node).to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                let message = format!(
                    "--format: '%{}' is not known; use %n %s %b %B %Y %y %i %h %F or %%",
                    printable(&other)
                );
                return Err(CliError::new(Exit::Usage, message));
            }
        };
        text.push_str(&part);
    }
    Ok(text)
}

pub(super) fn read(cell: &CellArgs, args: &ReadArgs) -> Result<(), CliError> {
    look(cell, true, async |namespace: Arc<Namespace>| {
        let path = args.path.as_str();
        let at = |error: FsError| CliError::at(path, &error);
        let found = namespace.resolve(path).await.map_err(at)?;
        if found.node.is_directory() {
            return Err(at(FsError::IsDirectory));
        }
        if args.offset > found.size_bytes {
            let message = format!(
                "{}: --offset {} lies behind its end at {}",
                printable(path),
                args.offset,
                found.size_bytes
            );
            return Err(CliError::new(Exit::Usage, message));
        }
        let rest = found.size_bytes - args.offset;
        let length = args.length.unwrap_or(rest).min(rest);
        let mut out = Output::open(args.file.as_deref().or(args.out.as_deref()))?;
        // What others read may go to the same terminal.
        let progress = out.is_file().then(|| Progress::new("reading", length));
        let mut ahead: VecDeque<(u64, Reading)> = VecDeque::new();
        let mut asked = 0;
        loop {
            while ahead.len() < READS_AHEAD && asked < length {
                let now = (length - asked).min(REQUEST_BYTES_MAX as u64) as usize;
                let (namespace, from) = (Arc::clone(&namespace), args.offset + asked);
                let node = found.node;
                let read = async move { namespace.read(node, from, now).await };
                asked += now as u64;
                ahead.push_back((now as u64, tokio::spawn(read)));
            }
            let Some((wanted, next)) = ahead.pop_front() else {
                drop(progress);
                out.finish()?;
                say_freshness(&namespace).await;
                return Ok(());
            };
            let parts = next.await.expect("reading does not panic").map_err(at)?;
            if parts.iter().map(ReadPart::length_bytes).sum::<u64>() < wanted {
                let message = format!("{}: it became smaller while it was read", printable(path));
                return Err(CliError::new(Exit::Failed, message));
            }
            for part in parts {
                if !out.write(&part)? {
                    return Ok(());
                }
            }
            if let Some(progress) = &progress {
                progress.advance(wanted);
            }
        }
    })
}

/// Where data go. Holes stay holes in a regular file.
struct Output {
    file: File,
    name: String,
    is_regular: bool,
}

impl Output {
    fn open(path: Option<&Path>) -> Result<Output, CliError> {
        let path = path.filter(|path| *path != Path::new("-"));
        let opened = match path {
            Some(path) => File::create(path),
            None => rustix::io::dup(rustix::stdio::stdout())
                .map(File::from)
                .map_err(io::Error::from),
        };
        let name = match path {
            Some(path) => path.display().to_string(),
            None => "standard output".to_owned(),
        };
        let file = opened.map_err(|error| Output::failed(&name, &error))?;
        // What is redirected to may be appended to; then holes cannot be left out.
        let is_regular = path.is_some() && file.metadata().is_ok_and(|about| about.is_file());
        Ok(Output {
            file,
            name,
            is_regular,
        })
    }

    /// Also one that standard output was redirected to.
    fn is_file(&self) -> bool {
        self.file.metadata().is_ok_and(|about| about.is_file())
    }

    /// Gives whether anybody still takes data.
    fn write(&mut self, part: &ReadPart) -> Result<bool, CliError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let written = match part {
            ReadPart::Data(data) => self.file.write_all(data),
            ReadPart::Hole(length) if self.is_regular => self
                .file
                .seek(SeekFrom::Current(i64::from(*length)))
                .map(|_| ()),
            ReadPart::Hole(length) => {
                let mut left = *length as usize;
                let mut result = Ok(());
                while left > 0 && result.is_ok() {
                    let now = left.min(ZEROS.len());
                    result = self.file.write_all(&ZEROS[..now]);
                    left -= now;
                }
                result
            }
        };
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Output::failed(&self.name, &error)),
        }
    }

    /// Gives the file its length if it ends with a hole.
    fn finish(mut self) -> Result<(), CliError> {
        if !self.is_regular {
            return Ok(());
        }
        let end = self
            .file
            .stream_position()
            .and_then(|end| self.file.set_len(end));
        end.map_err(|error| Output::failed(&self.name, &error))
    }

    fn failed(name: &str, error: &io::Error) -> CliError {
        CliError::new(Exit::Failed, format!("cannot write to {name}: {error}"))
    }
}

pub(super) fn map(cell: &CellArgs, args: &MapArgs) -> Result<(), CliError> {
    look(cell, true, async |namespace: Arc<Namespace>| {
        let path = args.path.as_str();
        let at = |error: FsError| CliError::at(path, &error);
        let found = namespace.resolve(path).await.map_err(at)?;
        let node = match found.node {
            Node::Volume(volume) => Node::Image(volume),
            node => node,
        };
        let found = namespace.attributes(node).await.map_err(at)?;
        if node.is_directory() {
            return Err(at(FsError::IsDirectory));
        }
        let mut extents: Vec<(u64, Extent)> = Vec::new();
        let progress = Progress::new("mapping", found.size_bytes);
        let mut from = 0;
        while from < found.size_bytes {
            let more = namespace.extents(node, from, found.size_bytes - from).await;
            let before = from;
            for extent in more.map_err(at)? {
                match extents.last_mut() {
                    Some((_, last)) if last.allocated == extent.allocated => {
                        last.length_bytes += extent.length_bytes;
                    }
                    _ => extents.push((from, extent)),
                }
                from += extent.length_bytes;
            }
            if from == before {
                break;
            }
            progress.reach(from);
        }
        drop(progress);
        let kind = |extent: &Extent| match extent.allocated {
            true => "data",
            false => "hole",
        };
        if args.json {
            let extents: Vec<Value> = extents
                .iter()
                .map(|(offset, extent)| {
                    json!({
                        "offset_bytes": offset,
                        "length_bytes": extent.length_bytes,
                        "kind": kind(extent),
                    })
                })
                .collect();
            let mut answer = json!({
                "schema": "pss.fuse.map/1",
                "path": path,
                "extents": extents,
            });
            add_freshness(&namespace, &mut answer).await;
            return print_json(&answer);
        }
        say_freshness(&namespace).await;
        let line = |(offset, extent): &(u64, Extent)| {
            format!(
                "{offset:>15} {:>15} {}\n",
                extent.length_bytes,
                kind(extent)
            )
        };
        print(extents.iter().map(line).collect::<String>().as_bytes())
    })
}

/// Looks at a cell and ends its session.
fn look<F: Future<Output = Result<(), CliError>>>(
    cell: &CellArgs,
    shows_images: bool,
    run: impl FnOnce(Arc<Namespace>) -> F,
) -> Result<(), CliError> {
    // What fails is said once, by the command itself.
    if let Some(level) = cell.log_level {
        start_log(LogTarget::Stderr, level)?;
    }
    // What is written to a slow reader blocks its thread; answers are taken by another.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let namespace = Arc::new(cell.open(shows_images)?);
        let result = run(Arc::clone(&namespace)).await;
        namespace.source().close().await;
        result
    })
}

fn print_json(value: &Value) -> Result<(), CliError> {
    print(printable_json(&format!("{value:#}\n")).as_bytes())
}

/// Says how far the answers of the nearest server may be behind, after they were given.
async fn say_freshness(namespace: &Namespace) {
    let Some(freshness) = namespace.source().freshness().await else {
        return;
    };
    let server = freshness.server;
    say(match freshness.behind_slots_max {
        Some(0) => format!("read from server {server}, which had everything"),
        Some(slots) => {
            let slots = counted(slots as usize, "slot");
            format!("read from server {server}, which may have been {slots} behind")
        }
        None => format!(
            "read from server {server}, which had everything up to slot {}; how much it lacked cannot be told without a majority of the servers",
            freshness.applied
        ),
    });
}

async fn add_freshness(namespace: &Namespace, answer: &mut Value) {
    if let Some(freshness) = namespace.source().freshness().await {
        answer["stale"] = json!({
            "server": freshness.server,
            "applied": freshness.applied,
            "behind_slots_max": freshness.behind_slots_max,
        });
    }
}

fn kind(node: Node) -> &'static str {
    match node {
        Node::Root | Node::Images | Node::Branch(..) | Node::Leaf(..) => "directory",
        Node::Volume(_) => "volume",
        Node::Image(_) => "whole volume",
        Node::Chunk(..) => "chunk",
    }
}

/// A time for people, UTC.
fn time_text(changed_ms: u64) -> String {
    match UNIX_EPOCH.checked_add(Duration::from_millis(changed_ms)) {
        Some(time) if changed_ms > 0 => humantime::format_rfc3339_seconds(time).to_string(),
        _ => "unknown".to_owned(),
    }
}

fn parse_offset(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        text => parse_size(text).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let found = Attributes {
            size_bytes: 4096,
            allocated_bytes: 1024,
            changed_ms: 1_000_500,
            ..Attributes::NOTHING
        };
        let text = formatted("%n: %s %b*%B %Y %y %F 100%%", "/v", &found).expect("is known");
        assert_eq!(
            text,
            "/v: 4096 2*512 1000 1970-01-01T00:16:40Z directory 100%"
        );
        for wrong in ["%x", "%", "a%\u{1b}"] {
            let error = formatted(wrong, "/v", &found).expect_err("is unknown");
            assert_eq!(error.exit, Exit::Usage);
            assert!(error.message.contains("%n"), "{error}");
        }
    }
}
