//! Results: written as JSON, shown as a table, put into the README.

use std::{fmt::Write as _, path::Path};

use serde::{Deserialize, Serialize};

use crate::Tool;

/// Between these lines the README's table is rewritten.
const BEGIN: &str = "<!-- figures: state, written by tools/bench-state.sh --readme -->";
const END: &str = "<!-- figures: end -->";

/// What one tool took for one case, in each round that counts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) server: String,
    pub(crate) dest: String,
    pub(crate) tool: String,
    pub(crate) seconds: Vec<f64>,
}

/// All results, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Results(pub(crate) Vec<Row>);

// === impl Row ===

impl Row {
    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        match (sorted.len(), sorted.len() / 2) {
            (0, _) => f64::NAN,
            (length, half) if length % 2 == 1 => sorted[half],
            (_, half) => f64::midpoint(sorted[half - 1], sorted[half]),
        }
    }
}

// === impl Results ===

impl Results {
    /// Adds one figure.
    pub(crate) fn add(&mut self, case: &str, server: &str, dest: &str, tool: Tool, seconds: f64) {
        let is_same = |row: &&mut Row| {
            row.case == case && row.server == server && row.dest == dest && row.tool == tool.name()
        };
        match self.0.iter_mut().find(is_same) {
            Some(row) => row.seconds.push(seconds),
            None => self.0.push(Row {
                case: case.to_owned(),
                server: server.to_owned(),
                dest: dest.to_owned(),
                tool: tool.name().to_owned(),
                seconds: vec![seconds],
            }),
        }
    }

    /// Reads what an earlier run wrote.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        serde_json::from_slice(&text).map(Self).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Writes the list.
    pub(crate) fn write(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_vec_pretty(&self.0).map_err(|error| error.to_string())?;
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Shows medians in seconds, and how many times ours each other is.
    pub(crate) fn table(&self) -> String {
        let mut lines = vec![];
        for row in &self.0 {
            let line = (row.case.as_str(), row.server.as_str(), row.dest.as_str());
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        let mut text = String::from("| case | server | on |");
        let mut rule = String::from("\n|---|---|---|");
        for tool in Tool::ALL {
            let _ = write!(text, " {} |", tool.name());
            rule.push_str("---|");
        }
        text.push_str(&rule);
        for (case, server, dest) in lines {
            let _ = write!(text, "\n| {case} | {server} | {dest} |");
            let median = |tool: Tool| {
                let is_it = |row: &&Row| {
                    (&*row.case, &*row.server, &*row.dest, &*row.tool) == (case, server, dest, tool.name())
                };
                self.0.iter().find(is_it).map(Row::median)
            };
            let ours = median(Tool::Boilerhouse);
            for tool in Tool::ALL {
                let _ = match (median(tool), ours) {
                    (None, _) => write!(text, " |"),
                    (Some(own), Some(ours)) if tool != Tool::Boilerhouse => {
                        write!(text, " {own:.3} s ({:.2} ×) |", own / ours)
                    }
                    (Some(own), _) => write!(text, " {own:.3} s |"),
                };
            }
        }
        text
    }

    /// Puts the table between the marks of the README.
    pub(crate) fn put_into(&self, readme: &Path) -> Result<(), String> {
        let shown = |error| format!("{}: {error}", readme.display());
        let text = std::fs::read_to_string(readme).map_err(shown)?;
        let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
        let (before, after) =
            parts.ok_or_else(|| format!("{} has not both of {BEGIN} and {END}", readme.display()))?;
        let text = format!("{before}{BEGIN}\n{}\n{END}{after}", self.table());
        std::fs::write(readme, text).map_err(shown)
    }
}
