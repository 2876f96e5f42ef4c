//! The one table of hooks, and what a hook may decide.

use std::{collections::BTreeMap, fmt, time::Duration};

/// A function of a workload script that the server calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Decides whether a claim may go ahead.
    BeforeClaim,
    /// Acts before activation, or rejects.
    OnClaim,
    /// Acts before the container is stopped.
    BeforeRelease,
    /// Decides whether the slot is parked or retired.
    AfterRelease,
}

/// What a hook decided.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The hook returned nothing, or is not there: the host's default.
    Default,
    /// Go ahead, with these beside the claim's own.
    Accept {
        /// Environment for the program.
        env: BTreeMap<String, String>,
        /// Laid over the claim's metadata.
        metadata: serde_json::Map<String, serde_json::Value>,
    },
    /// Refuse.
    Reject {
        /// Stable, for programs: `^[a-z][a-z0-9_]{0,62}$`.
        code: String,
        /// For people.
        message: String,
    },
    /// Refuse for now.
    RetryAfter {
        /// How long, in milliseconds.
        ms: u64,
    },
    /// Destroy the slot.
    Retire,
}

/// What a hook is given to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HookKind {
    /// Decides from data alone: a `DecideCtx`, without acting methods.
    Decides,
    /// Acts through the [`Host`](super::Host): an `ActionCtx`.
    Acts,
}

// === impl Hook ===

impl Hook {
    /// Every hook, in the order of a slot's life.
    pub const ALL: [Self; 4] = [Self::BeforeClaim, Self::OnClaim, Self::BeforeRelease, Self::AfterRelease];

    /// Returns the name of its function.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeClaim => "before_claim",
            Self::OnClaim => "on_claim",
            Self::BeforeRelease => "before_release",
            Self::AfterRelease => "after_release",
        }
    }

    /// Returns the hook of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.name() == name)
    }

    /// Returns what it is given to work with.
    pub fn kind(self) -> HookKind {
        match self {
            Self::BeforeClaim | Self::AfterRelease => HookKind::Decides,
            Self::OnClaim | Self::BeforeRelease => HookKind::Acts,
        }
    }

    /// Returns how long it may take where its spec's `timeouts` says nothing.
    pub fn default_deadline(self) -> Duration {
        match self.kind() {
            HookKind::Decides => Duration::from_secs(2),
            HookKind::Acts => Duration::from_secs(30),
        }
    }

    /// Returns the methods of `ctx` whose result it may return.
    pub fn verdicts(self) -> &'static [&'static str] {
        match self {
            Self::BeforeClaim => &["accept", "reject", "retry_after"],
            Self::OnClaim => &["reject"],
            Self::BeforeRelease => &[],
            Self::AfterRelease => &["retire"],
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::HOOKS;

    #[test]
    fn specs_and_scripts_know_the_same_hooks() {
        let names: Vec<_> = Hook::ALL.into_iter().map(Hook::name).collect();
        assert_eq!(names, HOOKS);
        for hook in Hook::ALL {
            assert_eq!(Hook::from_name(hook.name()), Some(hook));
        }
    }
}
