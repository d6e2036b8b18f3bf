//! Text for people. Text from outside (a server's words, the name of a pool or thread) is escaped and cut to a length,
//! so that it can do nothing to a log or a terminal.
//!
//! All that people see comes through this file: an error's or a table's `Display`, a log record, a name. What programs
//! read (a field, the typed source of a cause) stays as it came. To escape or cut a text twice changes nothing.

use std::fmt::{self, Write};
use std::time::Duration;

/// How much is shown of a cause, in bytes: several times the length of PostgreSQL's own longest errors.
pub(crate) const CAUSE: usize = 1024;
/// How much is shown of a name that anybody may choose, in bytes.
pub(crate) const NAME: usize = 64;

/// The end of a text that was cut.
pub(crate) const CUT: &str = " ... (cut)";

/// Shows what it holds, escaped.
pub(crate) struct Shown<T>(pub(crate) T);

impl<T: fmt::Display> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

/// Escapes what is written to it.
pub(crate) struct Escaping<W>(pub(crate) W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (at, c) in text.char_indices().filter(|&(_, c)| is_harmful(c)) {
            self.0.write_str(&text[plain..at])?;
            write!(self.0, "{}", c.escape_default())?;
            plain = at + c.len_utf8();
        }
        self.0.write_str(&text[plain..])
    }
}

/// The text of `value`, escaped and cut to `limit` bytes. A text that was cut says so. However long the text would be,
/// hardly more than `limit` bytes of it are made.
pub(crate) fn brief(value: impl fmt::Display, limit: usize) -> String {
    let mut text = Brief::new(limit);
    text.push(value);
    text.finish()
}

/// Escaped text up to a limit.
pub(crate) struct Brief {
    text: String,
    limit: usize,
    /// How many bytes of the text stay if it has to be cut, so that there is room for [`CUT`].
    kept: usize,
    is_cut: bool,
}

impl Brief {
    pub(crate) fn new(limit: usize) -> Brief {
        Brief { text: String::new(), limit, kept: 0, is_cut: false }
    }

    /// Adds the text of `value`, as far as there is room.
    pub(crate) fn push(&mut self, value: impl fmt::Display) {
        // An error ends the text: `write_str` returns one at the limit, and the value's own `Display` may.
        let _ = write!(self, "{value}");
    }

    /// The text so far. If it was cut, it ends with [`CUT`].
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }

    pub(crate) fn finish(self) -> String {
        self.text
    }
}

impl Write for Brief {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.is_cut {
                return Err(fmt::Error);
            }
            let before = self.text.len();
            if is_harmful(c) {
                self.text.extend(c.escape_default());
            } else {
                self.text.push(c);
            }
            if self.text.len() > self.limit {
                self.text.truncate(self.kept);
                self.text.push_str(CUT);
                self.is_cut = true;
            } else if before + CUT.len() <= self.limit {
                self.kept = before;
            }
        }
        Ok(())
    }
}

/// Whether a character does more than to be read: it controls a terminal, begins a line, changes the direction of the
/// text or cannot be seen.
pub(crate) fn is_harmful(c: char) -> bool {
    match c {
        ' '..='~' => false,
        _ => {
            c.is_control()
                || matches!(c,
                    '\u{ad}' | '\u{61c}' | '\u{180e}'
                    // Zero-width, the marks of direction, line and paragraph separators, bidirectional embeddings.
                    | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                    | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                    | '\u{e0000}'..='\u{e007f}')
        }
    }
}

/// A duration in three digits and one unit, as one would say it.
pub(crate) struct Short(pub(crate) Duration);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs_f64();
        let text = match s {
            0.0 => "0".to_string(),
            _ if s < 1e-6 => format!("{} ns", self.0.as_nanos()),
            _ if s < 1e-3 => format!("{} us", digits(s * 1e6)),
            _ if s < 1.0 => format!("{} ms", digits(s * 1e3)),
            _ if s < 120.0 => format!("{} s", digits(s)),
            _ if s < 7200.0 => format!("{} min", digits(s / 60.0)),
            _ if s < 172_800.0 => format!("{} h", digits(s / 3600.0)),
            _ => format!("{} d", digits(s / 86_400.0)),
        };
        f.pad(&text)
    }
}

