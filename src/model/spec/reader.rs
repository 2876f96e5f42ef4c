//! Walks JSON by hand and remembers every violation on the way.
//!
//! serde stops at the first error, without a place; a spec's author is better
//! served by all of them, each with the path of its field.

use std::{cell::RefCell, collections::BTreeMap};

use serde_json::{Map, Value};

use super::{
    Violation,
    fields::{self, Kind},
};
use crate::model::suggest::closest;

/// The most violations that are reported.
const MAX_VIOLATIONS: usize = 100;
/// The most entries of one list or free map.
const MAX_ENTRIES: usize = 1000;
/// The longest text, in bytes: Linux refuses a longer argument.
const MAX_TEXT_BYTES: usize = 128 * 1024 - 1;

/// Collects violations.
#[derive(Debug, Default)]
pub(super) struct Sink(RefCell<Vec<Violation>>);

/// One map of the spec, its keys already checked and in snake_case.
pub(super) struct Section<'a> {
    path: String,
    values: BTreeMap<&'static str, &'a Value>,
    sink: &'a Sink,
}

/// Joins a path and a name.
pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Returns the camelCase spelling of a snake_case name.
pub(crate) fn camel(name: &str) -> String {
    let mut upper = false;
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        if c == '_' {
            upper = true;
        } else if std::mem::take(&mut upper) {
            text.push(c.to_ascii_uppercase());
        } else {
            text.push(c);
        }
    }
    text
}

/// Names the type of a value and shows it, cut to a readable length.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "()".to_owned(),
        Value::Object(_) => "a map".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::String(text) => {
            let cut: String = text.chars().take(60).collect();
            let more = if cut.len() < text.len() { "…" } else { "" };
            format!("{:?}", cut + more)
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// Lists names for the words *allowed*.
pub(super) fn listed<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}

// === impl Sink ===

impl Sink {
    /// Remembers a violation.
    pub(super) fn add(
        &self,
        path: impl Into<String>,
        problem: impl Into<String>,
        allowed: impl Into<String>,
    ) {
        let mut violations = self.0.borrow_mut();
        if violations.len() < MAX_VIOLATIONS {
            violations.push(Violation {
                path: path.into(),
                problem: problem.into(),
                allowed: allowed.into(),
            });
        }
    }

    /// Returns whether nothing was violated.
    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Takes the violations out.
    pub(super) fn into_inner(self) -> Vec<Violation> {
        self.0.into_inner()
    }

    /// Reads a text: no NUL, not too long.
    pub(super) fn text(&self, path: &str, value: &Value) -> Option<String> {
        match value {
            Value::String(text) if text.contains('\0') => {
                self.add(path, "holds a zero byte", "text without zero bytes");
                None
            }
            Value::String(text) if text.len() > MAX_TEXT_BYTES => {
                let problem = format!("is {} bytes long", text.len());
                self.add(path, problem, format!("at most {MAX_TEXT_BYTES} bytes"));
                None
            }
            Value::String(text) => Some(text.clone()),
            Value::Number(_) | Value::Bool(_) => {
                let problem = format!("expected text, found {}", shown(value));
                self.add(path, problem, format!("text, e.g. \"{value}\""));
                None
            }
            _ => {
                self.add(path, format!("expected text, found {}", shown(value)), "text");
                None
            }
        }
    }

    /// Reads a whole number in a range.
    pub(super) fn integer(&self, path: &str, value: &Value, min: u64, max: u64) -> Option<u64> {
        let allowed = Kind::Integer { min, max }.to_string();
        let Value::Number(number) = value else {
            self.add(path, format!("expected a whole number, found {}", shown(value)), allowed);
            return None;
        };
        match number.as_u64() {
            Some(number) if (min..=max).contains(&number) => Some(number),
            None if !number.is_i64() => {
                self.add(path, format!("expected a whole number, found {number}"), allowed);
                None
            }
            _ => {
                self.add(path, format!("{number} is out of range"), allowed);
                None
            }
        }
    }

