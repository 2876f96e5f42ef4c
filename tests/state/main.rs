//! State, end to end on real directories: captured, saved, restored, under
//! hostile trees, crashes at each step, and a store that fails at each call.
//!
//! Needs root: trees of other owners are made and given away.
#![expect(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod changes;
mod checkpoints;
mod contract;
mod edits;
mod faults;
mod fixtures;
mod format;
mod histories;
mod history;
mod hostile;
mod limits;
mod mirror;
mod nth;
mod nth_history;
mod places;
mod power;
mod programs;
#[path = "../support/radosgw.rs"]
mod radosgw;
mod redo;
mod roundtrip;
#[path = "../support/s3_server.rs"]
mod s3_server;
mod slots;
mod support;
mod transfer;
