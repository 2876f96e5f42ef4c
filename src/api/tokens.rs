//! The tokens file; its format is in the docs of [`super::Auth`].
//!
//! A message about a line never repeats any of its text: fields in the wrong
//! order would put the token into the log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use zeroize::Zeroizing;

use super::auth::{Scope, Token, digest};
use crate::model::TenantId;

/// Bytes of a tokens file at most.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Characters of a token, at least and at most.
const TOKEN_CHARS: std::ops::RangeInclusive<usize> = 16..=512;

/// Every problem of a tokens file; never an empty list. Prints one a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct AuthErrors(pub Vec<AuthError>);

/// One problem of a tokens file; prints as `file:line: problem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; none when it is about the file.
    pub line: Option<usize>,
    /// What is wrong, and what is allowed.
    pub problem: String,
}

/// Reads a tokens file.
///
/// # Errors
/// Every problem at once.
pub(super) fn read(path: &Path) -> Result<Vec<Token>, AuthErrors> {
    let of_file =
        |problem: String| AuthErrors(vec![AuthError { file: path.to_owned(), line: None, problem }]);
    let unreadable = |error: std::io::Error| of_file(format!("cannot be read: {error}"));
    // Asked before opening, which would wait for ever on a FIFO.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(of_file("is no regular file".to_owned()));
    }
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode();
    if mode & 0o006 != 0 {
        return Err(of_file(format!(
            "others may read or write it (mode {:04o}); chmod 600, or 640 with a group of its own",
            mode & 0o7777
        )));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(of_file(format!("is larger than {MAX_FILE_BYTES} bytes")));
    }
    parse(path, &text)
}

/// Reads the text of a tokens file.
fn parse(file: &Path, text: &str) -> Result<Vec<Token>, AuthErrors> {
    let mut tokens: Vec<Token> = Vec::new();
    let mut problems = Vec::new();
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    let mut digests: BTreeMap<[u8; 32], usize> = BTreeMap::new();
    for (line, content) in (1..).zip(text.lines()) {
        let content = content.trim();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let mut problem =
            |problem: String| problems.push(AuthError { file: file.to_owned(), line: Some(line), problem });
        let fields: Vec<&str> = content.split_ascii_whitespace().collect();
        let [name, scope, token] = fields[..] else {
            problem(format!("has {} fields where three are wanted: name, scope, token", fields.len()));
            continue;
        };
        if !is_name(name) {
            problem(format!("the name does not match {}", crate::model::id::ID_PATTERN));
        } else if let Some(earlier) = names.insert(name, line) {
            problem(format!("the name is that of line {earlier} again"));
        }
        let scope = parse_scope(scope).map_err(&mut problem);
        let digest = parse_token(token).map_err(&mut problem);
        if let Ok(digest) = digest
            && let Some(earlier) = digests.insert(digest, line)
        {
            problem(format!("the token is that of line {earlier} again"));
        }
        if let (Ok(scope), Ok(digest)) = (scope, digest) {
            tokens.push(Token { name: name.into(), scope: Arc::new(scope), digest });
        }
    }
    if tokens.is_empty() && problems.is_empty() {
        let problem = "holds no token, so nobody could use the server".to_owned();
        problems.push(AuthError { file: file.to_owned(), line: None, problem });
    }
    if problems.is_empty() { Ok(tokens) } else { Err(AuthErrors(problems)) }
}

fn parse_scope(text: &str) -> Result<Scope, String> {
    const ALLOWED: &str = "allowed: admin, or tenant:<id>, several of these separated by commas";
    if text == "admin" {
        return Ok(Scope::Admin);
    }
    let mut tenants = BTreeSet::new();
    for part in text.split(',') {
        let Some(id) = part.strip_prefix("tenant:") else {
            return Err(format!("the second field is no scope; {ALLOWED}"));
        };
        let id = TenantId::new(id)
            .map_err(|_| format!("a tenant of the scope does not match {}", crate::model::id::ID_PATTERN))?;
        if !tenants.insert(id) {
            return Err("the scope has a tenant twice".to_owned());
        }
    }
    Ok(Scope::Tenants(tenants))
}

fn parse_token(text: &str) -> Result<[u8; 32], String> {
    if let Some(hash) = text.strip_prefix("sha256:") {
        let mut digest = [0; 32];
        hex::decode_to_slice(hash, &mut digest)
            .map_err(|_| "sha256: is not followed by 64 hexadecimal digits".to_owned())?;
        return Ok(digest);
    }
    let is_token_char = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b);
    if !TOKEN_CHARS.contains(&text.len()) || !text.bytes().all(is_token_char) {
        return Err(format!(
            "a token has {} to {} characters of A-Z a-z 0-9 - . _ ~ + / =, or is sha256:<64 hexadecimal digits>",
            TOKEN_CHARS.start(),
            TOKEN_CHARS.end()
        ));
    }
    Ok(digest(text.as_bytes()))
}