    /// Reads a list of texts.
    pub(super) fn texts(&self, path: &str, value: &Value) -> Option<Vec<String>> {
        let Value::Array(values) = value else {
            let allowed =
                if value.is_string() { "a list of texts, e.g. [\"a\", \"b\"]" } else { "a list of texts" };
            self.add(path, format!("expected a list, found {}", shown(value)), allowed);
            return None;
        };
        if values.len() > MAX_ENTRIES {
            self.add(path, format!("has {} entries", values.len()), format!("at most {MAX_ENTRIES}"));
            return None;
        }
        let texts: Vec<_> = values
            .iter()
            .enumerate()
            .map(|(index, value)| self.text(&format!("{path}[{index}]"), value))
            .collect();
        texts.into_iter().collect()
    }
}

// === impl Section ===

impl<'a> Section<'a> {
    /// Opens the map at `path`, whose allowed keys are the table's children of it.
    pub(super) fn open(path: &str, value: &'a Value, sink: &'a Sink) -> Option<Self> {
        let Value::Object(map) = value else {
            let allowed = format!("a map of {}", listed(fields::children(path)));
            sink.add(path, format!("expected a map, found {}", shown(value)), allowed);
            return None;
        };
        Some(Self { path: path.to_owned(), values: known_keys(path, map, sink), sink })
    }

    fn path_of(&self, name: &str) -> String {
        join(&self.path, name)
    }

    fn kind(&self, name: &str) -> Kind {
        fields::lookup(&self.path_of(name)).kind
    }

