//! Which commands there are, and which of them transcripts have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pss_tests::binaries;
use pss_tests::package;

/// The script that starts and stops servers.
pub(super) const SCRIPT: &str = "/etc/init.d/pssd";
/// `pss-fuse` under the name by which mount(8) calls it.
const HELPER: &str = "mount.fuse.pss";
/// Plays a program that does not end by itself.
const UNTIL: &str = "until";

/// A command line of a transcript.
#[derive(Debug)]
pub(super) struct Line {
    /// As a person types it.
    pub(super) text: String,
    /// Whether it ends with 0 there.
    pub(super) succeeds: bool,
}

/// The command lines of all transcripts in a directory.
pub(super) fn lines(directory: &Path) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        for line in fs::read_to_string(path).unwrap().lines() {
            if let Some(text) = line.strip_prefix("$ ") {
                lines.push(Line {
                    text: text.to_owned(),
                    succeeds: true,
                });
            } else if let (Some(status), Some(last)) = (line.strip_prefix("? "), lines.last_mut()) {
                last.succeeds = matches!(status, "0" | "success");
            }
        }
    }
    lines
}

/// The programs of the workspace, but for those of the tests.
pub(super) fn programs() -> BTreeSet<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut programs = BTreeSet::new();
    for entry in fs::read_dir(workspace).unwrap() {
        let package = entry.unwrap().path();
        let is_of_tests = package.file_name().is_some_and(|name| name == "tests");
        let Ok(text) = fs::read_to_string(package.join("Cargo.toml")) else {
            continue;
        };
        if is_of_tests {
            continue;
        }
        // What has no section of its own is called like its package.
        let has_main = package.join("src/main.rs").exists();
        let is_unnamed = has_main && !text.contains("src/main.rs");
        let sections = text.split("[[bin]]").skip(usize::from(!is_unnamed));
        programs.extend(sections.map(|section| {
            let name = section.lines().find_map(|it| it.strip_prefix("name = "));
            name.unwrap().trim_matches('"').to_owned()
        }));
    }
    for known in ["pss", "pss-fuse", "pss-nbd", "pss-tgtadm"] {
        assert!(programs.contains(known), "no {known} in {programs:?}");
    }
    programs
}

/// The names of the manual, which are links in its package.
pub(super) fn links() -> BTreeSet<String> {
    let bin = package::sources().join("manual/usr/bin");
    let names = fs::read_dir(bin).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// All commands, with their verbs, also under other names that help tells.
pub(super) fn commands() -> Vec<String> {
    let mut commands = Vec::new();
    for program in programs() {
        add_verbs(&program, &[], &mut commands);
    }
    commands.extend(links());
    commands.push(HELPER.to_owned());
    commands.extend(["start", "stop", "restart", "status"].map(|it| format!("{SCRIPT} {it}")));
    commands
}

/// Adds a command, or the verbs that it has.
fn add_verbs(program: &str, verbs: &[String], commands: &mut Vec<String>) {
    let help = binaries::command(program).args(verbs).arg("-h").output();
    let help = help.unwrap();
    assert!(help.status.success(), "{program} {verbs:?} -h fails");
    let help = String::from_utf8(help.stdout).unwrap();
    let names = names_in(&help);
    if names.is_empty() {
        commands.push([&[program.to_owned()], verbs].concat().join(" "));
    }
    for name in names {
        add_verbs(program, &[verbs, &[name]].concat(), commands);
    }
}

/// The verbs that a help text lists, with their other names.
fn names_in(help: &str) -> Vec<String> {
    let rows = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let mut names = Vec::new();
    for row in rows.take_while(|row| !row.is_empty()) {
        let name = row.split_whitespace().next().unwrap();
        if name == "help" {
            continue;
        }
        names.push(name.to_owned());
        let marks = ["[alias: ", "[aliases: "];
        if let Some((_, others)) = marks.iter().find_map(|it| row.split_once(it)) {
            let others = others.trim_end_matches(']').split(", ");
            names.extend(others.map(str::to_owned));
        }
    }
    names
}

/// What is missing of these commands: each must succeed in one transcript and fail in one.
pub(super) fn missing(commands: &[String], lines: &[Line]) -> Vec<String> {
    let mut missing = Vec::new();
    for command in commands {
        let played = lines.iter().filter(|line| is_of(&line.text, command));
        for (succeeds, what) in [(true, "success"), (false, "a mistake")] {
            if !played.clone().any(|line| line.succeeds == succeeds) {
                missing.push(format!("{command}, with {what}"));
            }
        }
    }
    missing
}

/// Whether a line is a call of a command, whose options may stand before its verbs.
fn is_of(line: &str, command: &str) -> bool {
    let words = shell_words(line);
    let command: Vec<&str> = command.split(' ').collect();
    let words = match words.first().map(String::as_str) {
        Some(UNTIL) => &words[2..],
        _ => &words[..],
    };
    let Some((program, rest)) = words.split_first() else {
        return false;
    };
    let begins = |rest: &[String]| rest.iter().zip(&command[1..]).all(|(a, b)| a == b);
    let verbs = command.len() - 1;
    let options_first = rest.first().is_some_and(|first| first.starts_with('-'));
    let places = match options_first {
        true => rest.len(),
        false => 1,
    };
    *program == command[0]
        && (0..places.max(1)).any(|at| rest.len() >= at + verbs && begins(&rest[at..]))
}

/// Words, of which some are in quotation marks.
fn shell_words(line: &str) -> Vec<String> {
    let parts = line.split(['"', '\'']);
    let mut words = Vec::new();
    for (at, part) in parts.enumerate() {
        match at % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

#[test]
fn missing_commands_are_found() {
    let line = |text: &str, succeeds| Line {
        text: text.to_owned(),
        succeeds,
    };
    let lines = [
        line("pss --timeout 1s volume list", true),
        line("pss volume list --jsn", false),
        line("until \"is ready\" pssd start --id 0", true),
        line("pss volume", false),
    ];
    let missing = |commands: &[&str]| {
        let commands: Vec<String> = commands.iter().map(|it| (*it).to_owned()).collect();
        missing(&commands, &lines)
    };
    assert!(missing(&["pss volume list"]).is_empty());
    assert_eq!(missing(&["pssd start"]), ["pssd start, with a mistake"]);
    assert_eq!(
        missing(&["pss volume show", "pss-nbd"]),
        [
            "pss volume show, with success",
            "pss volume show, with a mistake",
            "pss-nbd, with success",
            "pss-nbd, with a mistake",
        ]
    );
    let help = "Usage: x\n\nCommands:\n  ls    Lists [aliases: readdir, dir]\n  read  Reads [alias: cat]\n  help  Helps\n\nOptions:\n";
    assert_eq!(names_in(help), ["ls", "readdir", "dir", "read", "cat"]);
}
