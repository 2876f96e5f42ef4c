//! `NAME=VALUE` arguments.
//!
//! They are not parsed by `clap`, whose messages repeat the argument: what was
//! mistyped may be a secret (P11).

use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::Failure;
use crate::model::Secret;

/// Bytes of a secret at most; the server's own limit is on the whole body.
const MAX_SECRET_BYTES: u64 = 1024 * 1024;

/// Where the content of a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    File(PathBuf),
    Stdin,
}

/// Reads `--env NAME=VALUE`.
pub(super) fn env(arguments: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let mut env = BTreeMap::new();
    for argument in arguments {
        let (name, value) = split(argument)
            .ok_or_else(|| Failure::Usage("--env wants NAME=VALUE, as --env LOG_LEVEL=debug".to_owned()))?;
        if env.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(Failure::Usage(format!("--env has {name} twice")));
        }
    }
    Ok(env)
}

/// Reads `--metadata KEY=VALUE` (a text) and `--metadata '{…}'` (an object).
pub(super) fn metadata(arguments: &[String]) -> Result<Option<Map<String, Value>>, Failure> {
    let mut metadata = Map::new();
    for argument in arguments {
        let entries = if argument.trim_start().starts_with('{') {
            serde_json::from_str::<Map<String, Value>>(argument)
                .map_err(|error| Failure::Usage(format!("--metadata is no JSON object: {error}")))?
        } else {
            let (key, value) = split(argument).ok_or_else(|| {
                Failure::Usage(
                    "--metadata wants KEY=VALUE or a JSON object, as --metadata plan=pro".to_owned(),
                )
            })?;
            Map::from_iter([(key.to_owned(), value.into())])
        };
        for (key, value) in entries {
            if metadata.contains_key(&key) {
                return Err(Failure::Usage(format!("--metadata has {key} twice")));
            }
            metadata.insert(key, value);
        }
    }
    Ok((!arguments.is_empty()).then_some(metadata))
}

/// Reads `NAME=@FILE` or `NAME=-`; `what` is the argument's name.
pub(super) fn secret_source(what: &str, argument: &str) -> Result<(String, Content), Failure> {
    let wanted = || {
        Failure::Usage(format!(
            "{what} wants NAME=@FILE, or NAME=- to read standard input; a secret itself is no argument, \
             because other users of the machine can see those"
        ))
    };
    let (name, source) = split(argument).ok_or_else(wanted)?;
    let content = match (source, source.strip_prefix('@')) {
        ("-", _) => Content::Stdin,
        (_, Some(path)) if !path.is_empty() => Content::File(path.into()),
        _ => return Err(wanted()),
    };
    Ok((name.to_owned(), content))
}

/// Reads every `--secret`, and then the contents.
pub(super) fn secrets(arguments: &[String], stdin: impl Read) -> Result<BTreeMap<String, Secret>, Failure> {
    let mut sources = BTreeMap::new();
    for argument in arguments {
        let (name, content) = secret_source("--secret", argument)?;
        if content == Content::Stdin && sources.values().any(|other| *other == Content::Stdin) {
            return Err(Failure::Usage("standard input can be one secret only".to_owned()));
        }
        if sources.insert(name.clone(), content).is_some() {
            return Err(Failure::Usage(format!("--secret has {name} twice")));
        }
    }
    let mut stdin = Some(stdin);
    let mut secrets = BTreeMap::new();
    for (name, content) in sources {
        let secret = match content {
            Content::File(path) => read_file(&path)?,
            Content::Stdin => match stdin.take() {
                Some(stdin) => read(stdin, "standard input")?,
                None => return Err(Failure::Usage("standard input can be one secret only".to_owned())),
            },
        };
        secrets.insert(name, secret);
    }
    Ok(secrets)
}

/// Reads a secret's content from where it is.
pub(super) fn read_content(content: &Content, stdin: impl Read) -> Result<Secret, Failure> {
    match content {
        Content::File(path) => read_file(path),
        Content::Stdin => read(stdin, "standard input"),
    }
}

fn read_file(path: &Path) -> Result<Secret, Failure> {
    let shown = path.display().to_string();
    let file = std::fs::File::open(path)
        .map_err(|error| Failure::Input { what: shown.clone(), problem: error.to_string() })?;
    read(file, &shown)
}

fn read(source: impl Read, what: &str) -> Result<Secret, Failure> {
    let input = |problem: String| Failure::Input { what: what.to_owned(), problem };
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    source.take(MAX_SECRET_BYTES + 1).read_to_end(&mut bytes).map_err(|error| input(error.to_string()))?;
    if bytes.len() as u64 > MAX_SECRET_BYTES {
        return Err(input(format!("is larger than {MAX_SECRET_BYTES} bytes")));
    }
    if std::str::from_utf8(&bytes).is_err() {
        return Err(input("is not UTF-8 text; encode it, as base64 does".to_owned()));
    }
    Ok(Secret::new(bytes.to_vec()))
}

fn split(argument: &str) -> Option<(&str, &str)> {
    argument.split_once('=').filter(|(name, _)| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn env_keeps_everything_after_the_first_equals_sign() {
        let found = env(&words(&["A=b=c", "EMPTY="])).unwrap();
        assert_eq!(found, [("A", "b=c"), ("EMPTY", "")].map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        for bad in [&["A"][..], &["=x"], &["A=1", "A=2"]] {
            assert!(matches!(env(&words(bad)), Err(Failure::Usage(_))), "{bad:?}");
        }
    }

    #[test]
    fn metadata_is_joined_from_pairs_and_objects() {
        let found = metadata(&words(&["plan=pro", r#"{"seats": 3, "tags": ["a"]}"#])).unwrap();
        assert_eq!(json!(found), json!({"plan": "pro", "seats": 3, "tags": ["a"]}));
        assert_eq!(metadata(&[]).unwrap(), None);
        for bad in [&["plan"][..], &["{"], &["a=1", r#"{"a": 2}"#]] {
            assert!(matches!(metadata(&words(bad)), Err(Failure::Usage(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_comes_from_a_file_or_stdin_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "from file\n").unwrap();
        let file = format!("a=@{}", path.display());
        let found = secrets(&words(&[&file, "b=-"]), "from stdin\n".as_bytes()).unwrap();
        assert_eq!(found["a"].expose(), b"from file\n");
        assert_eq!(found["b"].expose(), b"from stdin\n");
    }

    /// P11: a secret on the command line is refused, and not repeated.
    #[test]
    fn a_secret_is_no_argument() {
        for bad in
            [&["key=hunter2"][..], &["hunter2"], &["key=@"], &["key="], &["a=-", "b=-"], &["a=-", "a=-"]]
        {
            let failure = secrets(&words(bad), "".as_bytes()).unwrap_err();
            assert!(matches!(&failure, Failure::Usage(_)), "{bad:?}");
            assert!(!failure.to_string().contains("hunter2"), "{failure}");
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let large = vec![b'x'; usize::try_from(MAX_SECRET_BYTES).unwrap() + 1];
        for (content, problem) in [(&b"\xff"[..], "UTF-8"), (&large, "larger")] {
            let failure = read_content(&Content::Stdin, content).unwrap_err();
            assert!(failure.to_string().contains(problem), "{failure}");
        }
        let failure = read_content(&Content::File("/nonexistent/key".into()), "".as_bytes()).unwrap_err();
        assert!(failure.to_string().contains("/nonexistent/key"), "{failure}");
    }
}
