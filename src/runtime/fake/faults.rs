//! What the fake engine counts, delays and fails.

use std::{collections::HashMap, time::Duration};

use crate::runtime::{Cause, Error};

/// A method of the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `probe`
    Probe,
    /// `ensure_image`
    EnsureImage,
    /// `create`
    Create,
    /// `start`
    Start,
    /// `inspect`
    Inspect,
    /// `list`
    List,
    /// `exec`
    Exec,
    /// `signal`
    Signal,
    /// `stop`
    Stop,
    /// `restart`
    Restart,
    /// `pause`
    Pause,
    /// `unpause`
    Unpause,
    /// `remove`
    Remove,
    /// `events`
    Events,
}

/// What goes wrong with a call.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It does not happen, and the error says why.
    Fail(Error),
    /// It happens, and the answer is lost: [`Error::Unknown`], of a call that only looks
    /// [`Error::Unavailable`].
    LoseAnswer,
    /// It does not happen, and nobody can tell: the same errors.
    LoseCall,
    /// It does not happen, and the call never ends.
    Hang,
}

/// How a call that got past its faults goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Answer,
    LoseAnswer,
    Hang,
}

/// The counts, delays and faults of each operation.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) is_down: bool,
    counts: [u64; Operation::ALL.len()],
    latencies: [Duration; Operation::ALL.len()],
    planned: HashMap<(Operation, u64), Fault>,
    standing: HashMap<Operation, Fault>,
}

// === impl Operation ===

impl Operation {
    /// Every operation, in the order of the port.
    pub const ALL: [Self; 14] = [
        Self::Probe,
        Self::EnsureImage,
        Self::Create,
        Self::Start,
        Self::Inspect,
        Self::List,
        Self::Exec,
        Self::Signal,
        Self::Stop,
        Self::Restart,
        Self::Pause,
        Self::Unpause,
        Self::Remove,
        Self::Events,
    ];

    /// Returns the name of the port's method.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::EnsureImage => "ensure_image",
            Self::Create => "create",
            Self::Start => "start",
            Self::Inspect => "inspect",
            Self::List => "list",
            Self::Exec => "exec",
            Self::Signal => "signal",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Remove => "remove",
            Self::Events => "events",
        }
    }

    /// The error of a call whose answer is lost.
    pub(super) fn lost(self, target: &str, why: &str) -> Error {
        let source: Cause = std::sync::Arc::new(std::io::Error::other(why.to_owned()));
        match self {
            Self::Probe | Self::EnsureImage | Self::Inspect | Self::List | Self::Events => {
                Error::Unavailable(source)
            }
            _ => Error::Unknown { operation: self.as_str(), target: target.to_owned(), source },
        }
    }
}

// === impl Faults ===

impl Faults {
    pub(super) fn count(&self, operation: Operation) -> u64 {
        self.counts[operation as usize]
    }

    pub(super) fn set_latency(&mut self, operation: Operation, latency: Duration) {
        self.latencies[operation as usize] = latency;
    }

    pub(super) fn plan(&mut self, operation: Operation, nth: u64, fault: Fault) {
        self.planned.insert((operation, nth), fault);
    }

    pub(super) fn plan_all(&mut self, operation: Operation, fault: Option<Fault>) {
        match fault {
            Some(fault) => self.standing.insert(operation, fault),
            None => self.standing.remove(&operation),
        };
    }

    /// Counts a call and decides how it goes on, after which time.
    pub(super) fn enter(&mut self, operation: Operation, target: &str) -> Result<(Duration, Entry), Error> {
        let count = &mut self.counts[operation as usize];
        *count += 1;
        if self.is_down {
            let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            return Err(Error::Unavailable(std::sync::Arc::new(refused)));
        }
        let latency = self.latencies[operation as usize];
        if self.planned.is_empty() && self.standing.is_empty() {
            return Ok((latency, Entry::Answer));
        }
        let fault =
            self.planned.remove(&(operation, *count)).or_else(|| self.standing.get(&operation).cloned());
        match fault {
            None => Ok((latency, Entry::Answer)),
            Some(Fault::LoseAnswer) => Ok((latency, Entry::LoseAnswer)),
            Some(Fault::Hang) => Ok((latency, Entry::Hang)),
            Some(Fault::LoseCall) => Err(operation.lost(target, "the call was lost")),
            Some(Fault::Fail(error)) => Err(error),
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Gives the answer, or loses it.
    pub(super) fn answer<T>(
        self,
        operation: Operation,
        target: &str,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        match self {
            Self::LoseAnswer => Err(operation.lost(target, "the answer was lost")),
            Self::Answer | Self::Hang => result,
        }
    }
}
