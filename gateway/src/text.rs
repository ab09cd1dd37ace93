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

/// Unicode's zero-width characters, and those that order text (UAX #9).
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_steer_the_terminal() {
        assert_eq!(printable("größe 1"), "größe 1");
        assert_eq!(printable("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(printable("a\u{9b}b\u{7f}"), "a\\u{9b}b\\u{7f}");
        assert_eq!(printable("\u{202e}gpj.x"), "\\u{202e}gpj.x");
        assert_eq!(printable("a\u{200b}b"), "a\\u{200b}b");
    }
}
