//! `pss volume`.

mod digest;
mod survey;
mod verify;

use clap::Subcommand;
use pss_core::client::Shrink;
use pss_core::size::{Size, SizeChange, parse_size};
use pss_core::state::{
    CHUNK_BYTES_DEFAULT, Refusal, VOLUME_BYTES_MAX, check_chunk_bytes, check_volume_name,
    check_volume_size,
};
use pss_core::types::BLOCK_BYTES;
use pss_core::wire::client::VolumeStatus;
use serde_json::{Value, json};

use super::cell::Access;
use super::{CellArgs, CliError, Exit, confirm, image, print, print_json, say};
use crate::render::{Table, grouped, left, printable, right, time_iso, time_text};

const IMPORT_EXAMPLES: &str = "Examples:
  pss volume import disk.img vol001
  pss volume import debian.qcow2 vol001
  pss volume import disk.img vol001 --resume      after Ctrl-C
  pss volume import win.vmdk vol002 --format vmdk";

const EXPORT_EXAMPLES: &str = "Examples:
  pss volume export vol001 vol001.img
  pss volume export vol001 vol001.img --resume    after Ctrl-C
  pss volume export vol001 vol001.qcow2";

#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Creates a volume; it takes space only as it is written to
    Create {
        /// Its name, at most 64 bytes
        name: String,
        /// Its size, such as 512M, 10G or 2T; a bare number is bytes
        #[arg(value_parser = parse_size)]
        size: u64,
        /// Size of its chunks, a power of two from 64K to 64M [default: 4M]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        chunk_size: Option<u64>,
    },
    /// Lists all volumes
    List,
    /// Shows one volume
    Show {
        /// Its name
        name: String,
    },
    /// Changes the size of a volume
    Resize {
        /// Its name
        name: String,
        /// The new size, or +SIZE to grow by so much
        #[arg(value_parser = SizeChange::parse)]
        size: SizeChange,
        /// Allow a smaller size: what lies behind the new end is lost
        #[arg(long)]
        allow_shrink: bool,
        /// Make it smaller even while it is attached
        #[arg(long, requires = "allow_shrink")]
        force: bool,
    },
    /// Makes a volume of a disk image: raw, qcow2 and what else qemu-img reads
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(image::ImportArgs),
    /// Writes a volume to a file: raw and sparse, or qcow2
    #[command(after_help = EXPORT_EXAMPLES)]
    Export(image::ExportArgs),
    /// Prints the SHA-256 digest of what a volume holds, equal for equal contents
    #[command(after_help = digest::DIGEST_EXAMPLES)]
    Digest(digest::DigestArgs),
    /// Checks every block on every server, compares the servers, and repairs what it finds
    #[command(after_help = verify::VERIFY_EXAMPLES)]
    Verify(verify::VerifyArgs),
    /// Deletes a volume and everything in it; refused while it is attached
    Delete {
        /// Its name
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Delete it even while it is attached: for those who use it the disk is gone at once
        #[arg(long)]
        force: bool,
    },
}

pub(super) fn run(args: &CellArgs, verb: VolumeVerb) -> Result<(), CliError> {
    match verb {
        VolumeVerb::Create {
            name,
            size,
            chunk_size,
        } => create(args, &name, size, chunk_size),
        VolumeVerb::List => list(args),
        VolumeVerb::Show { name } => show(args, &name),
        VolumeVerb::Resize {
            name,
            size,
            allow_shrink,
            force,
        } => {
            let shrink = match (allow_shrink, force) {
                (false, _) => Shrink::Never,
                (true, false) => Shrink::Unused,
                (true, true) => Shrink::Always,
            };
            resize(args, &name, size, shrink)
        }
        VolumeVerb::Import(import) => image::import(args, &import),
        VolumeVerb::Export(export) => image::export(args, &export),
        VolumeVerb::Digest(digest) => digest::run(args, &digest),
        VolumeVerb::Verify(verify) => verify::run(args, &verify),
        VolumeVerb::Delete { name, yes, force } => delete(args, &name, yes, force),
    }
}

