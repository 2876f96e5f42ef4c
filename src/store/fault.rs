//! A store that fails on command, around any other.
//!
//! Tests script *which* call meets *what*; everything else passes through. The
//! wrapper also counts calls, for tests that say how many there may be.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Creation, Error, Listed, Parts, SharedStore, Store, Versioning, key};

/// Wraps a store and injects scripted faults.
pub struct FaultStore {
    inner: SharedStore,
    down: AtomicBool,
    calls: [AtomicU64; Operation::ALL.len()],
    script: Mutex<Script>,
}

/// The calls of the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// [`Store::probe`]
    Probe,
    /// [`Store::get`]
    Get,
    /// [`Store::put`]
    Put,
    /// [`Store::create`]
    Create,
    /// [`Store::list`]
    List,
    /// [`Store::delete`]
    Delete,
    /// [`Store::copy`]
    Copy,
    /// [`Store::get_range`]
    GetRange,
    /// [`Store::put_parts`]
    PutParts,
    /// [`Store::versioning`]
    Versioning,
    /// [`Store::abort_uploads`]
    AbortUploads,
}

/// What a call meets.
#[derive(Debug, Clone)]
pub enum Fault {
    /// [`Error::Unavailable`]; nothing happens.
    FailBefore,
    /// [`Error::Refused`]; nothing happens.
    Refuse,
    /// It happens, and the answer is lost: [`Error::Unknown`] for a write,
    /// [`Error::Unavailable`] for a read.
    FailAfter,
    /// As [`Fault::FailAfter`], and the store cannot be reached from then on, until
    /// [`FaultStore::set_down`] says otherwise.
    CutAfter,
    /// It does not happen, and the caller cannot tell: [`Error::Unknown`] for a
    /// write, [`Error::Unavailable`] for a read.
    Lose,
    /// As [`Fault::Lose`], but the write is held back and lands at
    /// [`FaultStore::land`]. A read, and a write by parts, is only lost.
    Hold,
    /// It happens twice, as when a request was sent again, and the second answer
    /// is the one that arrives: a create meets its own object. A write by parts
    /// happens once, for its parts are gone.
    Repeat,
    /// Waits, then goes on as usual.
    Delay(Duration),
    /// Never answers; nothing happens. The caller needs a deadline.
    Hang,
    /// A `get` or `get_range` answers at most this many bytes, as if they were
    /// all. Other calls go on as usual.
    Truncate(usize),
}

/// Says which calls a fault is for.
#[derive(Debug, Clone)]
pub struct Rule {
    operation: Option<Operation>,
    key_part: Option<String>,
    first: u64,
    times: u64,
    fault: Fault,
}

#[derive(Default)]
struct Script {
    rules: Vec<(Rule, u64)>,
    /// By the first part of the key.
    met: BTreeMap<String, u64>,
    held: Vec<Held>,
}

enum Held {
    Put(String, Bytes),
    Create(String, Bytes),
    Delete(String),
    Copy(String, String),
}

// === impl Operation ===

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 11] = [
        Self::Probe,
        Self::Get,
        Self::Put,
        Self::Create,
        Self::List,
        Self::Delete,
        Self::Copy,
        Self::GetRange,
        Self::PutParts,
        Self::Versioning,
        Self::AbortUploads,
    ];

    /// Returns its name, as errors carry it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Get => "get",
            Self::Put => "put",
            Self::Create => "create",
            Self::List => "list",
            Self::Delete => "delete",
            Self::Copy => "copy",
            Self::GetRange => "get_range",
            Self::PutParts => "put_parts",
            Self::Versioning => "versioning",
            Self::AbortUploads => "abort_uploads",
        }
    }

    fn is_write(self) -> bool {
        matches!(self, Self::Put | Self::Create | Self::Delete | Self::Copy | Self::PutParts)
    }
}

// === impl Rule ===

