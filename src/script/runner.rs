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

use rhai::{CallFnOptions, Dynamic, Engine, Scope};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    Facts, HookError, HookErrorKind, SharedHost, Verdict,
    call::{Call, Relayed, Waiter},
    ctx::{ActionCtx, DecideCtx, Decision},
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

/// What a hook's thread has for its caller.
enum Message {
    Work(Relayed),
    Done(Result<Verdict, HookError>),
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
        let entry = workload.compiled().entry.clone();
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
            let (relay, relayed) = tokio::sync::mpsc::unbounded_channel();
            let call = begin(Waiter::Relay(relay));
            let job = move || {
                let _ = tx.send(perform(call, &workload));
                drop(place);
            };
            return match lane.threads.submit(Box::new(job)) {
                Ok(()) => stand_by(hook, &entry, &guard, &rx, relayed).await,
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
