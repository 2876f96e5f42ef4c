//! One hook call while it runs: what its `ctx` refers to.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use futures_util::FutureExt;
use rhai::{Dynamic, EvalAltResult, NativeCallContext};

use super::{
    facts::Facts,
    fault::HookError,
    guard::{Guard, Stop},
    hook::{Hook, Verdict},
    host::{ExecResult, HostError, LogLevel, SharedHost},
};
use crate::clock::SharedClock;

/// The result of a native function that scripts call.
pub(super) type Outcome<T> = Result<T, Box<EvalAltResult>>;

/// Work that a call hands to whoever waits for it.
pub(super) type Relayed = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a hook's `ctx` refers to.
pub(super) struct Call {
    pub(super) hook: Hook,
    pub(super) facts: Facts,
    pub(super) host: Option<SharedHost>,
    pub(super) guard: Arc<Guard>,
    pub(super) clock: SharedClock,
    pub(super) waiter: Waiter,
    /// Whether a secret was turned into text, which reads `***`; shared with the
    /// secrets of this call.
    pub(super) masked: Arc<AtomicBool>,
}

/// What a call's thread has for the task that stands by.
pub(super) enum Message {
    /// Work to be done in the task's runtime.
    Work(Relayed),
    /// The end of the call.
    Done(Result<Verdict, HookError>),
}

/// How the call's own thread waits for the host.
pub(super) enum Waiter {
    /// It drives the work itself.
    Direct(tokio::runtime::Handle),
    /// The task that waits for the hook drives it, so that the work runs in that
    /// task's runtime and on its (perhaps virtual) time.
    Relay(mpsc::Sender<Message>),
}

/// An error of the host as scripts catch it.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) code: &'static str,
    pub(super) message: String,
    /// What the command gave, when one failed.
    pub(super) exec: Option<Arc<ExecResult>>,
}

/// What became of work that was raced against the call's limits.
enum Raced<T> {
    Done(Result<T, HostError>),
    Stopped(Stop),
}

// === impl Call ===

impl Call {
    /// Does work of the host's within the call's limits.
    ///
    /// # Errors
    /// The host's error, which a script can catch; or the end of the script,
    /// which it cannot.
    pub(super) fn wait<T, F>(
        &self,
        context: &NativeCallContext<'_>,
        work: impl FnOnce(SharedHost) -> F,
    ) -> Outcome<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, HostError>> + Send + 'static,
    {
        let work = race(work(self.host(context)?), Arc::clone(&self.guard));
        let raced = match &self.waiter {
            Waiter::Direct(handle) => handle.block_on(work),
            Waiter::Relay(relay) => {
                let (tx, rx) = mpsc::sync_channel(1);
                let relayed: Relayed = Box::pin(async move {
                    let _ = tx.send(work.await);
                });
                let sent = relay.send(Message::Work(relayed)).map_err(drop);
                // The wait is bounded by the race in the other task; when that
                // task goes away, so does its end of the channel.
                sent.and_then(|()| rx.recv().map_err(drop)).unwrap_or(Raced::Stopped(Stop::Cancelled))
            }
        };
        match raced {
            Raced::Done(result) => result.map_err(|error| Failure::from(error).throw(context)),
            Raced::Stopped(why) => {
                self.guard.stop(why.clone());
                Err(EvalAltResult::ErrorTerminated(Dynamic::from(why), context.call_position()).into())
            }
        }
    }

    /// Returns the host.
    ///
    /// # Errors
    /// `unavailable` when the call was given none.
    pub(super) fn host(&self, context: &NativeCallContext<'_>) -> Outcome<SharedHost> {
        self.host.clone().ok_or_else(|| {
            let message = format!("{} has no container to act on", self.hook);
            Failure { code: "unavailable", message, exec: None }.throw(context)
        })
    }

    /// Refuses text in which a secret was replaced by `***`: a password of three
    /// asterisks would be set without anybody noticing.
    pub(super) fn unmasked(&self, context: &NativeCallContext<'_>, text: &str) -> Outcome<()> {
        if text.contains("***") && self.masked.load(Ordering::Relaxed) {
            let message = "a secret was put into this text and reads `***`; \
                           join secrets with `+`, which gives a secret, not with `${…}`";
            return Err(Failure::invalid(message).throw(context));
        }
        Ok(())
    }

    /// Logs on behalf of the script.
    pub(super) fn log(
        &self,
        level: LogLevel,
        message: &str,
        fields: serde_json::Map<String, serde_json::Value>,
    ) {
        if let Some(host) = &self.host {
            host.log(level, message, fields);
            return;
        }
        let (workload, tenant) = (self.facts.workload.id.as_str(), self.facts.tenant.id.as_str());
        let fields = serde_json::Value::Object(fields);
        match level {
            LogLevel::Debug => tracing::debug!(workload, tenant, hook = %self.hook, %fields, "{message}"),
            LogLevel::Info => tracing::info!(workload, tenant, hook = %self.hook, %fields, "{message}"),
            LogLevel::Warn => tracing::warn!(workload, tenant, hook = %self.hook, %fields, "{message}"),
            LogLevel::Error => tracing::error!(workload, tenant, hook = %self.hook, %fields, "{message}"),
        }
    }

    /// Returns milliseconds since the Unix epoch.
    pub(super) fn now_ms(&self) -> u64 {
        self.host.as_ref().map_or_else(|| self.clock.unix_ms(), |host| host.now_ms())
    }
}

/// Races work against the call's limits. Work that is ready wins: what has been
/// done is known.
async fn race<T>(work: impl Future<Output = Result<T, HostError>>, guard: Arc<Guard>) -> Raced<T> {
    tokio::select! {
        biased;
        done = AssertUnwindSafe(work).catch_unwind() => {
            done.map_or(Raced::Stopped(Stop::Panicked), Raced::Done)
        }
        () = tokio::time::sleep_until(guard.timer) => Raced::Stopped(Stop::Deadline),
        () = guard.cancel.cancelled() => Raced::Stopped(Stop::Cancelled),
    }
}

// === impl Failure ===

impl Failure {
    /// Makes the error of a wrong argument.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self { code: "invalid", message: message.into(), exec: None }
    }

    /// Throws it at the place of the call.
    pub(super) fn throw(self, context: &NativeCallContext<'_>) -> Box<EvalAltResult> {
        EvalAltResult::ErrorRuntime(Dynamic::from(self), context.call_position()).into()
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self { code: error.code, message: error.message, exec: None }
    }
}
