//! Holding the store: taken beside everything else at start, looked at again from time to
//! time and after each save, given up at the end.
//!
//! A store that cannot be reached does not stop the server: claims that run go on, and new
//! ones wait for the first answer of the store's owner record since the start.
//!
//! # From one server to several
//! A claim that began while the store was one server's may have no `open` record of its own:
//! no other server could know of it. A server that is to share its store and has such claims
//! takes the store for itself first, and lets others in when the last of them has ended.
//! What it claims meanwhile is opened as sharing wants it. The way back needs no such care:
//! a store that others use is not taken for one server.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::{Error, Inner, RETRY_AFTER_MS, STORE_WAIT, Tenancy, answer};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{ClaimRow, Durability, Op},
    model::ClaimState,
    retry::Backoff,
    state::fence::{
        Author, Mode,
        owner::{self, Tenure, Verdict},
    },
    store::SharedStore,
};

/// The fact under which the journal has the attempt that took the store, or tries to.
const OWNER_NONCE: &str = "owner_nonce";
/// How often a held store is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(15);
const TAKE: Backoff = Backoff { base_ms: 200, cap_ms: 5_000 };
/// How long giving the store up may take at shutdown.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// How this server stands to its store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Holding {
    /// Nothing is known yet.
    Asking,
    /// It has not been reached since the start.
    Unreachable(String),
    /// It is another server's.
    Elsewhere(String),
    /// It is ours, under this term.
    Held(u64),
}

/// The store's owner record as this server knows it.
pub(super) struct Ownership {
    store: SharedStore,
    server: String,
    pub(super) mode: Mode,
    holding: watch::Sender<Holding>,
    nonce: Mutex<String>,
    look: Notify,
    /// Whether the journal had claims at the start of which sharing servers would not know.
    began_hidden: bool,
    /// Whether a store that is to be shared is held for this server alone, for now.
    is_private: AtomicBool,
}

/// Returns whether other servers could not know from the store that this claim is not over:
/// its own `open` is not there, and nothing waits for it.
pub(super) fn is_hidden(row: &ClaimRow) -> bool {
    let is_over = matches!(row.state, ClaimState::Clean | ClaimState::Conflict);
    let is_opening = row.state == ClaimState::Claiming && row.nonce.is_some();
    !(row.opened || row.close || is_over || is_opening)
}

// === impl Ownership ===

impl Ownership {
    pub(super) fn new(store: SharedStore, server: String, mode: Mode, claims: &[ClaimRow]) -> Self {
        Self {
            store,
            server,
            mode,
            holding: watch::Sender::new(Holding::Asking),
            nonce: Mutex::default(),
            look: Notify::new(),
            began_hidden: claims.iter().any(is_hidden),
            is_private: AtomicBool::new(false),
        }
    }

    pub(super) fn author(&self, term: Option<u64>) -> Author {
        Author { server: self.server.clone(), term }
    }

    /// Returns the term, waiting for the store's first answer.
    pub(super) async fn term(&self) -> Result<u64, Error> {
        let mut holding = self.holding.subscribe();
        let asked = holding.wait_for(|holding| *holding != Holding::Asking);
        let holding = match tokio::time::timeout(STORE_WAIT, asked).await {
            Ok(Ok(holding)) => holding.clone(),
            Ok(Err(_)) | Err(_) => Holding::Unreachable("its owner is not known yet".to_owned()),
        };
        match holding {
            Holding::Held(term) => Ok(term),
            Holding::Elsewhere(reason) => {
                Err(Error::StoreOwnedElsewhere { reason, retry_after_ms: RETRY_AFTER_MS })
            }
            Holding::Asking => unreachable!("it was waited for"),
            Holding::Unreachable(reason) => {
                Err(Error::StoreUnavailable { reason, retry_after_ms: RETRY_AFTER_MS })
            }
        }
    }

    /// Says why nothing may be published now; `None`: it may.
    pub(super) fn obstacle(&self) -> Option<String> {
        match &*self.holding.borrow() {
            Holding::Held(_) => None,
            Holding::Asking => Some("the store's owner is not known yet".to_owned()),
            Holding::Unreachable(reason) | Holding::Elsewhere(reason) => Some(reason.clone()),
        }
    }

    /// Returns whether another server has the store, so that what is not saved here may be
    /// overtaken.
    pub(super) fn is_elsewhere(&self) -> bool {
        matches!(&*self.holding.borrow(), Holding::Elsewhere(_))
    }

