//! Runs hooks: admission, a thread, an engine, a verdict.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::AtomicBool,
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use rhai::{AST, Dynamic, Engine, EvalAltResult, Scope};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    Facts, HookError, HookErrorKind, SharedHost, Verdict,
    call::{Call, Message, Waiter},
    compile::ARGUMENT,
    ctx::{ActionCtx, DecideCtx, Decision, type_of},
    diagnostic::Diagnostic,
    engine, fault,
    guard::Guard,
    hook::{Hook, HookKind},
    host::LogLevel,
    threads::Threads,
    workload::{Compiled, Workload},
};
use crate::clock::{SharedClock, SystemClock};

/// How long a call may overrun its deadline in native code, which nothing can
/// interrupt, before its caller goes on without it.
const GRACE: Duration = Duration::from_secs(2);

/// The sizes of a runner.
#[derive(Clone)]
pub struct RunnerOptions {
    /// Acting hooks that run at one time; each has a thread while it waits for the host.
    pub threads: usize,
    /// Hooks that wait for a thread; those beyond wait for a place, within their deadline.
    pub queue: usize,
    /// Whether the calling task stands still while the script computes and carries
    /// out host calls itself, so that simulations on virtual time are exact.
    pub inline: bool,
    /// The time that `ctx.now()` gives where there is no host.
    pub clock: SharedClock,
}

/// Runs hooks.
pub struct Runner {
    inline: bool,
    clock: SharedClock,
    /// Deciding hooks have threads of their own: they take microseconds and must
    /// not stand behind acting ones, which wait for containers.
    deciding: Lane,
    acting: Lane,
    shutdown: CancellationToken,
}

struct Lane {
    threads: Threads,
    places: Arc<Semaphore>,
}

// === impl RunnerOptions ===

impl Default for RunnerOptions {
    /// 256 acting hooks at one time, 4096 waiting, on the system's time.
    fn default() -> Self {
        Self { threads: 256, queue: 4096, inline: false, clock: Arc::new(SystemClock) }
    }
}

// === impl Runner ===

impl Runner {
    /// Makes a runner; threads are started when they are first needed.
    pub fn new(options: RunnerOptions) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let lane = |name, threads: usize| Lane {
            threads: Threads::new(name, threads),
            places: Arc::new(Semaphore::new(threads.max(1) + options.queue)),
        };
        Self {
            inline: options.inline,
            clock: options.clock,
            deciding: lane("hook-decide", cores.max(2)),
            acting: lane("hook-act", options.threads),
            shutdown: CancellationToken::new(),
        }
    }

    /// Ends every running hook at its next step; later ones do not begin.
    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }

    /// Runs a hook. A workload without it gives [`Verdict::Default`].
    ///
    /// # Errors
    /// [`HookError`] when it gave no verdict, for whatever reason, within its deadline.
    ///
    /// # Cancel safety
    /// Dropping the future ends the script at its next step; what it did is done.
    pub async fn run(
        &self,
        workload: &Arc<Workload>,
        hook: Hook,
        facts: Facts,
        host: Option<SharedHost>,
    ) -> Result<Verdict, HookError> {
        if !workload.has(hook) {
            return Ok(Verdict::Default);
        }
        let cancel = self.shutdown.child_token();
        let _ended_with_the_caller = cancel.clone().drop_guard();
        let guard = Arc::new(Guard::new(workload.deadline(hook), cancel));
        let lane = match hook.kind() {
            HookKind::Decides => &self.deciding,
            HookKind::Acts => &self.acting,
        };
        let entry = workload.compiled().unit.file.name.clone();
        let outside = |kind, message: String| Err(HookError::outside(hook, kind, &entry, message));
        let place = tokio::select! {
            biased;
            place = Arc::clone(&lane.places).acquire_owned() => place.ok(),
            () = tokio::time::sleep_until(guard.timer) => None,
        };
        let Some(place) = place else {
            return outside(HookErrorKind::Busy, "no thread was free within its deadline".to_owned());
        };
        let begin = |waiter| Call {
            hook,
            facts,
            host,
            guard: Arc::clone(&guard),
            clock: Arc::clone(&self.clock),
            waiter,
            masked: Arc::new(AtomicBool::new(false)),
        };
        let workload = Arc::clone(workload);
        if self.inline {
            let (tx, rx) = mpsc::channel();
            let call = begin(Waiter::Relay(tx.clone()));
            let job = move || {
                let _ = tx.send(Message::Done(perform(call, &workload)));
                drop(place);
            };
            return match lane.threads.submit(Box::new(job)) {
                Ok(()) => stand_by(hook, &entry, &guard, rx).await,
                Err(error) => outside(HookErrorKind::Busy, format!("no thread can be started: {error}")),
            };
        }
        let (tx, rx) = oneshot::channel();
        let call = begin(Waiter::Direct(tokio::runtime::Handle::current()));
        let job = move || {
            let _ = tx.send(perform(call, &workload));
            drop(place);
        };
        if let Err(error) = lane.threads.submit(Box::new(job)) {
            return outside(HookErrorKind::Busy, format!("no thread can be started: {error}"));
        }
        match tokio::time::timeout_at(guard.timer + GRACE, rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => outside(HookErrorKind::Panicked, "the hook's thread gave no answer".to_owned()),
            Err(_) => outside(HookErrorKind::Deadline, "the deadline passed in native code".to_owned()),
        }
    }
}

