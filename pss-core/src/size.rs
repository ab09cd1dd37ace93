//! Sizes as people write them: `10G`, `512MiB`, `+1T`.

use std::fmt;

/// A new size: absolute, or so much more than now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SizeChange {
    /// Exactly this many bytes.
    To(u64),
    /// This many bytes more (`+10G`).
    Grow(u64),
}

impl SizeChange {
    /// Parses `10G` or `+10G`.
    ///
    /// # Errors
    /// As [`parse_size`].
    pub fn parse(text: &str) -> Result<SizeChange, SizeError> {
        match text.strip_prefix('+') {
            Some(more) => Ok(SizeChange::Grow(parse_size(more)?)),
            None => Ok(SizeChange::To(parse_size(text)?)),
        }
    }

    /// The new size of something that has `now` bytes; `None` past 2^64 - 1.
    pub fn apply(self, now: u64) -> Option<u64> {
        match self {
            SizeChange::To(bytes) => Some(bytes),
            SizeChange::Grow(bytes) => now.checked_add(bytes),
        }
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SizeError {
    /// Nothing, or no digit in front.
    #[error("'{text}' is no size: write a whole number and a unit, such as 512M, 10G or 2T")]
    NoNumber {
        /// What was given.
        text: String,
    },
    /// A fraction.
    #[error("'{text}' is no size: write a whole number of a smaller unit, such as 1536M for 1.5G")]
    Fraction {
        /// What was given.
        text: String,
    },
    /// A unit that means 1000 to some and 1024 to others.
    #[error(
        "'{text}' is ambiguous: write {number}{letter} or {number}{letter}iB for powers of 1024, or the number of bytes"
    )]
    Ambiguous {
        /// What was given.
        text: String,
        /// Its number.
        number: String,
        /// Its unit without the B.
        letter: char,
    },
    /// An unknown unit.
    #[error(
        "'{text}' has an unknown unit '{unit}': use K, M, G, T, P or E (powers of 1024), or none for bytes"
    )]
    UnknownUnit {
        /// What was given.
        text: String,
        /// The unit.
        unit: String,
    },
    /// Zero.
    #[error("'{text}' is zero: a size is at least one byte")]
    Zero {
        /// What was given.
        text: String,
    },
    /// 2^64 bytes or more.
    #[error("'{text}' is too large: the most that can be written is 15E")]
    TooLarge {
        /// What was given.
        text: String,
    },
}

const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Parses a size in bytes: a bare number counts bytes; `K M G T P E`, also as `KiB`, are powers of
/// 1024, in upper or lower case.
///
/// # Errors
/// [`SizeError`]; also for zero, and for `KB`, `MB` ..., which are ambiguous.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let owned = || shorten(text);
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    if digits.is_empty() {
        return Err(SizeError::NoNumber { text: owned() });
    }
    if unit.starts_with(['.', ',']) {
        return Err(SizeError::Fraction { text: owned() });
    }
    let shift = unit_shift(text, digits, unit)?;
    let number: u64 = digits
        .parse()
        .map_err(|_| SizeError::TooLarge { text: owned() })?;
    if number == 0 {
        return Err(SizeError::Zero { text: owned() });
    }
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| SizeError::TooLarge { text: owned() })
}

fn unit_shift(text: &str, digits: &str, unit: &str) -> Result<u32, SizeError> {
    let mut letters = unit.chars();
    let Some(letter) = letters.next() else {
        return Ok(0);
    };
    let unknown = || SizeError::UnknownUnit {
        text: shorten(text),
        unit: shorten(unit),
    };
    let letter = letter.to_ascii_uppercase();
    let power = UNITS
        .iter()
        .position(|known| *known == letter)
        .ok_or_else(unknown)?;
    match letters.as_str() {
        "" | "i" => {}
        rest if rest.eq_ignore_ascii_case("ib") => {}
        rest if rest.eq_ignore_ascii_case("b") => {
            return Err(SizeError::Ambiguous {
                text: shorten(text),
                number: shorten(digits),
                letter,
            });
        }
        _ => return Err(unknown()),
    }
    Ok(10 * (power as u32 + 1))
}

