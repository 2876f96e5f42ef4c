//! Boilerhouse keeps pools of pre-warmed, hardened containers and hands them to
//! tenants over REST, with the tenant's own state and secrets inside.
//!
//! The order of the modules below is the law of the crate: a module imports
//! only from modules above it. `tests/tidy.rs` holds the exact table.
//! (`pool` stands above `state` and `script` because the pool's actor prepares
//! and wipes slots through the [`state::SlotFiles`] port.)

// Leaves, for anyone.
pub mod clock;
pub mod config;
pub mod lifecycle;
pub mod retry;
pub mod seal;
pub mod telemetry;

pub mod model;

pub mod disk;
pub mod journal;
pub mod runtime;
pub mod store;

pub mod script;
pub mod state;

pub mod pool;

pub mod tenancy;

pub mod client;

pub mod api;
pub mod upkeep;

pub mod app;

pub mod cli;
