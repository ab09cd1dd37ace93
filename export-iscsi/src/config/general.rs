//! The syntax of Perl's Config::General as tgt-admin uses it: options, blocks, includes.
//!
//! ```text
//! option value            # or option = value; a value may be "quoted"
//! <block name>            # blocks nest
//!   option value \
//!     that goes on
//! </block>
//! include conf.d/*.conf
//! ```

use std::path::{Path, PathBuf};

use super::Problem;

/// Files that include each other without end are stopped here.
const INCLUDE_DEPTH_MAX: usize = 16;
/// Blocks within blocks.
const BLOCK_DEPTH_MAX: usize = 16;
/// Longest file.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// An option, or a block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Where it is.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Option or kind of block.
    pub key: String,
    /// Value, or name of the block; may be empty.
    pub value: String,
    /// What is in the block.
    pub block: Option<Vec<Node>>,
}

impl Node {
    /// Something wrong with it.
    pub fn problem(&self, text: impl Into<String>) -> Problem {
        Problem {
            file: self.file.clone(),
            line: self.line,
            is_warning: false,
            text: text.into(),
        }
    }
}

/// Reads a file and those that it includes.
///
/// # Errors
/// The first thing that cannot be read.
pub fn read(file: &Path) -> Result<Vec<Node>, Problem> {
    read_included(file, 0)
}

fn read_included(file: &Path, depth: usize) -> Result<Vec<Node>, Problem> {
    let problem = |text: String| Problem {
        file: file.to_owned(),
        line: 0,
        is_warning: false,
        text,
    };
    if depth > INCLUDE_DEPTH_MAX {
        return Err(problem("files include each other".into()));
    }
    let length = std::fs::metadata(file).map(|it| it.len());
    if length.is_ok_and(|length| length > FILE_BYTES_MAX) {
        return Err(problem("is too long".into()));
    }
    let bytes = std::fs::read(file).map_err(|error| problem(format!("cannot read: {error}")))?;
    parse(file, &String::from_utf8_lossy(&bytes), depth)
}

struct Parser<'a> {
    file: &'a Path,
    depth: usize,
    /// Open blocks, the outermost first, with what is in them so far.
    open: Vec<Node>,
    top: Vec<Node>,
}

fn parse(file: &Path, text: &str, depth: usize) -> Result<Vec<Node>, Problem> {
    let mut parser = Parser {
        file,
        depth,
        open: Vec::new(),
        top: Vec::new(),
    };
    let mut lines = text.lines().enumerate();
    while let Some((number, first)) = lines.next() {
        let number = number + 1;
        let mut line = without_comment(first);
        while let Some(start) = line.strip_suffix('\\') {
            let next = lines.next().map_or("", |(_, next)| next);
            line = format!("{start}{}", without_comment(next).trim_start());
        }
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        if let Some((key, mark)) = here_document(line) {
            let mut value = Vec::new();
            loop {
                match lines.next() {
                    Some((_, text)) if text.trim() == mark => break,
                    Some((_, text)) => value.push(text),
                    None => {
                        return Err(parser.problem(number, format!("no end {mark} of the text")));
                    }
                }
            }
            parser.option(number, &key, &value.join("\n"))?;
        } else {
            parser.line(number, line)?;
        }
    }
    match parser.open.first() {
        Some(block) => Err(block.problem(format!("<{}> has no end", block.key))),
        None => Ok(parser.top),
    }
}