/// Checks what a volume is to be, so that a mistake is answered without asking the cell.
pub(crate) fn check_new(name: &str, size: u64, chunk_size: Option<u64>) -> Result<u32, CliError> {
    let wrong = |what: &str, refusal: Refusal| CliError::usage(format!("{what}: {refusal}"));
    check_volume_name(name)
        .map_err(|refusal| wrong(&format!("volume name '{}'", printable(name)), refusal))?;
    let chunk_size = chunk_size.unwrap_or(u64::from(CHUNK_BYTES_DEFAULT));
    let chunk_bytes = u32::try_from(chunk_size).unwrap_or(u32::MAX);
    check_chunk_bytes(chunk_bytes)
        .map_err(|refusal| wrong(&format!("--chunk-size {}", Size(chunk_size)), refusal))?;
    check_size(size, chunk_bytes)?;
    Ok(chunk_bytes)
}

fn check_size(size: u64, chunk_bytes: u32) -> Result<(), CliError> {
    check_volume_size(size, chunk_bytes).map_err(|refusal| {
        let most = VOLUME_BYTES_MAX.min(u64::from(chunk_bytes) << 24);
        let remedy = match (size > most, most < VOLUME_BYTES_MAX) {
            (true, true) => format!(
                "; with chunks of {} at most {}: use a larger --chunk-size",
                Size(u64::from(chunk_bytes)),
                Size(most)
            ),
            (true, false) => format!("; use at most {}", Size(most)),
            (false, _) => format!("; use {}", size.next_multiple_of(512)),
        };
        CliError::usage(format!(
            "size {} ({size} bytes): {refusal}{remedy}",
            Size(size)
        ))
    })
}

pub(super) fn create(
    args: &CellArgs,
    name: &str,
    size: u64,
    chunk_size: Option<u64>,
) -> Result<(), CliError> {
    let chunk_bytes = check_new(name, size, chunk_size)?;
    let cell = Access::connect(args)?;
    let id = cell.create_volume(name, size, chunk_bytes)?;
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.create/1",
            "id": id.0,
            "name": name,
            "size_bytes": size,
            "chunk_bytes": chunk_bytes,
        }));
    }
    say(format!(
        "Created volume {} of {}.",
        printable(name),
        Size(size)
    ));
    Ok(())
}

fn list(args: &CellArgs) -> Result<(), CliError> {
    let mut volumes = Access::connect(args)?.volumes()?;
    volumes.sort_by(|a, b| a.volume.name.cmp(&b.volume.name));
    if args.json {
        let volumes: Vec<Value> = volumes.iter().map(volume_json).collect();
        return print_json(&json!({ "schema": "pss.volume.list/1", "volumes": volumes }));
    }
    print(&list_text(&volumes))
}

fn list_text(volumes: &[VolumeStatus]) -> String {
    let mut table = Table::new([
        left("NAME"),
        right("SIZE"),
        right("USED"),
        right("CHUNK"),
        left("CHANGED"),
        left("ATTACHED BY"),
    ]);
    for status in volumes {
        let volume = &status.volume;
        table.row([
            volume.name.clone(),
            Size(volume.size_bytes).to_string(),
            Size(status.allocated_bytes).to_string(),
            Size(u64::from(volume.chunk_bytes)).to_string(),
            time_text(status.times.changed_ms),
            status.attached_by.join(", "),
        ]);
    }
    table.render()
}

fn show(args: &CellArgs, name: &str) -> Result<(), CliError> {
    let status = Access::connect(args)?.volume(name)?;
    if args.json {
        let mut value = volume_json(&status);
        value["schema"] = json!("pss.volume.show/1");
        return print_json(&value);
    }
    print(&show_text(&status))
}

