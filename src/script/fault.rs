//! What went wrong in a script, put into words.

use std::{collections::BTreeMap, fmt};

use rhai::{EvalAltResult, Position};

use super::{
    call::Failure,
    diagnostic::{Diagnostic, Frame, Place},
    engine::{self, MAX_CALL_LEVELS},
    guard::Stop,
    hook::Hook,
    source::SourceFile,
};
use crate::model::suggest::closest;

/// The longest thrown text that is kept, in characters.
const MAX_THROWN: usize = 1000;

/// A hook that gave no verdict.
#[derive(Debug, Clone)]
pub struct HookError {
    /// The hook.
    pub hook: Hook,
    /// What sort of failure it was.
    pub kind: HookErrorKind,
    /// Where it happened and how it got there; for the log, not for claimers.
    pub diagnostic: Box<Diagnostic>,
}

/// The sorts of failure of a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HookErrorKind {
    /// Its deadline passed.
    Deadline,
    /// No thread was free within its deadline; it has not begun.
    Busy,
    /// Nobody waits for it any more, or the server shuts down.
    Cancelled,
    /// The script threw.
    Threw,
    /// The script is wrong, or went beyond a limit, or a host call failed.
    Failed,
    /// It returned what is no verdict.
    BadReturn,
    /// The server's own code panicked under it.
    Panicked,
}

/// The files that errors may point into, by name.
pub(super) type Files = BTreeMap<String, SourceFile>;

// === impl HookError ===

impl HookError {
    /// Makes an error that no line of the script is to blame for.
    pub(super) fn outside(hook: Hook, kind: HookErrorKind, file: &str, message: impl Into<String>) -> Self {
        Self { hook, kind, diagnostic: Box::new(Diagnostic::whole(file, message)) }
    }
}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {} at {}", self.hook, self.kind, self.diagnostic.message, self.diagnostic.place())
    }
}

impl std::error::Error for HookError {}

impl HookErrorKind {
    /// Returns its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Busy => "busy",
            Self::Cancelled => "cancelled",
            Self::Threw => "threw",
            Self::Failed => "failed",
            Self::BadReturn => "bad_return",
            Self::Panicked => "panicked",
        }
    }
}

impl fmt::Display for HookErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deadline => "ran out of time",
            Self::Busy => "did not begin",
            Self::Cancelled => "was cancelled",
            Self::Threw => "threw",
            Self::Failed => "failed",
            Self::BadReturn => "returned no verdict",
            Self::Panicked => "panicked",
        })
    }
}

/// Explains an error of the engine's: its sort, and where it happened.
///
/// `entry` is the file of the function that was called; the fault may lie in
/// another, which the engine names.
pub(super) fn explain(error: &EvalAltResult, files: &Files, entry: &str) -> (HookErrorKind, Diagnostic) {
    let mut stack = Vec::new();
    let mut file = entry.to_owned();
    let mut fault = error;
    let mut outer = Position::NONE;
    loop {
        match fault {
            EvalAltResult::ErrorInFunctionCall(name, source, inner, position) => {
                let place = Place::of(*position);
                stack.push(Frame {
                    function: if name.starts_with("anon$") { "a closure".to_owned() } else { name.clone() },
                    file: file.clone(),
                    line: place.map(|place| place.line),
                    column: place.map(|place| place.column),
                });
                if !source.is_empty() {
                    file.clone_from(source);
                }
                outer = *position;
                fault = inner;
            }
            EvalAltResult::ErrorInModule(_, inner, position) => {
                outer = *position;
                fault = inner;
            }
            _ => break,
        }
    }
    stack.reverse();
    let position = if fault.position().is_none() { outer } else { fault.position() };
    let (kind, message, help) = describe(fault);
    let mut diagnostic = match files.get(&file) {
        Some(source) => Diagnostic::at(source, Place::of(position), message),
        None => {
            let place = Place::of(position);
            let mut diagnostic = Diagnostic::whole(file, message);
            diagnostic.line = place.map(|place| place.line);
            diagnostic.column = place.map(|place| place.column);
            diagnostic
        }
    };
    diagnostic.help = help;
    diagnostic.stack = stack;
    (kind, diagnostic)
}

/// Puts the innermost error into words.
fn describe(error: &EvalAltResult) -> (HookErrorKind, String, Option<String>) {
    use HookErrorKind::{Failed, Threw};
    match error {
        EvalAltResult::ErrorTerminated(token, _) => {
            let (kind, message) = stopped(token.read_lock::<Stop>().as_deref());
            (kind, message.to_owned(), None)
        }
        EvalAltResult::ErrorRuntime(thrown, _) => match thrown.read_lock::<Failure>() {
            Some(failure) => {
                let help = failure
                    .exec
                    .is_some()
                    .then(|| "catch it, or use ctx.try_exec, to read what the command wrote".to_owned());
                (Failed, format!("{}: {}", failure.code, failure.message), help)
            }
            None if thrown.is_unit() => (Threw, "threw nothing".to_owned(), None),
            None => (Threw, thrown.to_string().chars().take(MAX_THROWN).collect(), None),
        },
        EvalAltResult::ErrorFunctionNotFound(signature, _) => {
            let name = signature.split(['(', ' ']).next().unwrap_or(signature);
            if engine::library().names.contains(name) {
                // It is there, but not for arguments of these types.
                (Failed, format!("unknown function `{signature}`"), None)
            } else {
                (Failed, format!("unknown function `{name}`"), suggest(name))
            }
        }
        EvalAltResult::ErrorStackOverflow(_) => {
            (Failed, format!("functions call each other more than {MAX_CALL_LEVELS} deep"), None)
        }
        EvalAltResult::ErrorTooManyOperations(_) => (Failed, "does too much work".to_owned(), None),
        EvalAltResult::ErrorDataTooLarge(what, _) => (Failed, format!("{} is too large", lower(what)), None),
        EvalAltResult::ErrorTooManyVariables(_) => (Failed, "too many variables".to_owned(), None),
        other => {
            // The engine's own words end with the place, which is shown beside.
            let text = other.to_string();
            let place = format!(" ({})", other.position());
            (Failed, lower(text.strip_suffix(&place).unwrap_or(&text)), None)
        }
    }
}

/// Puts the end of a call from outside into words.
pub(super) fn stopped(why: Option<&Stop>) -> (HookErrorKind, &'static str) {
    match why {
        Some(Stop::Deadline) => (HookErrorKind::Deadline, "the deadline passed"),
        Some(Stop::Cancelled) | None => (HookErrorKind::Cancelled, "the call was cancelled"),
        Some(Stop::Operations) => (HookErrorKind::Failed, "does too much work"),
        Some(Stop::Panicked) => (HookErrorKind::Panicked, "a function of the server's panicked"),
    }
}

/// Says what an unknown function was probably meant to be.
pub(super) fn suggest(name: &str) -> Option<String> {
    match name {
        "sleep" | "timestamp" | "elapsed" => {
            return Some("hooks do not wait and have no clock of their own; see ctx.now()".to_owned());
        }
        "exit" => return Some("use return".to_owned()),
        _ => {}
    }
    let names = engine::library().names.iter().map(String::as_str);
    closest(name, names).map(|near| format!("did you mean `{near}`?"))
}

/// Lowers the first letter, unless the word is all capitals.
pub(super) fn lower(text: &str) -> String {
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        (Some(first), second) if !second.is_some_and(char::is_uppercase) => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text.to_owned(),
    }
}