/// Stands still while the script computes, and does its work for the host in
/// between; blocks the thread, which is what an inline runner is for.
async fn stand_by(
    hook: Hook,
    entry: &str,
    guard: &Guard,
    rx: mpsc::Receiver<Message>,
) -> Result<Verdict, HookError> {
    loop {
        match rx.recv_timeout(guard.wall_remaining() + GRACE) {
            Ok(Message::Work(work)) => work.await,
            Ok(Message::Done(result)) => return result,
            Err(RecvTimeoutError::Timeout) => {
                let message = "the deadline passed in native code";
                return Err(HookError::outside(hook, HookErrorKind::Deadline, entry, message));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let message = "the hook's thread gave no answer";
                return Err(HookError::outside(hook, HookErrorKind::Panicked, entry, message));
            }
        }
    }
}

/// Runs one hook from its first to its last line; on a thread with a big stack.
fn perform(call: Call, workload: &Workload) -> Result<Verdict, HookError> {
    let call = Arc::new(call);
    let (hook, compiled) = (call.hook, workload.compiled());
    let whole = |kind, message: String| {
        let place = compiled.unit.function_place(hook.name());
        let diagnostic = Box::new(Diagnostic::at(&compiled.unit.file, place, message));
        Err(HookError { hook, kind, diagnostic })
    };
    let explained = |error: &EvalAltResult| {
        let (kind, mut diagnostic) = fault::explain(error, &compiled.files, &compiled.unit.file.name);
        if diagnostic.line.is_none() && diagnostic.file == compiled.unit.file.name {
            diagnostic.point_at(&compiled.unit.file, compiled.unit.function_place(hook.name()));
        }
        Err(HookError { hook, kind, diagnostic: Box::new(diagnostic) })
    };
    // It may have stood in the queue for long.
    if let Some(why) = call.guard.tick() {
        let (kind, message) = fault::stopped(Some(&why));
        let kind = if kind == HookErrorKind::Deadline { HookErrorKind::Busy } else { kind };
        return whole(kind, format!("{message} before it began"));
    }
    let Some(entry) = compiled.entries.get(&hook) else { return Ok(Verdict::Default) };
    let result = catch_unwind(AssertUnwindSafe(|| evaluate(&call, compiled, entry)));
    match (result, call.guard.stopped()) {
        (Err(_), _) => whole(HookErrorKind::Panicked, "a function of the server's panicked".to_owned()),
        (Ok(Err(error)), _) if matches!(error.unwrap_inner(), EvalAltResult::ErrorTerminated(..)) => {
            explained(&error)
        }
        // Native code can lose the error that ends a script; its result does not count.
        (Ok(_), Some(why)) => {
            let (kind, message) = fault::stopped(Some(&why));
            whole(kind, message.to_owned())
        }
        (Ok(Err(error)), None) => explained(&error),
        (Ok(Ok(value)), None) if value.is_unit() => Ok(Verdict::Default),
        (Ok(Ok(value)), None) => match value.read_lock::<Decision>() {
            Some(decision) => Ok(decision.0.clone()),
            None => {
                let mut may: Vec<_> = hook.verdicts().iter().map(|name| format!("ctx.{name}(…)")).collect();
                may.push("()".to_owned());
                whole(
                    HookErrorKind::BadReturn,
                    format!("returned {}; it may return {}", type_of(&value), may.join(", ")),
                )
            }
        },
    }
}

fn evaluate(call: &Arc<Call>, compiled: &Compiled, entry: &AST) -> Result<Dynamic, Box<EvalAltResult>> {
    let mut engine: Engine = engine::new(&call.guard, compiled.modules.clone());
    let printed = Arc::clone(call);
    engine.on_print(move |text| printed.log(LogLevel::Info, text, serde_json::Map::new()));
    let debugged = Arc::clone(call);
    engine.on_debug(move |text, _, _| {
        if !text.is_empty() {
            debugged.log(LogLevel::Debug, text, serde_json::Map::new());
        }
    });
    let ctx = match call.hook.kind() {
        HookKind::Decides => Dynamic::from(DecideCtx(Arc::clone(call))),
        HookKind::Acts => Dynamic::from(ActionCtx(Arc::clone(call))),
    };
    let mut scope = Scope::new();
    scope.push_dynamic(ARGUMENT, ctx);
    engine.eval_ast_with_scope(&mut scope, entry)
}

#[cfg(test)]
mod tests;
