//! Workload scripts: loading, the hooks, and the host port they act through.
//!
//! This module declares [`Host`] and never implements it; `tenancy` does, for
//! one claim.
//!
//! ```text
//! files ─ Sources::read ─► Sources ─ Set::load ─► Set ─► Arc<Workload>
//!                            (compile, imports, lint, workload(), spec)
//! Runner::run(workload, hook, facts, host) ─► Verdict | HookError
//! ```
//!
//! # Invariants
//! - A [`Set`] is whole or not there: any error keeps the old one.
//! - A hook call has its own engine, its own thread while it runs, a wall-clock
//!   deadline that no script code and no host call outlives, and shares nothing
//!   with another call but compiled code.
//! - What a script could do wrong is found when it is loaded, where that is cheap.

mod builtin;
mod call;
mod check;
mod compile;
mod convert;
mod ctx;
mod diagnostic;
mod engine;
mod facts;
mod fault;
mod guard;
mod hook;
mod host;
mod lint;
mod locate;
mod runner;
mod set;
mod source;
#[cfg(test)]
mod testing;
mod threads;
mod workload;

pub use self::{
    check::check,
    ctx::{Primitive, PrimitiveKind, primitives},
    diagnostic::{Diagnostic, Frame, Severity},
    facts::{ClaimFacts, ContainerFacts, Facts, TenantFacts, WorkloadFacts},
    fault::{HookError, HookErrorKind},
    hook::{Hook, HookKind, Verdict},
    host::{ExecCall, ExecResult, Host, HostError, LogLevel, Output, SharedHost},
    runner::{Runner, RunnerOptions},
    set::{LoadOptions, Set},
    source::{SourceFile, Sources},
    workload::Workload,
};
