//! What a hook can read of the claim it runs for.

use serde::Serialize;

/// What a script can read of the claim it acts for (`ctx.tenant`, `ctx.claim`, …).
#[derive(Debug, Clone, Default, Serialize)]
pub struct Facts {
    /// `#{id, metadata}`
    pub tenant: TenantFacts,
    /// `#{id, name}`
    pub workload: WorkloadFacts,
    /// `#{epoch, source?, state?}`; before the claim has an epoch, `()`.
    pub claim: Option<ClaimFacts>,
    /// `#{id, name, slot, address?}`; before there is a slot, `()`.
    pub container: Option<ContainerFacts>,
}

/// `ctx.tenant`
#[derive(Debug, Clone, Default, Serialize)]
pub struct TenantFacts {
    /// The tenant's id.
    pub id: String,
    /// The tenant's own metadata overlaid by the claim's; an absent key is `()`.
    pub metadata: serde_json::Map<String, serde_json::Value>,
}

/// `ctx.workload`
#[derive(Debug, Clone, Default, Serialize)]
pub struct WorkloadFacts {
    /// The workload's id.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// `ctx.claim`
#[derive(Debug, Clone, Serialize)]
pub struct ClaimFacts {
    /// The claim's epoch.
    pub epoch: u64,
    /// `warm`, `cold`, …
    pub source: String,
    /// `none`, `cache` or `store`.
    pub state: String,
}

/// `ctx.container`
#[derive(Debug, Clone, Serialize)]
pub struct ContainerFacts {
    /// The engine's id.
    pub id: String,
    /// The container's name.
    pub name: String,
    /// The slot.
    pub slot: String,
    /// Its address, if it has one.
    pub address: Option<String>,
}
