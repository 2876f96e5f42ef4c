//! Reads Rust source as far as the checks need it: tokens without comments and
//! literals, which of them are test code, and the paths that are named.
//!
//! Text alone would find `rhai::` in a comment; a full parser would be a
//! dependency larger than what it guards.

use std::path::Path;

/// One token of a file: an identifier, a number, `::`, or one punctuation mark.
/// A string or character literal is the token `"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    /// Its text.
    pub(crate) text: String,
    /// Its line, from 1.
    pub(crate) line: usize,
    /// Whether it belongs to an item under `#[cfg(test)]`.
    pub(crate) in_test: bool,
}

/// A path that a file names, in a `use` or in passing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedPath {
    /// Its segments; relative ones (`self`, `super`) are resolved and begin with `crate`.
    pub(crate) segments: Vec<String>,
    /// The line it begins on.
    pub(crate) line: usize,
    /// Whether it belongs to an item under `#[cfg(test)]`.
    pub(crate) in_test: bool,
}

/// A file of `src`, read.
#[derive(Debug)]
pub(crate) struct Source {
    /// Its tokens.
    pub(crate) tokens: Vec<Token>,
    /// The paths it names.
    pub(crate) paths: Vec<NamedPath>,
    /// Modules that it declares (`mod x;` or `mod x {`), and whether only for tests.
    pub(crate) modules: Vec<(String, bool)>,
    /// Names that its `use` lines bring in, other than by their crate's name.
    pub(crate) imported: Vec<String>,
}

/// Reads one file; `path` is relative to the package, as in `src/pool/actor.rs`.
pub(crate) fn read(path: &Path, text: &str) -> Source {
    let mut tokens = tokenize(text);
    mark_tests(&mut tokens);
    let mut reader = PathReader { tokens: &tokens, module: module_of(path), inline: Vec::new(), depth: 0 };
    let (paths, imported) = reader.read();
    let modules = declared_modules(&tokens);
    Source { paths, modules, imported, tokens }
}

/// Returns the module that a file holds: `src/pool/actor.rs` is `[pool, actor]`, `src/lib.rs` is `[]`.
pub(crate) fn module_of(path: &Path) -> Vec<String> {
    let mut module: Vec<String> = path
        .with_extension("")
        .components()
        .skip(1)
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    module
}

