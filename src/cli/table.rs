//! Aligned tables and safe text for a terminal.

/// Lays rows out in columns, two spaces apart; columns of numbers to the right.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let is_number = |column: usize| {
        rows.iter().all(|row| row.get(column).is_some_and(|cell| cell.bytes().all(|b| b.is_ascii_digit())))
    };
    let width = |column: usize| {
        let cells = rows.iter().map(|row| cell(row, column).chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let columns: Vec<(usize, bool)> =
        (0..header.len()).map(|column| (width(column), is_number(column))).collect();
    let line = |cells: &dyn Fn(usize) -> String| {
        let parts: Vec<String> = columns
            .iter()
            .enumerate()
            .map(|(column, (width, is_number))| {
                let text = cells(column);
                if *is_number { format!("{text:>width$}") } else { format!("{text:<width$}") }
            })
            .collect();
        parts.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&|column| header[column].to_owned());
    for row in &rows {
        text += &line(&|column| cell(row, column));
    }
    text
}

/// Escapes control characters: what a tenant or a script wrote must not drive
/// the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

/// Escapes control characters in each line.
pub(super) fn printable_lines(text: &str) -> String {
    text.lines().map(|line| printable(line) + "\n").collect()
}

/// Shows bytes as people read them.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Shows a time span by its two largest units, as `3m 12s`.
pub(super) fn span(ms: u64) -> String {
    let s = ms / 1000;
    match (s / 86_400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_numbers_stand_right() {
        let rows = [["web", "3", "a"], ["longer", "12", ""]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            table(&["NAME", "READY", "NOTE"], &rows),
            "NAME    READY  NOTE\nweb         3  a\nlonger     12\n"
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc\u{9b}"), "a\\u{1b}[31mb\\nc\\u{9b}");
        assert_eq!(printable("grün"), "grün");
    }

    #[test]
    fn sizes_and_spans_are_short() {
        let sizes = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ];
        for (n, text) in sizes {
            assert_eq!(bytes(n), text);
        }
        for (ms, text) in [(0, "0s"), (61_000, "1m 1s"), (3_660_000, "1h 1m"), (90_000_000, "1d 1h")] {
            assert_eq!(span(ms), text);
        }
    }
}
