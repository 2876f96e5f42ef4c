//! The states of a claim, and where a claim got its slot and state from.
//!
//! ```text
//! claiming → active → releasing → dirty → clean
//!     └────────┴──────────↑         └→ conflict
//! ```
//! A claim that fails while `claiming` goes through `releasing` too when the
//! tenant's code may have run, and is dropped when it cannot have run.

use serde::{Deserialize, Serialize};

/// Where a claim stands in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClaimState {
    /// The binding is journaled; the slot is being filled. Code may run.
    Claiming,
    /// The slot is the tenant's.
    Active,
    /// The container is being stopped.
    Releasing,
    /// The container is gone; the state is on this node only.
    Dirty,
    /// The state is in the store and was read back.
    Clean,
    /// The store has a newer epoch than this claim's: the tree is kept, an
    /// operator decides.
    Conflict,
}

/// Where the slot of a claim came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClaimSource {
    /// The claim was there already; nothing was done.
    Existing,
    /// A slot kept for this tenant.
    Parked,
    /// A ready slot.
    Warm,
    /// A slot that had to be waited for: warming, or created for this claim.
    Cold,
}

/// Where the state of a claim came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateSource {
    /// The store proved that there is no snapshot: the tenant starts empty.
    None,
    /// The node's cache had the newest tree.
    Cache,
    /// The newest snapshot was restored from the store.
    Store,
}

/// Says that a step from one claim state to another is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a claim cannot go from {from:?} to {to:?}")]
pub struct IllegalStep {
    /// The state the claim is in.
    pub from: ClaimState,
    /// The state that was asked for.
    pub to: ClaimState,
}

impl ClaimState {
    /// Returns `to` if a claim may go there from here.
    ///
    /// # Errors
    /// [`IllegalStep`] names both states.
    pub fn step(self, to: ClaimState) -> Result<ClaimState, IllegalStep> {
        use ClaimState::{Active, Claiming, Clean, Conflict, Dirty, Releasing};
        let allowed = match self {
            Claiming => matches!(to, Active | Releasing),
            Active => matches!(to, Releasing),
            Releasing => matches!(to, Dirty),
            Dirty => matches!(to, Clean | Conflict),
            Clean | Conflict => false,
        };
        if allowed { Ok(to) } else { Err(IllegalStep { from: self, to }) }
    }

    /// Returns the name used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Claiming => "claiming",
            Self::Active => "active",
            Self::Releasing => "releasing",
            Self::Dirty => "dirty",
            Self::Clean => "clean",
            Self::Conflict => "conflict",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ClaimState::*;

    #[test]
    fn only_a_save_ends_a_dirty_claim() {
        for to in [Claiming, Active, Releasing, Dirty] {
            assert!(Dirty.step(to).is_err(), "{to:?}");
        }
        assert_eq!(Dirty.step(Clean), Ok(Clean));
        assert!(Active.step(Clean).is_err(), "a claim cannot be clean before it was captured");
    }
}
