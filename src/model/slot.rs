//! The phases of a slot's life.
//!
//! ```text
//! creating → warming → ready → claimed → releasing → retiring
//!                                  └→ stranded, lost ┘
//! ```

use serde::{Deserialize, Serialize};

/// Where a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotPhase {
    /// Capacity is reserved, the container is being created.
    Creating,
    /// The container runs, its health check has not passed yet.
    Warming,
    /// May be handed to a tenant.
    Ready,
    /// Belongs to a tenant.
    Claimed,
    /// Its state is being captured.
    Releasing,
    /// Kept, paused, for the same tenant.
    Parked,
    /// Its state could not be taken out of it yet; it is kept until it can.
    Stranded,
    /// Its container died under a tenant; its data is kept and captured.
    Lost,
    /// Being destroyed.
    Retiring,
}

/// Says that a step from one phase to another is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a slot cannot go from {from:?} to {to:?}")]
pub struct IllegalStep {
    /// The phase the slot is in.
    pub from: SlotPhase,
    /// The phase that was asked for.
    pub to: SlotPhase,
}

impl SlotPhase {
    /// Returns `to` if a slot may go there from here.
    ///
    /// # Errors
    /// [`IllegalStep`] names both phases.
    pub fn step(self, to: SlotPhase) -> Result<SlotPhase, IllegalStep> {
        use SlotPhase::{Claimed, Creating, Lost, Parked, Ready, Releasing, Retiring, Stranded, Warming};
        let allowed = match self {
            Creating => matches!(to, Warming | Retiring),
            Warming => matches!(to, Ready | Retiring),
            Ready => matches!(to, Claimed | Retiring),
            Claimed => matches!(to, Releasing | Lost | Stranded),
            Lost => matches!(to, Releasing | Stranded),
            Releasing => matches!(to, Parked | Stranded | Retiring),
            Stranded => matches!(to, Releasing | Retiring),
            Parked => matches!(to, Claimed | Retiring),
            Retiring => false,
        };
        if allowed { Ok(to) } else { Err(IllegalStep { from: self, to }) }
    }

    /// Returns the name used in JSON, labels and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Warming => "warming",
            Self::Ready => "ready",
            Self::Claimed => "claimed",
            Self::Releasing => "releasing",
            Self::Parked => "parked",
            Self::Stranded => "stranded",
            Self::Lost => "lost",
            Self::Retiring => "retiring",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::SlotPhase::*;

    /// P4: from a phase in which a tenant's code may have run, no path leads to `ready`.
    #[test]
    fn nothing_a_tenant_touched_becomes_ready_again() {
        let all = [Creating, Warming, Ready, Claimed, Releasing, Parked, Stranded, Lost, Retiring];
        let mut reached = vec![Claimed];
        let mut at = 0;
        while at < reached.len() {
            for to in all {
                if reached[at].step(to).is_ok() && !reached.contains(&to) {
                    reached.push(to);
                }
            }
            at += 1;
        }
        assert!(!reached.contains(&Ready), "{reached:?}");
        assert!(reached.contains(&Retiring));
    }

    #[test]
    fn an_illegal_step_names_both_phases() {
        let error = Retiring.step(Ready).unwrap_err().to_string();
        assert_eq!(error, "a slot cannot go from Retiring to Ready");
    }
}