/// Names follow the pattern of ids.
fn is_name(text: &str) -> bool {
    TenantId::new(text).is_ok()
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}", self.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn problems(text: &str) -> Vec<String> {
        let errors = parse(Path::new("tokens"), text).unwrap_err();
        errors.to_string().lines().map(str::to_owned).collect()
    }

    #[test]
    fn tokens_are_read_plain_and_hashed() {
        let text = format!(
            "# comment\n\n  platform\tadmin  {HASH}\nacme tenant:acme 0123456789abcdef\n \
             both tenant:a,tenant:b {}\r\n",
            "x".repeat(512)
        );
        let tokens = parse(Path::new("tokens"), &text).unwrap();
        let names: Vec<&str> = tokens.iter().map(|token| &*token.name).collect();
        assert_eq!(names, ["platform", "acme", "both"]);
        assert_eq!(tokens[0].digest, digest(b"test"));
        assert_eq!(tokens[1].digest, digest(b"0123456789abcdef"));
        assert_eq!(*tokens[0].scope, Scope::Admin);
        let tenants = ["a", "b"].map(|id| TenantId::new(id).unwrap());
        assert_eq!(*tokens[2].scope, Scope::Tenants(tenants.into()));
    }

    #[test]
    fn each_bad_line_is_told_by_its_number() {
        #[rustfmt::skip]
        let rows = [
            ("a admin", "tokens:1: has 2 fields"),
            ("a admin 0123456789abcdef # mine", "tokens:1: has 5 fields"),
            ("-a admin 0123456789abcdef", "tokens:1: the name does not match"),
            ("a root 0123456789abcdef", "tokens:1: the second field is no scope; allowed: admin"),
            ("a Admin 0123456789abcdef", "tokens:1: the second field is no scope"),
            ("a admin,tenant:x 0123456789abcdef", "tokens:1: the second field is no scope"),
            ("a tenant: 0123456789abcdef", "tokens:1: a tenant of the scope does not match"),
            ("a tenant:x, 0123456789abcdef", "tokens:1: the second field is no scope"),
            ("a tenant:x,tenant:x 0123456789abcdef", "tokens:1: the scope has a tenant twice"),
            ("a tenant:* 0123456789abcdef", "tokens:1: a tenant of the scope does not match"),
            ("a admin 0123456789abcde", "tokens:1: a token has 16 to 512 characters"),
            ("a admin 0123456789abcde!", "tokens:1: a token has 16 to 512 characters"),
            ("a admin sha256:9f86", "tokens:1: sha256: is not followed by 64"),
            ("", "tokens: holds no token"),
            ("# a admin 0123456789abcdef", "tokens: holds no token"),
        ];
        for (text, expected) in rows {
            let problems = problems(text);
            assert!(problems.len() == 1 && problems[0].starts_with(expected), "{text:?}: {problems:?}");
        }
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let text =
            "a admin 0123456789abcdef\na admin fedcba9876543210\nb nobody short\nc admin 0123456789abcdef\n";
        let problems = problems(text);
        let starts = [
            "tokens:2: the name is that of line 1",
            "tokens:3: the second field",
            "tokens:3: a token has",
            "tokens:4: the token is that of line 1",
        ];
        assert_eq!(problems.len(), starts.len(), "{problems:?}");
        for (problem, start) in problems.iter().zip(starts) {
            assert!(problem.starts_with(start), "{problem}");
        }
    }

    /// P11: whatever is wrong with a line, its text is not repeated.
    #[test]
    fn no_message_shows_a_token() {
        for text in [
            "hunter2hunter2hunter2 admin name",
            "name hunter2hunter2hunter2 admin",
            "name admin hunter2!hunter2hunter2",
            "name admin hunter2 hunter2 hunter2",
            "name tenant:hunter2!hunter2hunter2 0123456789abcdef",
            "name admin sha256:hunter2hunter2",
            "hunter2/hunter2 admin 0123456789abcdef",
        ] {
            let problems = problems(text).join("\n");
            assert!(!problems.contains("hunter2"), "{text}: {problems}");
        }
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        std::fs::write(&path, "a admin 0123456789abcdef\n").unwrap();
        for (mode, is_good) in [(0o600, true), (0o640, true), (0o400, true), (0o644, false), (0o602, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_ok(), is_good, "{mode:o}");
        }
        let missing = read(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: cannot be read"), "{missing}");
        let folder = read(dir.path()).unwrap_err().to_string();
        assert!(folder.contains("is no regular file"), "{folder}");
    }
}