impl Parser<'_> {
    fn problem(&self, line: usize, text: String) -> Problem {
        Problem {
            file: self.file.to_owned(),
            line,
            is_warning: false,
            text,
        }
    }

    fn push(&mut self, node: Node) {
        match self.open.last_mut().and_then(|it| it.block.as_mut()) {
            Some(block) => block.push(node),
            None => self.top.push(node),
        }
    }

    fn line(&mut self, number: usize, line: &str) -> Result<(), Problem> {
        if let Some(included) = line.strip_prefix("<<").and_then(|it| it.strip_suffix(">>")) {
            let (_, path) = split_option(included.trim());
            return self.include(number, &path);
        }
        if let Some(name) = line.strip_prefix("</").and_then(|it| it.strip_suffix('>')) {
            let name = name.split_whitespace().next().unwrap_or_default();
            return match self.open.pop() {
                Some(block) if block.key.eq_ignore_ascii_case(name) => {
                    self.push(block);
                    Ok(())
                }
                Some(block) => {
                    let text = format!("</{name}> ends <{}> of line {}", block.key, block.line);
                    Err(self.problem(number, text))
                }
                None => Err(self.problem(number, format!("</{name}> ends nothing"))),
            };
        }
        if let Some(inner) = line.strip_prefix('<').and_then(|it| it.strip_suffix('>')) {
            if self.open.len() >= BLOCK_DEPTH_MAX {
                return Err(self.problem(number, "too many blocks within blocks".into()));
            }
            let (key, value) = match inner.trim().split_once(char::is_whitespace) {
                Some((key, value)) => (key, unquoted(value.trim())),
                None => (inner.trim(), String::new()),
            };
            let node = self.node(number, key, &value, Some(Vec::new()));
            self.open.push(node);
            return Ok(());
        }
        if line.starts_with('<') {
            return Err(self.problem(number, format!("`{line}` is no block")));
        }
        let (key, value) = split_option(line);
        self.option(number, &key, &value)
    }

    fn option(&mut self, number: usize, key: &str, value: &str) -> Result<(), Problem> {
        if key.eq_ignore_ascii_case("include") {
            return self.include(number, value);
        }
        let node = self.node(number, key, value, None);
        self.push(node);
        Ok(())
    }

    fn node(&self, line: usize, key: &str, value: &str, block: Option<Vec<Node>>) -> Node {
        Node {
            file: self.file.to_owned(),
            line,
            key: key.to_owned(),
            value: value.to_owned(),
            block,
        }
    }

    fn include(&mut self, number: usize, pattern: &str) -> Result<(), Problem> {
        let directory = self.file.parent().unwrap_or(Path::new(""));
        let files = expand(&directory.join(pattern));
        let files = files.map_err(|error| self.problem(number, format!("{pattern}: {error}")))?;
        for file in files {
            let nodes = read_included(&file, self.depth + 1).map_err(|mut inner| {
                if inner.line == 0 {
                    inner.text = format!("{} (included by line {number})", inner.text);
                }
                inner
            })?;
            nodes.into_iter().for_each(|node| self.push(node));
        }
        Ok(())
    }
}

/// Cuts off a comment; `\#` is no comment.
fn without_comment(line: &str) -> String {
    let mut kept = String::with_capacity(line.len());
    let mut escaped = false;
    for it in line.chars() {
        match it {
            '#' if escaped => {
                kept.pop();
                kept.push('#');
            }
            '#' => break,
            other => kept.push(other),
        }
        escaped = it == '\\' && !escaped;
    }
    kept.truncate(kept.trim_end().len());
    kept
}

/// `key value` or `key = value`.
fn split_option(line: &str) -> (String, String) {
    let end = line.find(|it: char| it.is_whitespace() || it == '=');
    let (key, rest) = line.split_at(end.unwrap_or(line.len()));
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim();
    (key.to_owned(), unquoted(rest))
}

fn unquoted(value: &str) -> String {
    for quote in ['"', '\''] {
        let inner = value
            .strip_prefix(quote)
            .and_then(|it| it.strip_suffix(quote));
        if let Some(inner) = inner {
            return inner.to_owned();
        }
    }
    value.to_owned()
}

/// `key <<MARK`.
fn here_document(line: &str) -> Option<(String, String)> {
    let (key, mark) = line.split_once("<<")?;
    let key = key.trim().trim_end_matches('=').trim();
    let mark = mark.trim();
    let word = |it: &str| !it.is_empty() && it.chars().all(|it| it.is_alphanumeric() || it == '_');
    let single = !key.is_empty() && !key.contains(char::is_whitespace);
    (single && word(mark)).then(|| (key.to_owned(), mark.to_owned()))
}

