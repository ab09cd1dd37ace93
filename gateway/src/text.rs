//! Text of other people, on a terminal.

/// A name for a line of text: what moves the cursor, changes the direction of writing or is not seen is shown escaped,
/// so that no name can look like something else.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() || is_invisible(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// A JSON document for whoever reads it, which may be a terminal: what [`printable`] would not show is escaped as JSON
/// escapes it. It stays the same document.
pub fn printable_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        // Outside of strings there are only line ends of these, and inside none of those.
        match (c.is_control() && c != '\n') || is_invisible(c) {
            // All of them have one UTF-16 unit.
            true => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => shown.push(c),
        }
    }
    shown
}

/// Unicode's zero-width characters, and those that order text (UAX #9).
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
    )
}

/// A number of things: `1 target`, `2 targets`.
pub fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_not_several() {
        assert_eq!(counted(0, "disk"), "0 disks");
        assert_eq!(counted(1, "disk"), "1 disk");
        assert_eq!(counted(2, "disk"), "2 disks");
    }

    #[test]
    fn names_do_not_steer_the_terminal() {
        assert_eq!(printable("größe 1"), "größe 1");
        assert_eq!(printable("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(printable("a\u{9b}b\u{7f}"), "a\\u{9b}b\\u{7f}");
        assert_eq!(printable("\u{202e}gpj.x"), "\\u{202e}gpj.x");
        assert_eq!(printable("a\u{200b}b"), "a\\u{200b}b");
    }

    #[test]
    fn documents_do_not_steer_the_terminal_and_stay_what_they_are() {
        // As serde_json writes it, which escapes what is below U+0020 only.
        let json = "{\n  \"name\": \"gr\u{f6}\u{df}e \u{7f}\u{9b}2J\\u001b\u{202e}\"\n}\n";
        assert_eq!(
            printable_json(json),
            "{\n  \"name\": \"größe \\u007f\\u009b2J\\u001b\\u202e\"\n}\n"
        );
    }
}
