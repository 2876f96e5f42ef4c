//! An operator's decision about a tree that cannot be saved, because the store has something
//! else, or nothing any more.
//!
//! ```text
//! conflict ─┬ ours ──▶ dirty, above every epoch, right after the store's newest record ──▶ clean
//!           └ theirs ▶ the tree is set aside, or removed where that was asked for ──▶ over
//! ```
//! # Guarantees
//! - P2: with `ours` what the store had stays in its history; with `theirs` this node's tree
//!   is set aside, and removed only by a request that says so and while the store has a
//!   snapshot.
//! - P1: `ours` is refused while another server has the tenant claimed, and is one
//!   create-only record: whoever writes first makes it a conflict again, of which the
//!   operator has not decided.
//! - P7: the decision is journaled before it is carried out. A crash goes on with `ours`;
//!   after `theirs` the next start finds a tree that no row knows and sets it aside, also
//!   where it was to be removed.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    Error, Inner, RELEASE_WAIT, ReleaseState, Tenancy,
    registry::{Entry, SaveOutcome, Unsaved},
};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{ClaimRow, Durability, Op, TreeRow},
    model::{ClaimState, Epoch, Key, TenantId, WorkloadId},
    state::{
        self, Head,
        fence::{self, Closing, Standing},
    },
};

/// Whose tree an operator decides for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// This node's, which could not be saved.
    Ours,
    /// The store's.
    Theirs,
}

/// The body of `POST /tenants/{tenant}/resolve`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// Which workload; the only one there is when left out.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
    /// Whose tree the next claim begins with.
    pub keep: Side,
    /// With `theirs`: remove this node's tree instead of setting it aside.
    #[serde(default)]
    pub discard: bool,
}

/// The answer to a decision.
#[derive(Debug, Clone, Serialize)]
pub struct ResolvedAnswer {
    /// Whose state.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// Whose tree the next claim begins with.
    pub kept: Side,
    /// `durable`: it is in the store; `pending`: this node goes on saving it.
    pub state: ReleaseState,
    /// The snapshot that it is; none: it is not saved yet, or the store has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// The store's snapshot that was the newest until now; `restore` goes back to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaced: Option<u64>,
    /// Where on this node the tree is that was not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set_aside: Option<String>,
    /// Whether it was removed instead.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub discarded: bool,
    /// Why it is not saved yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A decision that is journaled.
enum Decided {
    /// The save that follows, and the snapshot that it replaces.
    Ours(Arc<Unsaved>, Option<u64>),
    Theirs(ResolvedAnswer),
}

// === impl Tenancy ===

impl Tenancy {
    /// Decides about a tree in conflict. Goes on when the call is dropped.
    ///
    /// # Errors
    /// [`Error::NotInConflict`], [`Error::Claimed`], [`Error::ClaimedElsewhere`],
    /// [`Error::StoreUnavailable`], [`Error::StoreOwnedElsewhere`] (only for `ours`);
    /// [`Error::StateConflict`]: somebody else has written meanwhile, decide again.
    pub async fn resolve(&self, tenant: TenantId, request: ResolveRequest) -> Result<ResolvedAnswer, Error> {
        self.inner.check_open()?;
        if request.discard && request.keep == Side::Ours {
            let problem = "only what is not kept is removed; allowed with `keep` \"theirs\"".to_owned();
            return Err(Error::Invalid { field: "discard".to_owned(), problem });
        }
        let key = self.inner.stored_key(tenant, request.workload.as_ref())?;
        let inner = Arc::clone(&self.inner);
        self.run("resolve", async move {
            let entry = inner.entry(&key);
            let decided = match inner.lock(&entry).await {
                Ok(_guard) => {
                    let decided = inner.resolve_guarded(&key, &entry, &request).await;
                    if decided.is_err() {
                        inner.resume_saves(&key, &entry);
                    }
                    decided
                }
                Err(error) => Err(error),
            };
            inner.tidy(&key, entry);
            match decided? {
                Decided::Ours(unsaved, replaced) => inner.resolved_ours(&key, &unsaved, replaced).await,
                Decided::Theirs(answer) => Ok(answer),
            }
        })
        .await
    }
}

// === impl Inner ===

impl Inner {
    async fn resolve_guarded(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        request: &ResolveRequest,
    ) -> Result<Decided, Error> {
        self.not_being_erased(&key.tenant)?;
        let of = || (key.tenant.clone(), key.workload.clone());
        let none = || Error::NotInConflict { tenant: key.tenant.clone(), workload: key.workload.clone() };
        if entry.live().is_some() {
            let (tenant, workload) = of();
            return Err(Error::Claimed { tenant, workload });
        }
        if entry.owed_trees().is_empty() {
            return Err(none());
        }
        let head = self.ask_head(key).await?;
        // Nothing of this node is under way while it is decided. Asked before, for a store
        // that does not answer changes nothing.
        for before in entry.unsaved() {
            before.cancel.cancel();
            Self::save_ended(&before).await;
        }
        // What was saved meanwhile is settled.
        let Some(last) = entry.owed_trees().pop() else { return Err(none()) };
        if !self.is_in_conflict(key, &last, head.as_ref()) {
            return Err(none());
        }
        match request.keep {
            Side::Ours => self.decide_ours(key, entry, &last, head).await,
            Side::Theirs => self.decide_theirs(key, entry, &last, head, request.discard).await,
        }
    }