/// Input that is quoted in a message is not repeated without bound.
fn shorten(text: &str) -> String {
    const MOST: usize = 64;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A size for people: `512`, `10G`, `1.5T`. Powers of 1024; exact if it ends without a fraction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        let power = (63 - (bytes | 1).leading_zeros()) / 10;
        let Some(letter) = power.checked_sub(1).map(|index| UNITS[index as usize]) else {
            return f.pad(&bytes.to_string());
        };
        let unit = 1u64 << (10 * power);
        let text = if bytes.is_multiple_of(unit) {
            format!("{}{letter}", bytes / unit)
        } else {
            // Rounded down: a size is never shown as more than there is.
            let tenths = u128::from(bytes) * 10 / u128::from(unit);
            format!("{}.{}{letter}", tenths / 10, tenths % 10)
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bare_numbers_are_bytes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1"), Ok(1));
        assert_eq!(parse_size("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn units_are_powers_of_1024() {
        for (power, letter) in UNITS.into_iter().enumerate() {
            let expected = Ok(3 << (10 * (power + 1)));
            let lower = letter.to_ascii_lowercase();
            for unit in [
                format!("{letter}"),
                format!("{lower}"),
                format!("{letter}iB"),
                format!("{lower}ib"),
                format!("{letter}i"),
            ] {
                assert_eq!(parse_size(&format!("3{unit}")), expected, "{unit}");
            }
        }
    }

    #[test]
    fn decimal_units_are_refused_with_the_remedy() {
        let message = parse_size("10GB").unwrap_err().to_string();
        assert!(message.contains("ambiguous"), "{message}");
        assert!(message.contains("10G or 10GiB"), "{message}");
        assert!(matches!(
            parse_size("5mb"),
            Err(SizeError::Ambiguous { letter: 'M', .. })
        ));
    }

    #[test]
    fn wrong_sizes() {
        assert!(matches!(
            parse_size("10X"),
            Err(SizeError::UnknownUnit { .. })
        ));
        assert!(matches!(
            parse_size("10G "),
            Err(SizeError::UnknownUnit { .. })
        ));
        assert!(matches!(
            parse_size("10B"),
            Err(SizeError::UnknownUnit { .. })
        ));
        for zero in ["0", "0G", "000"] {
            assert!(matches!(parse_size(zero), Err(SizeError::Zero { .. })));
        }
        for none in ["", "G", "-1", "+1", " 1", "GiB", "ü"] {
            assert!(matches!(parse_size(none), Err(SizeError::NoNumber { .. })));
        }
        for large in ["16E", "18446744073709551616", "99999999999999999999999999T"] {
            assert!(matches!(parse_size(large), Err(SizeError::TooLarge { .. })));
        }
        assert!(matches!(
            parse_size("1.5G"),
            Err(SizeError::Fraction { .. })
        ));
    }

    #[test]
    fn relative_sizes() {
        assert_eq!(SizeChange::parse("+1K"), Ok(SizeChange::Grow(1024)));
        assert_eq!(SizeChange::parse("1K"), Ok(SizeChange::To(1024)));
        assert_eq!(SizeChange::Grow(24).apply(1000), Some(1024));
        assert_eq!(SizeChange::Grow(1).apply(u64::MAX), None);
        assert!(SizeChange::parse("++1K").is_err());
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1K"),
            (1536, "1.5K"),
            (10 << 30, "10G"),
            ((1 << 30) - 1, "1023.9M"),
            (u64::MAX, "15.9E"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>6}", Size(1024)), "    1K");
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in any::<String>()) {
            if let Err(error) = SizeChange::parse(&text) {
                prop_assert!(error.to_string().len() < 1000);
            }
        }

        #[test]
        fn exact_sizes_are_read_back(bytes in 1..u64::MAX) {
            let text = Size(bytes).to_string();
            if !text.contains('.') {
                prop_assert_eq!(parse_size(&text), Ok(bytes));
            }
        }

        #[test]
        fn number_and_unit(number in 1u64..1 << 30, power in 0usize..3) {
            let text = format!("{number}{}", UNITS[power]);
            prop_assert_eq!(parse_size(&text), Ok(number << (10 * (power + 1))));
        }
    }
}