fn digits(x: f64) -> String {
    match x {
        _ if x < 9.995 => format!("{x:.2}"),
        _ if x < 99.95 => format!("{x:.1}"),
        _ => format!("{x:.0}"),
    }
}

/// `1 time`, `2 times`.
pub(crate) struct Times(pub(crate) u64);

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, if self.0 == 1 { "time" } else { "times" })
    }
}

/// How much of a cell is shown, in bytes: a thread and a line of source in a long path fit.
const CELL: usize = 256;

/// Writes rows, of which the first is the head, as a table.
pub(crate) fn write_table<const N: usize>(
    f: &mut fmt::Formatter<'_>,
    rows: impl Iterator<Item = [String; N]>,
) -> fmt::Result {
    let rows: Vec<_> = rows.map(|row| row.map(|cell| brief(cell, CELL))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_text_is_left_alone() {
        for text in ["", "plain, with 'quotes' and a \\ in it", "größer als 10 µs, 東京 🦀"] {
            assert_eq!(Shown(text).to_string(), text);
            assert_eq!(brief(text, 100), text);
        }
    }

    #[test]
    fn a_harmful_character_is_escaped_once() {
        for (text, shown) in [
            ("a\x1b[2Jb", "a\\u{1b}[2Jb"),
            ("one\r\ntwo\tthree", "one\\r\\ntwo\\tthree"),
            ("\0\x07\x08\x7f\u{9b}", "\\u{0}\\u{7}\\u{8}\\u{7f}\\u{9b}"),
            ("abc\u{202e}cba\u{2066}\u{2069}", "abc\\u{202e}cba\\u{2066}\\u{2069}"),
            ("\u{feff}zero\u{200b}width\u{2028}", "\\u{feff}zero\\u{200b}width\\u{2028}"),
            ("tag\u{e0041}", "tag\\u{e0041}"),
        ] {
            assert_eq!(Shown(text).to_string(), shown);
            assert_eq!(Shown(shown).to_string(), shown);
            assert_eq!(brief(text, 100), shown);
        }
    }

    #[test]
    fn a_text_too_long_is_cut_once_and_says_so() {
        for limit in [20, 21, 22, 23, 24, 64] {
            for text in ["x".repeat(1000), "ä".repeat(1000), "\x1b".repeat(1000), "a\n🦀".repeat(1000)] {
                let cut = brief(&text, limit);
                assert!(cut.len() <= limit && cut.ends_with(CUT) && cut.len() > CUT.len(), "{limit}: {cut}");
                // Neither a character nor an escape is cut in two.
                let kept = cut.strip_suffix(CUT).unwrap();
                assert!(Shown(&text).to_string().starts_with(kept) && !kept.ends_with(['\\', 'u', '{', '1', 'b']));
                assert_eq!(brief(&cut, limit), cut);
            }
            assert_eq!(brief("x".repeat(limit), limit), "x".repeat(limit), "what just fits");
        }
    }

    #[test]
    fn no_more_is_made_than_is_shown() {
        struct Endless;
        impl fmt::Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("and so on ")?;
                }
            }
        }
        assert!(brief(Endless, CAUSE).len() <= CAUSE);
        let mut parts = Brief::new(30);
        (0..1000).for_each(|n| parts.push(n));
        assert_eq!(parts.finish(), "01234567891011121314 ... (cut)");
    }

    #[test]
    fn short() {
        let cases = [
            (0, "0"),
            (999, "999 ns"),
            (1_500, "1.50 us"),
            (23_456_000, "23.5 ms"),
            (1_000_000_000, "1.00 s"),
            (600_000_000_000, "10.0 min"),
            (7_200_000_000_000, "2.00 h"),
            (259_200_000_000_000, "3.00 d"),
        ];
        for (ns, text) in cases {
            assert_eq!(Short(Duration::from_nanos(ns)).to_string(), text);
        }
    }
}