impl Rule {
    /// Makes a rule for the next call of any kind.
    pub fn next(fault: Fault) -> Self {
        Self { operation: None, key_part: None, first: 1, times: 1, fault }
    }

    /// Narrows the rule to one operation.
    pub fn of(mut self, operation: Operation) -> Self {
        self.operation = Some(operation);
        self
    }

    /// Narrows the rule to keys (for a list: prefixes) that contain `part`.
    pub fn with_key(mut self, part: impl Into<String>) -> Self {
        self.key_part = Some(part.into());
        self
    }

    /// Lets `n - 1` matching calls pass first; counted from when the rule was added.
    pub fn nth(mut self, n: u64) -> Self {
        self.first = n;
        self
    }

    /// Applies the fault to so many matching calls in a row, instead of one.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    fn matches(&self, operation: Operation, key: &str) -> bool {
        self.operation.is_none_or(|own| own == operation)
            && self.key_part.as_ref().is_none_or(|part| key.contains(part.as_str()))
    }

    fn is_due(&self, seen: u64) -> bool {
        seen >= self.first && !self.is_spent(seen)
    }

    fn is_spent(&self, seen: u64) -> bool {
        seen >= self.first.saturating_add(self.times)
    }
}

// === impl FaultStore ===

impl FaultStore {
    /// Wraps `inner`; nothing fails yet.
    pub fn new(inner: SharedStore) -> Arc<Self> {
        Arc::new(Self {
            inner,
            down: AtomicBool::new(false),
            calls: Default::default(),
            script: Mutex::default(),
        })
    }

    /// Adds a rule. Of several that are due at one call, the oldest decides;
    /// all of them count the call.
    pub fn add(&self, rule: Rule) {
        self.lock().rules.push((rule, 0));
    }

    /// Forgets all rules; what is held stays held.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// Says whether every call from now on is [`Error::Unavailable`].
    pub fn set_down(&self, is_down: bool) {
        self.down.store(is_down, Ordering::SeqCst);
    }

    /// Returns how many calls of an operation came in, failed ones included.
    pub fn calls(&self, operation: Operation) -> u64 {
        self.calls[operation as usize].load(Ordering::SeqCst)
    }

    /// Returns how many calls came in.
    pub fn all_calls(&self) -> u64 {
        Operation::ALL.into_iter().map(|operation| self.calls(operation)).sum()
    }

    /// Lets the held writes land, in their order, and returns how many there
    /// were. A held create that meets an object changes nothing.
    ///
    /// # Errors
    /// The first error of the wrapped store; later writes are dropped.
    pub async fn land(&self) -> Result<usize, Error> {
        let held = std::mem::take(&mut self.lock().held);
        let count = held.len();
        for write in held {
            match write {
                Held::Put(key, body) => self.inner.put(&key, body).await?,
                Held::Create(key, body) => self.inner.create(&key, body).await.map(|_| ())?,
                Held::Delete(key) => self.inner.delete(&key).await?,
                Held::Copy(from, to) => self.inner.copy(&from, &to).await.map(|_| ())?,
            }
        }
        Ok(count)
    }

