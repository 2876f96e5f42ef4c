//! State, end to end on real directories: captured, saved, restored, under
//! hostile trees, crashes at each step, and a store that fails at each call.
//!
//! Needs root: trees of other owners are made and given away.
#![expect(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod checkpoints;
mod contract;
mod faults;
mod history;
mod hostile;
mod redo;
mod roundtrip;
mod slots;
mod support;