fn show_text(status: &VolumeStatus) -> String {
    let volume = &status.volume;
    let bytes = |bytes: u64| format!("{} ({} bytes)", Size(bytes), grouped(bytes));
    let attached = match status.attached_by.is_empty() {
        true => "nobody".to_owned(),
        false => printable(&status.attached_by.join(", ")),
    };
    format!(
        "Name         {}\nId           {}\nUUID         {}\nSize         {}\nUsed         {}\nChunk size   {}\nCreated      {}\nChanged      {}\nAttached by  {attached}\n",
        printable(&volume.name),
        volume.id,
        uuid(&volume.uuid),
        bytes(volume.size_bytes),
        bytes(status.allocated_bytes),
        bytes(u64::from(volume.chunk_bytes)),
        time_text(status.times.created_ms),
        time_text(status.times.changed_ms),
    )
}

fn resize(args: &CellArgs, name: &str, change: SizeChange, shrink: Shrink) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let VolumeStatus {
        volume,
        attached_by,
        ..
    } = cell.volume(name)?;
    let now = volume.size_bytes;
    let size = change
        .apply(now)
        .ok_or_else(|| CliError::usage("the new size is past every limit; use at most 64T"))?;
    check_size(size, volume.chunk_bytes)?;
    if size < now && shrink == Shrink::Never {
        return Err(CliError::usage(format!(
            "volume {} has {}; {} is smaller, and what lies behind the new end would be lost: add --allow-shrink if that is what you want",
            printable(name),
            Size(now),
            Size(size)
        )));
    }
    if size < now && !size.is_multiple_of(BLOCK_BYTES as u64) {
        return Err(CliError::usage(format!(
            "size {} ({size} bytes): {}; use {}",
            Size(size),
            Refusal::EndWithinBlock,
            size.next_multiple_of(BLOCK_BYTES as u64)
        )));
    }
    // The cell refuses this as well; it does not say by whom.
    let remedy = "add --force to make it smaller all the same: whoever uses what lies behind the new end \
                  loses it and finds errors there";
    if size < now && shrink == Shrink::Unused && !attached_by.is_empty() {
        return Err(attached(name, &attached_by, remedy));
    }
    cell.resize_volume(&volume, size, shrink)
        .map_err(|error| or_attached(&cell, name, error, remedy))?;
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.resize/1",
            "name": name,
            "size_bytes": size,
            "size_before_bytes": now,
        }));
    }
    say(format!(
        "Volume {} has {} now (before: {}).",
        printable(name),
        Size(size),
        Size(now)
    ));
    Ok(())
}

/// Somebody has the volume attached.
fn attached(name: &str, by: &[String], remedy: &str) -> CliError {
    CliError::new(
        Exit::Busy,
        format!(
            "volume {} is attached by {}; disconnect it there first, or {remedy}",
            printable(name),
            printable(&by.join(", "))
        ),
    )
}

/// The refusal of a change; by whom the volume is attached, if somebody has attached it since we looked.
fn or_attached(cell: &Access, name: &str, refusal: CliError, remedy: &str) -> CliError {
    match cell.volume(name) {
        Ok(now) if refusal.exit == Exit::Busy && !now.attached_by.is_empty() => {
            attached(name, &now.attached_by, remedy)
        }
        _ => refusal,
    }
}

fn delete(args: &CellArgs, name: &str, yes: bool, force: bool) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let status = cell.volume(name)?;
    // The cell refuses this as well; asking first would be a question without a choice.
    let remedy =
        "add --force to delete it all the same: for whoever uses it the disk is gone at once";
    if !status.attached_by.is_empty() && !force {
        return Err(attached(name, &status.attached_by, remedy));
    }
    if !yes {
        let used = match status.attached_by.is_empty() {
            true => String::new(),
            false => format!(
                " It is attached by {}.",
                printable(&status.attached_by.join(", "))
            ),
        };
        confirm(&format!(
            "Delete volume {} of {} with {} of data in it?{used} This cannot be undone.",
            printable(name),
            Size(status.volume.size_bytes),
            Size(status.allocated_bytes)
        ))?;
    }
    cell.delete_volume(&status.volume, force)
        .map_err(|error| or_attached(&cell, name, error, remedy))?;
    if args.json {
        return print_json(&json!({ "schema": "pss.volume.delete/1", "name": name }));
    }
    say(format!("Deleted volume {}.", printable(name)));
    Ok(())
}

