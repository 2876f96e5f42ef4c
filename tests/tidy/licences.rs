//! The licences of everything that is linked in or builds it.

/// Licences that ask for no more than a notice, or (MPL-2.0) for the sources of
/// the files they cover.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "MPL-2.0+",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Zlib",
];

/// Says why a licence expression does not allow use; `None` when it does.
pub(crate) fn refusal(expression: Option<&str>) -> Option<String> {
    let Some(expression) = expression else {
        return Some("names no licence".to_owned());
    };
    // Crates of old write `MIT/Apache-2.0`, which meant OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    match any_of(&words, &mut at) {
        Some(true) if at == words.len() => None,
        Some(false) if at == words.len() => {
            Some(format!("is under {expression:?}, which is not on the list"))
        }
        _ => Some(format!("has a licence that cannot be read: {expression:?}")),
    }
}

fn any_of(words: &[&str], at: &mut usize) -> Option<bool> {
    let mut allowed = all_of(words, at)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= all_of(words, at)?;
    }
    Some(allowed)
}

fn all_of(words: &[&str], at: &mut usize) -> Option<bool> {
    let mut allowed = one(words, at)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= one(words, at)?;
    }
    Some(allowed)
}

fn one(words: &[&str], at: &mut usize) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let allowed = any_of(words, at)?;
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return closed.then_some(allowed);
    }
    if matches!(word, ")" | "OR" | "AND" | "WITH") {
        return None;
    }
    let mut licence = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        licence = format!("{word} WITH {}", words.get(*at + 1)?);
        *at += 2;
    }
    Some(ALLOWED.contains(&licence.as_str()))
}