    /// Waits until it is known how this server stands to its store.
    pub(super) async fn asked(&self) {
        // The sender is this value's own: it cannot be gone.
        let _ = self.holding.subscribe().wait_for(|holding| *holding != Holding::Asking).await;
    }

    /// Waits for a change of how this server stands to its store.
    pub(super) async fn changed(&self) {
        // The sender is this value's own: it cannot be gone.
        let _ = self.holding.subscribe().changed().await;
    }

    /// Asks for a look at the owner record soon.
    pub(super) fn look_soon(&self) {
        self.look.notify_one();
    }

    /// Returns whether the claim that `server` opened under `term` cannot live any more.
    pub(super) async fn is_void(&self, server: &str, term: Option<u64>) -> Result<bool, owner::Error> {
        Ok(owner::is_void(&owner::read(self.store.as_ref()).await?, server, term))
    }

    fn nonce(&self) -> String {
        self.nonce.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the next try to take the store a new attempt.
    fn forget_nonce(&self) {
        self.nonce.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Returns whether the store is still held under `term`.
    async fn is_held(&self, term: u64) -> Result<bool, owner::Error> {
        if owner::newest_number(self.store.as_ref()).await? == term {
            return Ok(true);
        }
        let records = owner::read(self.store.as_ref()).await?;
        let verdict = owner::verdict(&owner::tenure(&records), &self.server, self.mode, &self.nonce());
        Ok(verdict == Verdict::Held(term))
    }
}

// === impl Tenancy ===

impl Tenancy {
    /// Takes the store and keeps an eye on it until the server drains.
    pub async fn hold_store(&self) {
        let inner = &self.inner;
        let draining = inner.parts.tasks.draining();
        let mut failures = 0;
        loop {
            let held = match *inner.ownership.holding.borrow() {
                Holding::Held(term) => Some(term),
                _ => None,
            };
            let step = async {
                match held {
                    Some(term) => inner.look_at_store(term).await,
                    None => inner.take_store().await,
                }
            };
            let Some(is_settled) = draining.run_until_cancelled(step).await else { return };
            let wait = if is_settled {
                failures = 0;
                LOOK_EVERY
            } else {
                failures += 1;
                TAKE.wait(failures - 1, &*inner.parts.clock)
            };
            tokio::select! {
                biased;
                () = draining.cancelled() => return,
                () = inner.ownership.look.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Gives the store up at the end of the server, when nothing of it runs or is owed:
    /// otherwise it stays held, and the same identity goes on with it.
    pub async fn release_store(&self) {
        let inner = &self.inner;
        let ownership = &inner.ownership;
        let Holding::Held(term) = *ownership.holding.borrow() else { return };
        let is_busy = |entry: &Arc<super::registry::Entry>| !entry.is_at_rest();
        if inner.entries.iter().any(|entry| is_busy(entry.value())) {
            info!(term, "claims or saves are left: the store stays held by this server");
            return;
        }
        let now_ms = inner.now_ms();
        let nonce = ownership.nonce();
        let released =
            owner::release(ownership.store.as_ref(), &ownership.server, ownership.mode, &nonce, now_ms);
        match tokio::time::timeout(RELEASE_LIMIT, released).await {
            Ok(Ok(())) => info!(term, "store released"),
            Ok(Err(error)) => warn!(
                term,
                error = &error as &dyn std::error::Error,
                "store is not released; it stays this server's until it runs again or `boilerhouse state takeover`"
            ),
            Err(_) => warn!(term, "store is not released in time; it stays this server's"),
        }
    }
}

// === impl Inner ===

impl Inner {
    /// Tries to take the store; returns whether it is held now.
    async fn take_store(&self) -> bool {
        let ownership = &self.ownership;
        let mut nonce = ownership.nonce();
        if nonce.is_empty() {
            nonce = random_hex(&*self.parts.clock, 16);
            // Before the first try: what lands late is known as ours (P8).
            let noted = vec![Op::PutFact(OWNER_NONCE, nonce.clone())];
            if let Err(error) = self.parts.journal.commit(noted, Durability::Hard).await {
                error!(
                    error = &error as &dyn std::error::Error,
                    "attempt to take the store is not journaled yet"
                );
                return false;
            }
            *ownership.nonce.lock().unwrap_or_else(PoisonError::into_inner) = nonce.clone();
        }
        crash_point!(self.parts.crash, "owner.journaled");
        let store = ownership.store.as_ref();
        if ownership.mode == Mode::Shared
            && let Err(error) = store.probe().await
        {
            // Where creates are not conditional, two servers would both believe that they claimed.
            let reason = format!("it cannot be shared: {}", answer::chain(&error));
            if self.set_holding(Holding::Unreachable(reason.clone())) {
                error!(reason, "store is not used");
            }
            return false;
        }
        match self.take_for(&nonce).await {
            Ok((term, mode)) => {
                crash_point!(self.parts.crash, "owner.taken");
                info!(term, mode = ?mode, "store held");
                let is_private = mode != ownership.mode;
                ownership.is_private.store(is_private, Ordering::Release);
                self.set_part("store sharing", is_private.then(|| {
                    "claims that began before the store was to be shared are not over; it is this server's alone until then".to_owned()
                }));
                self.set_holding(Holding::Held(term));
                true
            }
            Err(error @ owner::Error::Elsewhere(_)) => {
                let reason = answer::chain(&error);
                if self.set_holding(Holding::Elsewhere(reason.clone())) {
                    error!(reason, "store is another server's; nothing is claimed and nothing published");
                }
                false
            }
            Err(error @ (owner::Error::Store(_) | owner::Error::Damaged(_))) => {
                let reason = answer::chain(&error);
                if self.set_holding(Holding::Unreachable(reason.clone())) {
                    warn!(reason, "store's owner is not known; claims wait for it");
                }
                false
            }
        }
    }

    /// Takes the store as it is configured, or for this server alone while claims are not
    /// over of which others would not know; returns the term, and how it is held.
    async fn take_for(&self, nonce: &str) -> Result<(u64, Mode), owner::Error> {
        let ownership = &self.ownership;
        let store = ownership.store.as_ref();
        let mut mode = ownership.mode;
        if mode == Mode::Shared
            && self.has_hidden_claims()
            // Shared before, it has none of those claims that an operator has not given up.
            && !matches!(owner::tenure(&owner::read(store).await?), Tenure::Shared(_))
        {
            mode = Mode::Exclusive;
        }
        let term = owner::take(store, &ownership.server, mode, nonce, self.now_ms()).await?;
        // An attempt of which the answer was lost may have been for this server alone.
        if ownership.mode == Mode::Shared
            && matches!(owner::tenure(&owner::read(store).await?), Tenure::Exclusive(_))
        {
            mode = Mode::Exclusive;
        }
        Ok((term, mode))
    }

    fn has_hidden_claims(&self) -> bool {
        if !self.started.load(Ordering::Acquire) {
            return self.ownership.began_hidden;
        }
        self.entries.iter().any(|entry| {
            entry.live().is_some_and(|live| is_hidden(&live.row()))
                || entry.unsaved().iter().any(|unsaved| is_hidden(&unsaved.row()))
        })
    }

    /// Looks whether the store is still ours; steps down when it is not, and lets others in
    /// when nothing stands against it any more. A store that does not answer changes nothing.
    async fn look_at_store(&self, term: u64) -> bool {
        match self.ownership.is_held(term).await {
            Ok(true) if self.ownership.is_private.load(Ordering::Acquire) && !self.has_hidden_claims() => {
                self.ownership.forget_nonce();
                self.take_store().await
            }
            Ok(true) => true,
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "store's owner cannot be looked at"
                );
                true
            }
            Ok(false) => {
                error!(
                    term,
                    "store was taken from this server; nothing is claimed and nothing published any more"
                );
                // A new attempt, should the store become free again.
                self.ownership.forget_nonce();
                let reason = "an operator took the store from this server".to_owned();
                self.set_holding(Holding::Elsewhere(reason));
                false
            }
        }
    }

    /// Notes how this server stands to its store; returns whether that is new.
    fn set_holding(&self, holding: Holding) -> bool {
        let reason = match &holding {
            Holding::Held(_) | Holding::Asking => None,
            Holding::Unreachable(reason) | Holding::Elsewhere(reason) => Some(reason.clone()),
        };
        self.set_part("store owner", reason);
        self.ownership.holding.send_if_modified(|now| {
            let is_new = *now != holding;
            *now = holding;
            is_new
        })
    }

    /// Looks at the owner record after something was published: a server that was cut off
    /// and superseded learns it here at the latest.
    pub(super) fn published(&self) {
        self.ownership.look_soon();
    }
}