/// Files that a pattern means, in order of their names; a directory means all files in it. Only the last
/// part of a path may have `*` and `?`. A path without them must exist.
fn expand(pattern: &Path) -> std::io::Result<Vec<PathBuf>> {
    let name = pattern.file_name().map(|it| it.to_string_lossy());
    let name = name.unwrap_or_default();
    let (directory, name) = if pattern.is_dir() {
        (pattern, "*".into())
    } else if name.contains(['*', '?']) {
        (pattern.parent().unwrap_or(Path::new("")), name)
    } else {
        return Ok(vec![pattern.to_owned()]);
    };
    let Ok(entries) = std::fs::read_dir(directory) else {
        // A directory that is not there holds no files: tgt's own targets.conf includes one.
        return Ok(Vec::new());
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let file = path.file_name().map(|it| it.to_string_lossy());
        let file = file.unwrap_or_default();
        let hidden = file.starts_with('.') && !name.starts_with('.');
        if path.is_file() && !hidden && fits(&name, &file) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a name fits a pattern with `*` and `?`. Takes time in the product of their lengths.
fn fits(pattern: &str, name: &str) -> bool {
    let name: Vec<char> = name.chars().collect();
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for wanted in pattern.chars() {
        let mut next = vec![false; name.len() + 1];
        for at in 0..=name.len() {
            next[at] = match wanted {
                '*' => reached[at] || (at > 0 && next[at - 1]),
                '?' => at > 0 && reached[at - 1],
                other => at > 0 && reached[at - 1] && name[at - 1] == other,
            };
        }
        reached = next;
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All options, with the blocks that they are in, in the order of their paths.
    fn flat(nodes: &[Node]) -> Vec<String> {
        fn walk(nodes: &[Node], path: &str, into: &mut Vec<String>) {
            for node in nodes {
                match &node.block {
                    Some(block) => {
                        let path = format!("{path}{}/{}/", node.key, node.value);
                        walk(block, &path, into);
                    }
                    None => into.push(format!("{path}{}={}", node.key, node.value)),
                }
            }
        }
        let mut lines = Vec::new();
        walk(nodes, "", &mut lines);
        let key = |line: &String| line.split('=').next().unwrap_or_default().to_owned();
        lines.sort_by_key(key);
        lines
    }

    const SAMPLE: &str = "\
default-driver iscsi
# a comment
ignore-errors = yes   # behind a value
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store vol001>
    bs-type pss
    lun 1
  </backing-store>
  <backing-store vol002>
    bs-type=pss
    vendor_id \"ACME Inc\"
    scsi_sn 12\\#34
  </backing-store>
  incominguser iscsi_pss iscsi_pss000
  incominguser other other_secret00
  initiator-address 10.0.0.0/8
  initiator-address 192.168.1.2   # Allowed IP
  write-cache \\
     off
</target>
<target iqn.2001-03.jp.tritech:b>
  backing-store vol003
  backing-store vol004
  note <<END
two
lines
END
</target>
";

    #[test]
    fn same_as_perls_config_general() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("targets.conf");
        std::fs::write(&file, SAMPLE).unwrap();
        let script = r#"
use Config::General qw(ParseConfig);
my %conf = ParseConfig(-ConfigFile => $ARGV[0], -UseApacheInclude => 1,
    -IncludeDirectories => 1, -IncludeGlob => 1, -MergeDuplicateBlocks => 1);
sub walk { my ($v, $path) = @_;
    if (ref $v eq "HASH") { walk($v->{$_}, "$path/$_") for sort keys %$v; }
    elsif (ref $v eq "ARRAY") { walk($_, $path) for @$v; }
    else { my $p = substr($path, 1); print "$p=$v\0"; } }
walk(\%conf, "");
"#;
        let output = std::process::Command::new("perl")
            .args(["-e", script])
            .arg(&file)
            .output()
            .expect("perl runs (package perl)");
        assert!(
            output.status.success(),
            "package libconfig-general-perl is needed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        let theirs: Vec<&str> = text.split_terminator('\0').collect();
        assert_eq!(flat(&read(&file).unwrap()), theirs);
    }

    #[test]
    fn includes_are_expanded_where_they_stand() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("conf.d")).unwrap();
        std::fs::write(path("conf.d/b.conf"), "two 2\n").unwrap();
        std::fs::write(path("conf.d/a.conf"), "one 1\n").unwrap();
        std::fs::write(path("conf.d/c.txt"), "no 0\n").unwrap();
        let text = "zero 0\ninclude conf.d/*.conf\n<<include conf.d/a.conf>>\ninclude nowhere/*.conf\nend 9\n";
        std::fs::write(path("main.conf"), text).unwrap();
        let nodes = read(&path("main.conf")).unwrap();
        let keys: Vec<&str> = nodes.iter().map(|node| &*node.key).collect();
        assert_eq!(keys, ["zero", "one", "two", "one", "end"]);
        assert_eq!(
            (nodes[2].line, nodes[2].file.file_name().unwrap().to_str()),
            (1, Some("b.conf"))
        );
        // A file without * must be there, and files must not include each other.
        std::fs::write(path("main.conf"), "include gone.conf\n").unwrap();
        let problem = read(&path("main.conf")).unwrap_err();
        assert!(
            problem.to_string().contains("gone.conf: cannot read"),
            "{problem}"
        );
        std::fs::write(path("main.conf"), "include main.conf\n").unwrap();
        assert!(read(&path("main.conf")).is_err());
    }

    #[test]
    fn broken_blocks_are_told_with_their_line() {
        let broken = |text: &str| parse(Path::new("f"), text, 0).unwrap_err().to_string();
        assert_eq!(broken("a b\n<target x>\n"), "f:2: <target> has no end");
        assert_eq!(broken("</target>\n"), "f:1: </target> ends nothing");
        let crossed = "<target x>\n<backing-store y>\n</target>\n";
        assert_eq!(
            broken(crossed),
            "f:3: </target> ends <backing-store> of line 2"
        );
        assert_eq!(broken("<target\n"), "f:1: `<target` is no block");
        assert_eq!(broken("x <<END\n"), "f:1: no end END of the text");
        assert!(broken(&"<a>\n".repeat(20)).contains("too many blocks"));
    }

    #[test]
    fn patterns_fit() {
        assert!(fits("*.conf", "a.conf") && fits("a?c*", "abcde") && fits("*", ""));
        assert!(!fits("*.conf", "a.conf~") && !fits("?", ""));
        assert!(!fits(&"*a".repeat(200), &"a".repeat(100)));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[ -~\n<>#\\\\]{0,200}") {
            let _ = parse(Path::new("nowhere/f"), &text.replace("nclude", "x"), 0);
        }
    }
}