fn volume_json(status: &VolumeStatus) -> Value {
    let (volume, times) = (&status.volume, &status.times);
    // 0 is no time.
    let known = |unix_ms: u64| (unix_ms > 0).then_some(unix_ms);
    json!({
        "id": volume.id.0,
        "name": volume.name,
        "uuid": uuid(&volume.uuid),
        "size_bytes": volume.size_bytes,
        "allocated_bytes": status.allocated_bytes,
        "chunk_bytes": volume.chunk_bytes,
        "created_slot": volume.created.0,
        "created_ms": known(times.created_ms),
        "created": time_iso(times.created_ms),
        "changed_slot": times.changed.0,
        "changed_ms": known(times.changed_ms),
        "changed": time_iso(times.changed_ms),
        "attached_by": status.attached_by,
    })
}

/// 16 random bytes in the form of a UUID.
fn uuid(bytes: &[u8; 16]) -> String {
    pss_core::key::CellId(*bytes).to_string()
}

#[cfg(test)]
mod tests {
    use pss_core::state::{Volume, VolumeTimes};
    use pss_core::types::{Slot, VolumeId};

    use super::*;

    fn status() -> VolumeStatus {
        VolumeStatus {
            chunks: 0,
            times: VolumeTimes {
                created_ms: 0,
                changed: Slot(9),
                changed_ms: 1_796_040_001_250,
            },
            reservations: 0,
            volume: Volume {
                id: VolumeId(1),
                name: "vol001".into(),
                size_bytes: 10 << 30,
                chunk_bytes: 4 << 20,
                uuid: [0xab; 16],
                created: Slot(7),
            },
            allocated_bytes: 3 << 20,
            attached_by: vec!["pss-nbd@a".into(), "pss-nbd@b".into()],
        }
    }

    #[test]
    fn new_volumes_are_checked() {
        assert_eq!(check_new("vol001", 10 << 30, None).unwrap(), 4 << 20);
        assert_eq!(check_new("v", 512, Some(65536)).unwrap(), 65536);
        let message = |name: &str, size, chunk| {
            let error = check_new(name, size, chunk).unwrap_err();
            assert_eq!(error.exit, Exit::Usage);
            error.message
        };
        for name in ["", "a/b", "..", &"x".repeat(65), "a\nb"] {
            assert!(message(name, 512, None).contains("volume name"));
        }
        assert!(message("v", 65 << 40, None).contains("use at most 64T"));
        assert!(message("v", 1000, None).contains("use 1024"));
        assert!(message("v", 2 << 40, Some(65536)).contains("larger --chunk-size"));
        assert!(message("v", 512, Some(3 << 20)).contains("power of two"));
        assert!(message("v", 512, Some(1 << 40)).contains("--chunk-size 1T"));
    }

    #[test]
    fn volumes_as_text() {
        assert_eq!(
            list_text(&[status()]),
            "\
NAME    SIZE  USED  CHUNK  CHANGED               ATTACHED BY
vol001   10G    3M     4M  2026-11-30 12:00:01Z  pss-nbd@a, pss-nbd@b
"
        );
        let text = show_text(&status());
        assert!(
            text.contains("Size         10G (10,737,418,240 bytes)"),
            "{text}"
        );
        let times = "Created      unknown\nChanged      2026-11-30 12:00:01Z\n";
        assert!(text.contains(times), "{text}");
        assert!(
            text.contains("abababab-abab-abab-abab-abababababab"),
            "{text}"
        );
    }

    #[test]
    fn volumes_as_json() {
        let value = volume_json(&status());
        assert_eq!(value["size_bytes"], json!(10u64 << 30));
        assert_eq!(value["attached_by"][1], json!("pss-nbd@b"));
        assert_eq!(value["created_ms"], Value::Null);
        assert_eq!(value["created"], Value::Null);
        assert_eq!(value["changed_slot"], 9);
        assert_eq!(value["changed_ms"], 1_796_040_001_250u64);
        assert_eq!(value["changed"], "2026-11-30T12:00:01.250Z");
    }
}
