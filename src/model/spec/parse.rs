//! Reads a spec and collects every violation.

use super::{SpecDefaults, Violation, WorkloadSpec};

/// Parses a spec from a JSON object in the shape of DESIGN's example.
///
/// # Errors
/// Every violation, in the order of the fields; never an empty list.
pub fn parse(value: &serde_json::Value, defaults: &SpecDefaults) -> Result<WorkloadSpec, Vec<Violation>> {
    let _ = (value, defaults);
    todo!("written by the script slice")
}
