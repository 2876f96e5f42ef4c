//! The RON file: its settings as text, each with its place.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use ron::value::RawValue;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{
    error::{ConfigError, unknown},
    settings::{Kind, Setting, UNSUPPORTED, settings},
};

/// A larger file is refused.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A setting as the file gives it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: &'static str,
    pub(super) text: String,
    /// `file:line:column`, of the value.
    pub(super) place: String,
}

/// The fields of a RON struct, in order, their values unread.
struct Fields<'a>(Vec<(String, &'a RawValue)>);

struct FieldsVisitor;

/// Reads the file at `path`; what is wrong with it goes to `errors`.
pub(super) fn read(path: &Path, errors: &mut Vec<ConfigError>) -> Vec<Entry> {
    match source(path) {
        Ok(source) => parse(&path.display().to_string(), &source, errors),
        Err(error) => {
            let problem = format!("{}: cannot be read: {error}", path.display());
            errors.push(ConfigError { source: super::settings::CONFIG_VARIABLE.to_owned(), problem });
            Vec::new()
        }
    }
}

fn source(path: &Path) -> io::Result<String> {
    // Opening a FIFO would otherwise wait for its writer.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut source = String::new();
    file.take(FILE_MAX_BYTES + 1).read_to_string(&mut source)?;
    if source.len() as u64 > FILE_MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is above {FILE_MAX_BYTES} bytes"),
        ));
    }
    Ok(source)
}

/// Reads `source`, calling it `name` in places.
pub(super) fn parse(name: &str, source: &str, errors: &mut Vec<ConfigError>) -> Vec<Entry> {
    let mut reader = Reader { name, source, errors, entries: Vec::new() };
    match ron::from_str::<Fields<'_>>(source) {
        Ok(fields) => reader.fields("", fields),
        Err(error) => {
            let at = error.span.start;
            reader.errors.push(ConfigError {
                source: format!("{name}:{}:{}", at.line, at.col),
                problem: format!("is no RON of the form (api_port: 3000, …): {}", error.code),
            });
        }
    }
    reader.entries
}

struct Reader<'a> {
    name: &'a str,
    source: &'a str,
    errors: &'a mut Vec<ConfigError>,
    entries: Vec<Entry>,
}

// === impl Reader ===

impl Reader<'_> {
    /// Reads the fields of the struct at `parent`, which is empty or ends in a dot.
    fn fields(&mut self, parent: &str, fields: Fields<'_>) {
        let mut seen: Vec<String> = Vec::new();
        for (name, value) in fields.0 {
            let key = format!("{parent}{name}");
            let at_value = self.offset(value.get_ron());
            let at_key = self.source[..at_value].rfind(&name).unwrap_or(at_value);
            if seen.contains(&key) {
                self.wrong(at_key, &key, "is given twice".to_owned());
            } else if let Some((_, _, why)) = UNSUPPORTED.iter().find(|(_, known, _)| *known == key) {
                self.wrong(at_key, &key, (*why).to_owned());
            } else if let Some(setting) =
                settings().iter().find(|setting| setting.key == key && !key.is_empty())
            {
                self.setting(setting, at_value, value);
            } else if parent.is_empty() && settings().iter().any(|known| is_inside(known.key, &key)) {
                match ron::from_str::<Fields<'_>>(value.get_ron()) {
                    Ok(inner) => self.fields(&format!("{key}."), inner),
                    Err(_) => self.wrong(
                        at_value,
                        &key,
                        format!("expects ({})", inside(&key).join(": …, ") + ": …"),
                    ),
                }
            } else {
                let known: Vec<&str> =
                    if parent.is_empty() { outermost() } else { inside(parent.trim_end_matches('.')) };
                self.wrong(at_key, &key, unknown("setting", &name, known.iter().copied()));
            }
            seen.push(key);
        }
    }

    fn setting(&mut self, setting: &'static Setting, at: usize, value: &RawValue) {
        let text = match setting.kind {
            Kind::Number => value
                .into_rust::<u64>()
                .map(|number| number.to_string())
                .map_err(|_| format!("expects a whole number without quotes, such as {}", example(setting))),
            Kind::Truth => value
                .into_rust::<bool>()
                .map(|truth| truth.to_string())
                .map_err(|_| "expects true or false, without quotes".to_owned()),
            Kind::Text | Kind::Secret => {
                value.into_rust::<String>().map_err(|_| "expects text in quotes".to_owned())
            }
        };
        match text {
            Ok(text) => self.entries.push(Entry { key: setting.key, text, place: self.place(at) }),
            Err(problem) => self.wrong(at, setting.key, problem),
        }
    }

    fn wrong(&mut self, at: usize, key: &str, problem: String) {
        let source = format!("{}: {key}", self.place(at));
        self.errors.push(ConfigError { source, problem });
    }

    /// Returns where in the source a part of it begins, past white space.
    fn offset(&self, part: &str) -> usize {
        let part = part.trim_start();
        (part.as_ptr() as usize).saturating_sub(self.source.as_ptr() as usize).min(self.source.len())
    }

    fn place(&self, at: usize) -> String {
        let before = &self.source[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        format!("{}:{line}:{column}", self.name)
    }
}

fn example(setting: &Setting) -> &'static str {
    match setting.default {
        super::settings::Fallback::Value(value) => value,
        super::settings::Fallback::Words(_) => "1",
    }
}

/// Tells whether the dotted `known` lies in the struct `key`.
fn is_inside(known: &str, key: &str) -> bool {
    known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'))
}

/// Returns the field names of the struct `key`.
fn inside(key: &str) -> Vec<&'static str> {
    settings()
        .iter()
        .filter(|known| is_inside(known.key, key))
        .map(|known| &known.key[key.len() + 1..])
        .collect()
}

/// Returns the names allowed at the top of the file.
fn outermost() -> Vec<&'static str> {
    let mut names: Vec<&str> = Vec::new();
    for setting in settings().iter().filter(|setting| !setting.key.is_empty()) {
        let name = setting.key.split('.').next().unwrap_or(setting.key);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

// === impl Fields ===

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("Config", &[], FieldsVisitor)
    }
}

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("settings in parentheses")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key::<Identifier>()? {
            fields.push((name.0, map.next_value()?));
        }
        Ok(Fields(fields))
    }
}

/// A field's name; RON gives it as an identifier, not as text.
struct Identifier(String);

struct IdentifierVisitor;

impl<'de> Deserialize<'de> for Identifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_identifier(IdentifierVisitor)
    }
}

impl Visitor<'_> for IdentifierVisitor {
    type Value = Identifier;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a setting")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Identifier, E> {
        Ok(Identifier(name.to_owned()))
    }
}
