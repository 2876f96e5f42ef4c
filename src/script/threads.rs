//! A bounded pool of threads with stacks for scripts.
//!
//! Not tokio's blocking pool: hooks that wait for the host would take its threads
//! from file access and name look-ups, and its stacks are too small for scripts.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::engine::STACK_BYTES;

/// Work for a thread.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs on up to so many threads, started when they are first needed.
///
/// Dropping it lets what runs and what is queued come to its end.
pub(super) struct Threads {
    shared: Arc<Shared>,
    name: &'static str,
    limit: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    live: usize,
    closed: bool,
}

// === impl Threads ===

impl Threads {
    /// Makes a pool without threads.
    pub(super) fn new(name: &'static str, limit: usize) -> Self {
        let shared = Shared { queue: Mutex::new(Queue::default()), ready: Condvar::new() };
        Self { shared: Arc::new(shared), name, limit: limit.max(1) }
    }

    /// Queues a job. How many are queued is bounded by who calls.
    ///
    /// # Errors
    /// When there is no thread and none can be started; the job is dropped then.
    pub(super) fn submit(&self, job: Job) -> io::Result<()> {
        let mut queue = self.shared.lock();
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.live >= self.limit {
            self.shared.ready.notify_one();
            return Ok(());
        }
        queue.live += 1;
        drop(queue);
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name(self.name.to_owned()).stack_size(STACK_BYTES);
        if let Err(error) = builder.spawn(move || shared.work()) {
            let mut queue = self.shared.lock();
            queue.live -= 1;
            if queue.live == 0 {
                queue.jobs.pop_back();
                return Err(error);
            }
            self.shared.ready.notify_one();
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.ready.notify_all();
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                // A job catches its own panics and says so; this keeps the thread.
                let _ = catch_unwind(AssertUnwindSafe(job));
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn jobs_run_side_by_side_up_to_the_limit_and_panics_end_nothing() {
        let threads = Threads::new("test", 2);
        let (tx, rx) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        threads.submit(Box::new(|| panic!("on purpose"))).unwrap();
        for number in 0..2 {
            let (tx, wait) = (tx.clone(), Arc::clone(&wait));
            let job = move || {
                tx.send(number).unwrap();
                wait.lock().unwrap().recv_timeout(LONG).unwrap();
            };
            threads.submit(Box::new(job)).unwrap();
        }
        let third = tx.clone();
        threads.submit(Box::new(move || third.send(2).unwrap())).unwrap();
        // Both began although neither ended; the third waits for a thread.
        let mut begun = [rx.recv_timeout(LONG).unwrap(), rx.recv_timeout(LONG).unwrap()];
        begun.sort_unstable();
        assert_eq!(begun, [0, 1]);
        assert!(rx.try_recv().is_err());
        go.send(()).unwrap();
        assert_eq!(rx.recv_timeout(LONG).unwrap(), 2);
        go.send(()).unwrap();
        drop(threads);
    }
}