    /// Returns a field's value; `()` is the same as leaving it out.
    pub(super) fn value(&self, name: &str) -> Option<&'a Value> {
        self.values.get(name).copied().filter(|value| !value.is_null())
    }

    /// Reports a field.
    pub(super) fn violate(&self, name: &str, problem: impl Into<String>, allowed: impl Into<String>) {
        self.sink.add(self.path_of(name), problem, allowed);
    }

    /// Reports that a field is not there.
    pub(super) fn missing(&self, name: &str) {
        let path = self.path_of(name);
        let allowed = fields::lookup(&path).kind.to_string();
        self.sink.add(path, "is required", allowed);
    }

    /// Opens a section below this one; an absent one reads as empty.
    pub(super) fn section(&self, name: &str) -> Self {
        self.optional(name).unwrap_or_else(|| Self {
            path: self.path_of(name),
            values: BTreeMap::new(),
            sink: self.sink,
        })
    }

    /// Opens a section below this one, if it is there and a map.
    pub(super) fn optional(&self, name: &str) -> Option<Self> {
        let value = self.value(name)?;
        Self::open(&self.path_of(name), value, self.sink)
    }

    /// Reads text.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.sink.text(&self.path_of(name), self.value(name)?)
    }

    /// Reads text that must be there.
    pub(super) fn required_text(&self, name: &str) -> Option<String> {
        if self.value(name).is_none() {
            self.missing(name);
        }
        self.text(name)
    }

    /// Reads a list of texts.
    pub(super) fn texts(&self, name: &str) -> Option<Vec<String>> {
        self.sink.texts(&self.path_of(name), self.value(name)?)
    }

    /// Reads a flag, or its default.
    pub(super) fn flag(&self, name: &str) -> bool {
        match self.value(name) {
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.violate(name, format!("expected true or false, found {}", shown(other)), "true, false");
                false
            }
            None => self.default(name).as_bool().unwrap_or_default(),
        }
    }

    /// Reads a whole number in the table's range, if it is there.
    pub(super) fn given_integer(&self, name: &str) -> Option<u64> {
        let Kind::Integer { min, max } = self.kind(name) else {
            unreachable!("{name} is an integer in the table");
        };
        self.sink.integer(&self.path_of(name), self.value(name)?, min, max)
    }

    /// Reads a whole number in the table's range, or its default.
    pub(super) fn integer(&self, name: &str) -> u64 {
        self.given_integer(name).unwrap_or_else(|| self.default(name).as_u64().unwrap_or_default())
    }

    /// Reads a number, whole or not, in the table's range, or its default.
    pub(super) fn number(&self, name: &str) -> f64 {
        let kind = self.kind(name);
        let Kind::Number { min, max } = kind else {
            unreachable!("{name} is a number in the table");
        };
        match self.value(name) {
            None => self.default(name).as_f64().unwrap_or_default(),
            Some(value) => match value.as_f64() {
                Some(number) if (min..=max).contains(&number) => number,
                Some(number) => {
                    self.violate(name, format!("{number} is out of range"), kind.to_string());
                    min
                }
                None => {
                    let problem = format!("expected a number, found {}", shown(value));
                    self.violate(name, problem, kind.to_string());
                    min
                }
            },
        }
    }

    /// Reads one of the table's texts, or the default.
    pub(super) fn choice(&self, name: &str) -> &'static str {
        let Kind::Choice(choices) = self.kind(name) else {
            unreachable!("{name} is a choice in the table");
        };
        let first = choices.first().copied().unwrap_or_default();
        match self.value(name) {
            None => {
                let default = self.default(name);
                choices.iter().copied().find(|choice| Some(*choice) == default.as_str()).unwrap_or(first)
            }
            Some(value) => match choices.iter().copied().find(|choice| Some(*choice) == value.as_str()) {
                Some(choice) => choice,
                None => {
                    let problem = format!("{} is not known here", shown(value));
                    self.violate(name, problem, self.kind(name).to_string());
                    first
                }
            },
        }
    }

    /// Reads a map with free keys; `read` gets each entry's path, key and value.
    pub(super) fn entries<T>(
        &self,
        name: &str,
        mut read: impl FnMut(&str, &str, &Value) -> Option<T>,
    ) -> BTreeMap<String, T> {
        let path = self.path_of(name);
        match self.value(name) {
            None => BTreeMap::new(),
            Some(Value::Object(map)) if map.len() > MAX_ENTRIES => {
                self.violate(name, format!("has {} entries", map.len()), format!("at most {MAX_ENTRIES}"));
                BTreeMap::new()
            }
            Some(Value::Object(map)) => map
                .iter()
                .filter_map(|(key, value)| {
                    read(&join(&path, key), key, value).map(|read| (key.clone(), read))
                })
                .collect(),
            Some(other) => {
                let problem = format!("expected a map, found {}", shown(other));
                self.violate(name, problem, self.kind(name).to_string());
                BTreeMap::new()
            }
        }
    }

    fn default(&self, name: &str) -> Value {
        serde_json::from_str(fields::lookup(&self.path_of(name)).default).unwrap_or(Value::Null)
    }
}

/// Sorts the keys of a map into known fields, whichever way they are spelt.
fn known_keys<'a>(path: &str, map: &'a Map<String, Value>, sink: &Sink) -> BTreeMap<&'static str, &'a Value> {
    let mut values = BTreeMap::new();
    for (key, value) in map {
        let Some(name) = fields::children(path).find(|name| key == name || *key == camel(name)) else {
            let hint = closest(key, fields::children(path))
                .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let allowed = listed(fields::children(path));
            sink.add(join(path, key), format!("unknown field `{key}`{hint}"), allowed);
            continue;
        };
        if values.insert(name, value).is_some() {
            let problem = format!("is given twice, as `{name}` and as `{}`", camel(name));
            sink.add(join(path, name), problem, "one of the two spellings");
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn camel_case_is_the_original_readmes() {
        for (snake, expected) in [
            ("container_path", "containerPath"),
            ("health_check", "healthCheck"),
            ("interval_ms", "intervalMs"),
            ("id", "id"),
        ] {
            assert_eq!(camel(snake), expected);
        }
    }
}