    /// Returns how many calls came in whose keys begin with the folder `first`, failed ones
    /// included.
    pub fn calls_in(&self, first: &str) -> u64 {
        self.lock().met.get(first).copied().unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call and returns what it meets.
    fn meet(&self, operation: Operation, key: &str) -> Option<Fault> {
        self.calls[operation as usize].fetch_add(1, Ordering::SeqCst);
        let mut script = self.lock();
        let first = key.split('/').next().unwrap_or(key);
        *script.met.entry(first.to_owned()).or_default() += 1;
        if self.down.load(Ordering::SeqCst) {
            return Some(Fault::FailBefore);
        }
        let mut met = None;
        for (rule, seen) in &mut script.rules {
            if rule.matches(operation, key) {
                *seen += 1;
                if met.is_none() && rule.is_due(*seen) {
                    met = Some(rule.fault.clone());
                }
            }
        }
        script.rules.retain(|(rule, seen)| !rule.is_spent(seen + 1));
        met
    }

    /// Runs one call under the fault it meets.
    async fn run<T, F: Future<Output = Result<T, Error>>>(
        &self,
        operation: Operation,
        key: &str,
        hold: impl FnOnce() -> Option<Held>,
        mut call: impl FnMut() -> F,
    ) -> Result<(T, Option<usize>), Error> {
        const REASON: &str = "injected fault";
        let lost = || match operation.is_write() {
            true => Error::unknown(operation.name(), key, REASON),
            false => Error::unavailable(operation.name(), key, REASON),
        };
        match self.meet(operation, key) {
            None => call().await.map(|answer| (answer, None)),
            Some(Fault::Truncate(bytes)) => call().await.map(|answer| (answer, Some(bytes))),
            Some(Fault::FailBefore) => Err(Error::unavailable(operation.name(), key, REASON)),
            Some(Fault::Refuse) => Err(Error::refused(operation.name(), key, REASON)),
            Some(Fault::FailAfter) => {
                call().await?;
                Err(lost())
            }
            Some(Fault::CutAfter) => {
                call().await?;
                self.down.store(true, Ordering::SeqCst);
                Err(lost())
            }
            Some(Fault::Lose) => Err(lost()),
            Some(Fault::Hold) => {
                self.lock().held.extend(hold());
                Err(lost())
            }
            Some(Fault::Repeat) => {
                if operation != Operation::PutParts {
                    call().await?;
                }
                call().await.map(|answer| (answer, None))
            }
            Some(Fault::Delay(wait)) => {
                tokio::time::sleep(wait).await;
                call().await.map(|answer| (answer, None))
            }
            Some(Fault::Hang) => std::future::pending().await,
        }
    }

    /// Runs one read of bytes, and cuts them where its fault says so.
    async fn read<F: Future<Output = Result<Option<Bytes>, Error>>>(
        &self,
        operation: Operation,
        key: &str,
        call: impl FnMut() -> F,
    ) -> Result<Option<Bytes>, Error> {
        let (body, bytes) = self.run(operation, key, || None, call).await?;
        Ok(match bytes {
            Some(bytes) => body.map(|body| key::cut(&body, 0, bytes as u64)),
            None => body,
        })
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn probe(&self) -> Result<(), Error> {
        self.run(Operation::Probe, "", || None, || self.inner.probe()).await.map(|(answer, _)| answer)
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        self.read(Operation::Get, key, || self.inner.get(key)).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        let hold = || Some(Held::Put(key.to_owned(), body.clone()));
        let call = || self.inner.put(key, body.clone());
        self.run(Operation::Put, key, hold, call).await.map(|(answer, _)| answer)
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error> {
        let hold = || Some(Held::Create(key.to_owned(), body.clone()));
        let call = || self.inner.create(key, body.clone());
        self.run(Operation::Create, key, hold, call).await.map(|(answer, _)| answer)
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Error> {
        let call = || self.inner.list(prefix, after, limit);
        self.run(Operation::List, prefix, || None, call).await.map(|(answer, _)| answer)
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        let hold = || Some(Held::Delete(key.to_owned()));
        self.run(Operation::Delete, key, hold, || self.inner.delete(key)).await.map(|(answer, _)| answer)
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool, Error> {
        let hold = || Some(Held::Copy(from.to_owned(), to.to_owned()));
        self.run(Operation::Copy, to, hold, || self.inner.copy(from, to)).await.map(|(answer, _)| answer)
    }

    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Error> {
        self.read(Operation::GetRange, key, || self.inner.get_range(key, offset, bytes)).await
    }

    async fn put_parts(&self, key: &str, parts: Parts) -> Result<(), Error> {
        let mut parts = Some(parts);
        let call = || {
            let parts = parts.take().expect("a write by parts is called once");
            self.inner.put_parts(key, parts)
        };
        self.run(Operation::PutParts, key, || None, call).await.map(|(answer, _)| answer)
    }

    async fn versioning(&self) -> Result<Versioning, Error> {
        let call = || self.inner.versioning();
        self.run(Operation::Versioning, "", || None, call).await.map(|(answer, _)| answer)
    }

    async fn abort_uploads(&self, before_ms: u64) -> Result<u64, Error> {
        let call = || self.inner.abort_uploads(before_ms);
        self.run(Operation::AbortUploads, "", || None, call).await.map(|(answer, _)| answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn body(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[tokio::test]
    async fn the_nth_call_of_an_operation_fails_and_no_other() {
        let store = FaultStore::new(Arc::new(MemoryStore::new()));
        store.add(Rule::next(Fault::FailBefore).of(Operation::Put).nth(2));
        store.put("a", body("1")).await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), Some(body("1")));
        let error = store.put("a", body("2")).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { operation: "put", .. }), "{error}");
        store.put("b", body("3")).await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), Some(body("1")));
        assert_eq!((store.calls(Operation::Put), store.calls(Operation::Get), store.all_calls()), (3, 2, 5));
    }

    #[tokio::test]
    async fn rules_can_name_a_key_and_last_for_several_calls() {
        let store = FaultStore::new(Arc::new(MemoryStore::new()));
        store.add(Rule::next(Fault::Refuse).with_key("m/").times(2));
        store.put("pack/1", body("1")).await.unwrap();
        for _ in 0..2 {
            assert!(matches!(store.get("m/1").await, Err(Error::Refused { .. })));
        }
        assert_eq!(store.get("m/1").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_lost_answer_leaves_what_it_says() {
        let memory = Arc::new(MemoryStore::new());
        let store = FaultStore::new(memory.clone());
        store.add(Rule::next(Fault::FailAfter));
        assert!(matches!(store.create("after", body("1")).await, Err(Error::Unknown { .. })));
        store.add(Rule::next(Fault::Lose));
        assert!(matches!(store.create("lost", body("2")).await, Err(Error::Unknown { .. })));
        store.add(Rule::next(Fault::Hold));
        assert!(matches!(store.create("held", body("3")).await, Err(Error::Unknown { .. })));
        assert_eq!(memory.objects().into_keys().collect::<Vec<_>>(), ["after"]);
        assert_eq!(store.land().await.unwrap(), 1);
        assert_eq!(memory.objects().into_keys().collect::<Vec<_>>(), ["after", "held"]);
        store.add(Rule::next(Fault::FailAfter));
        assert!(matches!(store.get("after").await, Err(Error::Unavailable { .. })));
    }

    #[tokio::test]
    async fn a_store_that_is_down_never_answers_absence() {
        let store = FaultStore::new(Arc::new(MemoryStore::new()));
        store.set_down(true);
        assert!(matches!(store.get("a").await, Err(Error::Unavailable { .. })));
        assert!(matches!(store.probe().await, Err(Error::Unavailable { .. })));
        store.set_down(false);
        assert_eq!(store.get("a").await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn delay_hang_and_truncate() {
        let store = FaultStore::new(Arc::new(MemoryStore::new()));
        store.put("a", body("hello")).await.unwrap();
        store.add(Rule::next(Fault::Truncate(2)));
        assert_eq!(store.get("a").await.unwrap(), Some(body("he")));
        store.add(Rule::next(Fault::Delay(Duration::from_secs(5))));
        let start = tokio::time::Instant::now();
        assert_eq!(store.get("a").await.unwrap(), Some(body("hello")));
        assert_eq!(start.elapsed().as_secs(), 5, "virtual seconds");
        store.add(Rule::next(Fault::Hang));
        assert!(tokio::time::timeout(Duration::from_secs(60), store.get("a")).await.is_err());
    }
}
