//! What is in force, as RON.

use std::fmt::Write as _;

use super::{
    Config,
    settings::{Kind, Setting, settings},
};

pub(super) fn to_ron(config: &Config) -> String {
    let mut text = String::from("(\n");
    let mut parent = "";
    for setting in settings().iter().filter(|setting| !setting.key.is_empty()) {
        let (inside, name) = setting.key.split_once('.').unwrap_or(("", setting.key));
        if inside != parent {
            if !parent.is_empty() {
                text.push_str("    ),\n");
            }
            if !inside.is_empty() {
                let _ = writeln!(text, "    {inside}: (");
            }
            parent = inside;
        }
        let indent = if parent.is_empty() { "    " } else { "        " };
        let _ = writeln!(text, "{indent}{}", line(config, setting, name));
    }
    if !parent.is_empty() {
        text.push_str("    ),\n");
    }
    text.push_str(")\n");
    text
}

fn line(config: &Config, setting: &Setting, name: &str) -> String {
    // The name of a file may hold anything; a line break would end the comment.
    let origin = config.origins.of(setting.key).escape_debug().to_string();
    match ((setting.show)(config), setting.kind) {
        (None, _) => {
            let variables: Vec<_> = setting.variables().collect();
            format!("// {name}: not set ({})", variables.join(" or "))
        }
        (Some(_), Kind::Secret) => format!("// {name}: \"***\", {origin}"),
        (Some(value), Kind::Number | Kind::Truth) => format!("{name}: {value}, // {origin}"),
        (Some(value), Kind::Text) => format!("{name}: {}, // {origin}", quoted(&value)),
    }
}

/// Writes text as RON does.
fn quoted(text: &str) -> String {
    ron::to_string(text).unwrap_or_else(|_| format!("{text:?}"))
}