    /// Returns whether no save of a tree can end well: it was told so, or will be.
    fn is_in_conflict(&self, key: &Key, last: &Unsaved, head: Option<&Head>) -> bool {
        if matches!(&*last.outcome.borrow(), SaveOutcome::Conflict(_)) {
            return true;
        }
        let row = last.row();
        let Some(head) = head else { return self.has_chain(key, &row) };
        let nonce = row.nonce.as_deref().unwrap_or_default();
        let standing = match row.decided_on {
            Some(after) => fence::standing_after(Some((head.number, &head.link)), after, nonce),
            None => fence::standing(Some(&head.link), &self.parts.instance, row.epoch, nonce),
        };
        matches!(standing, Standing::Fenced(_))
    }

    /// Journals that this node's tree is to be saved over what the store has now.
    async fn decide_ours(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        last: &Unsaved,
        head: Option<Head>,
    ) -> Result<Decided, Error> {
        let term = self.ownership.term().await?;
        let holder = head.as_ref().and_then(|head| head.link.holder.as_ref());
        if let Some((server, _)) = holder.filter(|(server, _)| *server != self.parts.instance)
            && !self.is_void(head.as_ref()).await?
        {
            let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
            return Err(Error::ClaimedElsewhere { tenant, workload, server: server.clone() });
        }
        let known = self.trees.get(key).map(|tree| tree.clone());
        let before = last.row();
        let epochs = [
            Some(before.epoch),
            known.as_ref().map(|tree| tree.epoch),
            head.as_ref().map(|head| head.link.epoch),
        ];
        let epoch = epochs.into_iter().flatten().max().unwrap_or(Epoch(0)).next();
        let tree = TreeRow {
            key: key.clone(),
            epoch,
            cached: true,
            saved: known.and_then(|tree| tree.saved),
            owner: Some(before.run_as),
            // The next claim asks the store, whatever this save comes to.
            opened: None,
        };
        let row = ClaimRow {
            epoch,
            state: ClaimState::Dirty,
            slot: None,
            nonce: Some(random_hex(&*self.parts.clock, 16)),
            superseded_by: None,
            term: Some(term),
            decided_on: Some(head.as_ref().map_or(0, |head| head.number)),
            ..before.clone()
        };
        let mut ops = vec![Op::PutClaim(Box::new(row.clone())), Op::PutTree(tree.clone())];
        ops.extend(drops(key, entry));
        self.commit(ops, Durability::Hard).await?;
        entry.settle(before.epoch);
        self.trees.insert(key.clone(), tree);
        let unsaved = Arc::new(Unsaved::new(row, Arc::clone(&last.workload), SaveOutcome::Saving));
        entry.add_unsaved(Arc::clone(&unsaved));
        let replaced = head.and_then(|head| head.snapshot).map(|snapshot| snapshot.number);
        warn!(tenant = %key.tenant, workload = %key.workload, epoch = epoch.0, replaced, "an operator decided for this node's state");
        crash_point!(self.parts.crash, "resolve.ours");
        self.start_save(key, Arc::clone(&unsaved));
        Ok(Decided::Ours(unsaved, replaced))
    }

    /// Waits for the save of what was decided.
    async fn resolved_ours(
        &self,
        key: &Key,
        unsaved: &Unsaved,
        replaced: Option<u64>,
    ) -> Result<ResolvedAnswer, Error> {
        let mut outcome = unsaved.outcome.subscribe();
        let settled = outcome.wait_for(|outcome| *outcome != SaveOutcome::Saving);
        let settled = match tokio::time::timeout(RELEASE_WAIT, settled).await {
            Ok(settled) => settled.map_or(SaveOutcome::Ended, |outcome| outcome.clone()),
            Err(_) => SaveOutcome::Retrying("the save takes long".to_owned()),
        };
        let answer = ResolvedAnswer {
            tenant: key.tenant.clone(),
            workload: key.workload.clone(),
            kept: Side::Ours,
            state: ReleaseState::Pending,
            snapshot: None,
            replaced,
            set_aside: None,
            discarded: false,
            reason: None,
        };
        match settled {
            SaveOutcome::Saved(snapshot) => {
                Ok(ResolvedAnswer { state: ReleaseState::Durable, snapshot: Some(snapshot.number), ..answer })
            }
            SaveOutcome::Conflict(reason) => {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                Err(Error::StateConflict { tenant, workload, reason })
            }
            SaveOutcome::Retrying(reason) => Ok(ResolvedAnswer { reason: Some(reason), ..answer }),
            SaveOutcome::Saving | SaveOutcome::Ended => {
                Ok(ResolvedAnswer { reason: Some("the server stops".to_owned()), ..answer })
            }
        }
    }

