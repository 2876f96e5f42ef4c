//! What is wrong with a script, where, and how to put it right.

use std::fmt;

use serde::Serialize;

use super::source::SourceFile;

/// One finding about a script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Whether it stops the script from being loaded.
    pub severity: Severity,
    /// The file, as it was given to the loader.
    pub file: String,
    /// The line, from 1; `None` when it concerns the whole file.
    pub line: Option<usize>,
    /// The column in characters, from 1.
    pub column: Option<usize>,
    /// What is wrong, as a lower-case fragment.
    pub message: String,
    /// The text of the line.
    pub source_line: Option<String>,
    /// The spec's field at fault, e.g. `pool.max`.
    pub field: Option<String>,
    /// How to put it right: what is allowed, what was probably meant.
    pub help: Option<String>,
    /// The calls that led there, innermost first.
    pub stack: Vec<Frame>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The script is not loaded.
    Error,
    /// The script is loaded; an operator should look.
    Warning,
}

/// One call on the way to an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The function that was called.
    pub function: String,
    /// The file of the call.
    pub file: String,
    /// The line of the call.
    pub line: Option<usize>,
    /// The column of the call.
    pub column: Option<usize>,
}

/// A line and a column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

// === impl Place ===

impl Place {
    /// Takes over a position of the engine's, if it is one.
    pub(super) fn of(position: rhai::Position) -> Option<Self> {
        Some(Self { line: position.line()?, column: position.position().unwrap_or(1) })
    }
}

// === impl Diagnostic ===

impl Diagnostic {
    /// Makes an error about a whole file, or about something that is no file.
    pub(super) fn whole(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            file: file.into(),
            line: None,
            column: None,
            message: message.into(),
            source_line: None,
            field: None,
            help: None,
            stack: Vec::new(),
        }
    }

    /// Makes an error about a place in a file.
    pub(super) fn at(file: &SourceFile, place: Option<Place>, message: impl Into<String>) -> Self {
        let mut diagnostic = Self::whole(file.name.clone(), message);
        diagnostic.point_at(file, place);
        diagnostic
    }

    /// Shows a place of its file.
    pub(super) fn point_at(&mut self, file: &SourceFile, place: Option<Place>) {
        self.line = place.map(|place| place.line);
        self.column = place.map(|place| place.column);
        self.source_line = place.and_then(|place| file.line(place.line)).map(str::to_owned);
    }

    /// Says how to put it right.
    #[must_use]
    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Says how to put it right, if that is known.
    #[must_use]
    pub(super) fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    /// Names the spec's field at fault.
    #[must_use]
    pub(super) fn field(mut self, path: impl Into<String>) -> Self {
        self.field = Some(path.into());
        self
    }

    /// Makes it a warning.
    #[must_use]
    pub(super) fn warning(mut self) -> Self {
        self.severity = Severity::Warning;
        self
    }

    /// Returns whether it stops the script from being loaded.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// Orders findings as a reader goes through them.
    pub(super) fn order(&self) -> (String, Option<usize>, Option<usize>) {
        (self.file.clone(), self.line, self.column)
    }

    /// Returns `file:line:column` as far as it is known.
    pub fn place(&self) -> String {
        match (self.line, self.column) {
            (Some(line), Some(column)) => format!("{}:{line}:{column}", self.file),
            (Some(line), None) => format!("{}:{line}", self.file),
            _ => self.file.clone(),
        }
    }
}

impl fmt::Display for Diagnostic {
    /// Writes the form that people know from compilers, without a final line break.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}\n --> {}", self.message, self.place())?;
        let number = self.line.map_or_else(String::new, |line| line.to_string());
        let margin = " ".repeat(number.len());
        if let Some(source_line) = &self.source_line {
            // The caret's line repeats tabs, so that it stands below its column however wide they are.
            let before: String = source_line
                .chars()
                .take(self.column.unwrap_or(1).saturating_sub(1))
                .map(|c| if c == '\t' { '\t' } else { ' ' })
                .collect();
            write!(f, "\n{margin} |\n{number} | {source_line}\n{margin} | {before}^")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n{margin} = help: {help}")?;
        }
        for frame in &self.stack {
            let at = match (frame.line, frame.column) {
                (Some(line), Some(column)) => format!("{}:{line}:{column}", frame.file),
                _ => frame.file.clone(),
            };
            write!(f, "\n{margin} = in `{}`, called at {at}", frame.function)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnostic_reads_like_a_compilers() {
        let file = SourceFile::new("workloads/a.rhai", "fn workload() {\n\t#{ idd: 1 }\n}\n");
        let text = Diagnostic::at(&file, Some(Place { line: 2, column: 5 }), "unknown field `idd`")
            .help("did you mean `id`?")
            .to_string();
        let expected = "error: unknown field `idd`\n --> workloads/a.rhai:2:5\n  |\n2 | \t#{ idd: 1 }\n  | \t   ^\n  = help: did you mean `id`?";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_place_outside_the_file_does_no_harm() {
        let file = SourceFile::new("a", "x");
        for (line, column) in [(9, 1), (1, 99), (usize::MAX, usize::MAX)] {
            let text = Diagnostic::at(&file, Some(Place { line, column }), "m").to_string();
            assert!(text.starts_with("error: m\n --> a:"), "{text}");
        }
    }
}