fn tokenize(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let (mut i, mut line) = (0, 1);
    while i < chars.len() {
        let (start, start_line) = (i, line);
        let c = chars[i];
        let text = if c.is_whitespace() {
            i += 1;
            None
        } else if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
            None
        } else if c == '/' && at(i + 1) == '*' {
            i = end_of_block_comment(&chars, i);
            None
        } else if let Some(end) = end_of_raw_string(&chars, i) {
            i = end;
            Some("\"".to_owned())
        } else if c == '"' || (matches!(c, 'b' | 'c') && at(i + 1) == '"') {
            i = end_of_quoted(&chars, i + usize::from(c != '"'), '"');
            Some("\"".to_owned())
        } else if c == '\'' || (c == 'b' && at(i + 1) == '\'') {
            let quote = i + usize::from(c == 'b');
            if at(quote + 1) == '\\' || at(quote + 2) == '\'' {
                i = end_of_quoted(&chars, quote, '\'');
                Some("\"".to_owned())
            } else {
                i = end_of_word(&chars, quote + 1);
                None
            }
        } else if c == 'r' && at(i + 1) == '#' && is_word(at(i + 2)) {
            i = end_of_word(&chars, i + 2);
            Some(chars[start + 2..i].iter().collect())
        } else if is_word(c) {
            i = end_of_word(&chars, i);
            Some(chars[start..i].iter().collect())
        } else if c == ':' && at(i + 1) == ':' {
            i += 2;
            Some("::".to_owned())
        } else {
            i += 1;
            Some(c.to_string())
        };
        line += chars[start..i.min(chars.len())].iter().filter(|c| **c == '\n').count();
        tokens.extend(text.map(|text| Token { text, line: start_line, in_test: false }));
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn end_of_word(chars: &[char], from: usize) -> usize {
    chars[from.min(chars.len())..].iter().position(|c| !is_word(*c)).map_or(chars.len(), |n| from + n)
}

fn end_of_quoted(chars: &[char], open: usize, quote: char) -> usize {
    let mut i = open + 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}

fn end_of_block_comment(chars: &[char], open: usize) -> usize {
    let (mut i, mut depth) = (open + 2, 1);
    while i < chars.len() && depth > 0 {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
    }
    i
}

/// Returns where `r"…"`, `r#"…"#`, `br"…"` or `cr"…"` ends, if one begins at `open`.
fn end_of_raw_string(chars: &[char], open: usize) -> Option<usize> {
    let mut i = open + usize::from(matches!(chars[open], 'b' | 'c'));
    if chars.get(i) != Some(&'r') {
        return None;
    }
    i += 1;
    let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
    i += hashes;
    if chars.get(i) != Some(&'"') {
        return None;
    }
    let mut close = vec!['"'];
    close.extend(std::iter::repeat_n('#', hashes));
    let body = i + 1;
    let found = chars[body..].windows(close.len()).position(|window| window == close);
    Some(found.map_or(chars.len(), |n| body + n + close.len()))
}

/// Marks every item that stands under an attribute like `#[cfg(test)]`.
fn mark_tests(tokens: &mut [Token]) {
    let mut i = 0;
    while i < tokens.len() {
        let Some(end) = end_of_attribute(tokens, i) else {
            i += 1;
            continue;
        };
        let words: Vec<&str> = tokens[i..end].iter().map(|token| token.text.as_str()).collect();
        let only_tests = words.get(2) == Some(&"cfg") && words.contains(&"test") && !words.contains(&"not");
        if !only_tests {
            i = end;
            continue;
        }
        let mut item = end;
        while let Some(next) = end_of_attribute(tokens, item) {
            item = next;
        }
        let item_end = end_of_item(tokens, item);
        for token in &mut tokens[i..item_end] {
            token.in_test = true;
        }
        i = item_end;
    }
}

/// Returns where the attribute that begins at `open` ends, if one does.
fn end_of_attribute(tokens: &[Token], open: usize) -> Option<usize> {
    if tokens.get(open)?.text != "#" {
        return None;
    }
    let bracket = open + 1 + usize::from(tokens.get(open + 1)?.text == "!");
    if tokens.get(bracket)?.text != "[" {
        return None;
    }
    Some(end_of_group(tokens, bracket))
}

/// Returns the index after the bracket that closes the one at `open`.
fn end_of_group(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Returns the index after an item: its `;`, or its body in braces.
fn end_of_item(tokens: &[Token], from: usize) -> usize {
    let is_use = tokens[from..].iter().take(4).any(|token| token.text == "use");
    let mut i = from;
    while i < tokens.len() {
        match tokens[i].text.as_str() {
            ";" | "," => return i + 1,
            "{" if is_use => i = end_of_group(tokens, i),
            "{" => return end_of_group(tokens, i),
            "(" | "[" => i = end_of_group(tokens, i),
            _ => i += 1,
        }
    }
    i
}

fn declared_modules(tokens: &[Token]) -> Vec<(String, bool)> {
    tokens
        .windows(3)
        .filter(|window| window[0].text == "mod" && matches!(window[2].text.as_str(), ";" | "{"))
        .map(|window| (window[1].text.clone(), window[0].in_test))
        .collect()
}

/// Walks the tokens of one file and collects the paths they name.
struct PathReader<'a> {
    tokens: &'a [Token],
    /// The file's module.
    module: Vec<String>,
    /// Modules written inside the file, each with the depth of its opening brace.
    inline: Vec<(String, usize)>,
    depth: usize,
}

// === impl PathReader ===

impl PathReader<'_> {
    fn text(&self, i: usize) -> &str {
        self.tokens.get(i).map_or("", |token| token.text.as_str())
    }

    fn is_name(&self, i: usize) -> bool {
        self.text(i).starts_with(|c: char| c.is_alphabetic() || c == '_')
    }

    fn read(&mut self) -> (Vec<NamedPath>, Vec<String>) {
        let (mut paths, mut imported) = (Vec::new(), Vec::new());
        let mut i = 0;
        while i < self.tokens.len() {
            match self.text(i) {
                "mod" if self.is_name(i + 1) && self.text(i + 2) == "{" => {
                    self.inline.push((self.text(i + 1).to_owned(), self.depth));
                    i += 2;
                    continue;
                }
                "{" => self.depth += 1,
                "}" => {
                    self.depth = self.depth.saturating_sub(1);
                    self.inline.pop_if(|(_, depth)| *depth == self.depth);
                }
                "use" if self.text(i + 1) != "<" => {
                    let mut leaves = Vec::new();
                    let end = self.use_tree(i + 1, &[], &mut leaves);
                    for (segments, name) in leaves {
                        if segments.first() != Some(&name) || segments.len() > 1 {
                            imported.push(name);
                        }
                        paths.push(self.named(segments, i));
                    }
                    i = end;
                    continue;
                }
                _ if self.is_name(i) && !self.continues(i) => {
                    let mut segments = vec![self.text(i).to_owned()];
                    let start = i;
                    while self.text(i + 1) == "::" && self.is_name(i + 2) {
                        i += 2;
                        segments.push(self.text(i).to_owned());
                    }
                    // `name::<…>` and `name::{` name a path of one segment too.
                    if segments.len() > 1 || self.text(i + 1) == "::" {
                        paths.push(self.named(segments, start));
                    }
                }
                _ => {}
            }
            i += 1;
        }
        (paths, imported)
    }

    /// Whether the name at `i` goes on a path or a method call that began before it.
    fn continues(&self, i: usize) -> bool {
        if i == 0 {
            return false;
        }
        match self.text(i - 1) {
            "." | "$" => true,
            "::" => i >= 2 && (self.is_name(i - 2) || self.text(i - 2) == ">"),
            _ => false,
        }
    }

    /// Reads one tree of a `use`; returns the index after it.
    fn use_tree(&self, mut i: usize, prefix: &[String], leaves: &mut Vec<(Vec<String>, String)>) -> usize {
        let mut segments = prefix.to_vec();
        loop {
            match self.text(i) {
                "::" => i += 1,
                "{" => {
                    i += 1;
                    while i < self.tokens.len() && self.text(i) != "}" {
                        i = self.use_tree(i, &segments, leaves);
                        i += usize::from(self.text(i) == ",");
                    }
                    return i + 1;
                }
                "*" => {
                    leaves.push((segments, "*".to_owned()));
                    return i + 1;
                }
                "as" => {
                    leaves.push((segments, self.text(i + 1).to_owned()));
                    return i + 2;
                }
                "self" if !segments.is_empty() => i += 1,
                _ if self.is_name(i) => {
                    segments.push(self.text(i).to_owned());
                    i += 1;
                }
                _ => {
                    let name = segments.last().cloned().unwrap_or_default();
                    leaves.push((segments, name));
                    return i;
                }
            }
        }
    }

    /// Resolves `crate`, `self` and `super` at the front of a path.
    fn named(&self, segments: Vec<String>, at: usize) -> NamedPath {
        let token = &self.tokens[at];
        let mut base: Vec<String> = Vec::new();
        let mut rest = segments.as_slice();
        if matches!(segments[0].as_str(), "self" | "super") {
            base.clone_from(&self.module);
            base.extend(self.inline.iter().map(|(name, _)| name.clone()));
            while let Some((first, tail)) = rest.split_first() {
                match first.as_str() {
                    "self" => {}
                    "super" => drop(base.pop()),
                    _ => break,
                }
                rest = tail;
            }
            base.insert(0, "crate".to_owned());
        }
        base.extend_from_slice(rest);
        NamedPath { segments: base, line: token.line, in_test: token.in_test }
    }
}