    /// Journals that the store's tree stands, and puts this node's out of the way.
    async fn decide_theirs(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        last: &Unsaved,
        head: Option<Head>,
        discard: bool,
    ) -> Result<Decided, Error> {
        let link = head.as_ref().map(|head| &head.link);
        let snapshot = head.as_ref().and_then(|head| head.snapshot.clone());
        if discard && snapshot.is_none() {
            let problem = "the store has no snapshot, and this node's state is the only copy; without `discard` \
                           it is set aside";
            return Err(Error::Invalid { field: "discard".to_owned(), problem: problem.to_owned() });
        }
        let before = last.row();
        // A claim that only was torn may be open in the store yet.
        let closes =
            link.is_some() && fence::close(link, &self.parts.instance, before.epoch) == Closing::Append;
        let known = self.trees.get(key).map_or(Epoch(0), |tree| tree.epoch);
        let tree = TreeRow {
            key: key.clone(),
            epoch: known.max(before.epoch).max(link.map_or(Epoch(0), |link| link.epoch)),
            cached: false,
            saved: snapshot.clone(),
            owner: None,
            // The next claim asks the store what there is (P3).
            opened: None,
        };
        let mut ops: Vec<Op> = drops(key, entry).collect();
        let closing = closes.then(|| ClaimRow {
            state: ClaimState::Dirty,
            close: true,
            decided_on: None,
            nonce: Some(random_hex(&*self.parts.clock, 16)),
            ..before.clone()
        });
        ops.extend(closing.iter().map(|row| Op::PutClaim(Box::new(row.clone()))));
        ops.push(Op::PutTree(tree.clone()));
        self.commit(ops, Durability::Hard).await?;
        entry.settle(before.epoch);
        self.trees.insert(key.clone(), tree);
        crash_point!(self.parts.crash, "resolve.theirs");
        let set_aside = self.remove_ours(key, discard).await;
        crash_point!(self.parts.crash, "resolve.removed");
        if let Some(row) = closing {
            let unsaved = Arc::new(Unsaved::new(row, Arc::clone(&last.workload), SaveOutcome::Saving));
            entry.add_unsaved(Arc::clone(&unsaved));
            self.start_save(key, unsaved);
        }
        let snapshot = snapshot.map(|snapshot| snapshot.number);
        warn!(tenant = %key.tenant, workload = %key.workload, epoch = before.epoch.0, snapshot, set_aside, discard, "an operator decided for the store's state");
        Ok(Decided::Theirs(ResolvedAnswer {
            tenant: key.tenant.clone(),
            workload: key.workload.clone(),
            kept: Side::Theirs,
            state: ReleaseState::Durable,
            snapshot,
            replaced: None,
            set_aside,
            discarded: discard,
            reason: None,
        }))
    }

    /// Puts this node's tree out of the way, for as long as it takes; answers where it is.
    async fn remove_ours(&self, key: &Key, discard: bool) -> Option<String> {
        let place = Mutex::new(None);
        let reason = "an operator decided for the store's state";
        self.keep_trying("state that was decided against is not out of the way yet", key, || {
            let place = &place;
            async move {
                if discard {
                    return self.parts.files.discard(key).await;
                }
                match self.parts.files.set_aside_cached(&key.digest(), reason).await {
                    Ok(path) => *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(path),
                    // Somebody removed it; there is nothing to keep.
                    Err(state::Error::Disk { source, .. })
                        if source.kind() == std::io::ErrorKind::NotFound =>
                    {
                        warn!(tenant = %key.tenant, workload = %key.workload, "state that was in conflict is gone from disk");
                    }
                    Err(error) => return Err(error),
                }
                Ok(())
            }
        })
        .await;
        place.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Drops the rows of everything that a key has unsaved.
fn drops(key: &Key, entry: &Entry) -> impl Iterator<Item = Op> {
    entry.unsaved().into_iter().map(move |unsaved| Op::DropClaim(key.clone(), unsaved.row().epoch))
}
