//! The fence: who may publish what, across servers, crashes and late answers.
//!
//! Two chains of create-only records in one store decide everything:
//!
//! ```text
//! owner/<n>        held (exclusive | shared) · released      one chain a store: [`owner`]
//! t/<key>/r/<n>    open · snapshot · restore · close         one chain a key
//! ```
//! The number under which a server holds the store is its *term*. With one server
//! (exclusive) the first claim of a key under each term appends `open`; claims after
//! it are served from the cache without asking. With several (shared) every claim
//! appends `open` and every end clears the holder.
//!
//! # Invariants
//! - A claim may write on top of the newest record only while that record is of its own
//!   server and of no later epoch: `open` has put one there before any program ran.
//! - A create whose answer was lost is settled by its nonce, and an answer counts only
//!   when the newest listed record is ours, or another was written on top of ours: a create
//!   that lands late finds its number taken, or lands below the newest, where it means nothing.
//! - What an operator decided about a tree in conflict comes right after the record that it
//!   was decided on, whoever wrote that, or not at all.
//! - Epochs that a claim gets exceed the newest record's and all that this node gave out.
//!
//! This file is pure. `tests/fence.rs` tries every interleaving of two servers over
//! the same functions that the real code calls.

pub mod owner;

use crate::model::Epoch;

/// What of a record a decision needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Link {
    /// The claim that wrote it.
    pub epoch: Epoch,
    /// The attempt that wrote it.
    pub nonce: String,
    /// The server that wrote it; none: written before servers were named.
    pub server: Option<String>,
    /// Under which term.
    pub term: Option<u64>,
    /// Whose claim is open after it.
    pub holder: Option<(String, Epoch)>,
    /// The attempt that wrote the newest tree after it.
    pub tree: Option<String>,
}

/// Who writes: a server, and the term under which it holds the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Author {
    /// The installation's identity.
    pub server: String,
    /// The term; none: the store has never been held.
    pub term: Option<u64>,
}

/// How many servers a store has.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One.
    #[default]
    Exclusive,
    /// Several.
    Shared,
}

/// What the newest record means for an attempt to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The next record may be written on top of it.
    Open,
    /// This very attempt is written.
    Committed,
    /// Another claim has written.
    Fenced(Epoch),
}

/// What a node has of a key's tree when a claim begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    /// Nothing that counts.
    Nothing,
    /// The tree that this attempt saved.
    Saved(String),
    /// A tree that a claim of this epoch left, and the attempt that is to save it.
    Unsaved(Epoch, String),
}

/// Whether a claim may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// It may, as this epoch.
    Admitted {
        /// The claim's number.
        epoch: Epoch,
        /// Whether the tree on this node is the one to begin with; else the newest record's.
        from_here: bool,
    },
    /// Another server's claim is open.
    Elsewhere {
        /// Whose.
        server: String,
        /// Which.
        epoch: Epoch,
    },
    /// The tree on this node was left by a claim that is fenced.
    Conflict(Epoch),
}

/// Whether the end of a claim has to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// A record that names no holder is to be appended.
    Append,
    /// Nothing of this claim is open, and nothing can become so.
    Done,
}

/// Decides what the newest record means for `nonce` of claim `epoch` of `server`.
pub fn standing(newest: Option<&Link>, server: &str, epoch: Epoch, nonce: &str) -> Standing {
    match newest {
        None => Standing::Open,
        Some(link) if link.nonce == nonce => Standing::Committed,
        Some(link) if is_anothers(link, server) && builds_on(link, nonce) => Standing::Committed,
        Some(link) if link.epoch > epoch => Standing::Fenced(link.epoch),
        // Epochs of two servers may be equal: each counts on while it does not ask.
        Some(link) if is_anothers(link, server) => Standing::Fenced(link.epoch),
        Some(_) => Standing::Open,
    }
}

/// Decides what the newest record, with its number, means for an attempt of which an operator
/// has decided that it comes right after record `decided` (0: the first), whoever wrote that.
/// Anybody who was faster fences it: of what came then the operator has not decided. Who
/// wrote on top of its tree was not: the attempt had been the newest before.
pub fn standing_after(newest: Option<(u64, &Link)>, decided: u64, nonce: &str) -> Standing {
    match newest {
        Some((_, link)) if link.nonce == nonce || link.tree.as_deref() == Some(nonce) => Standing::Committed,
        Some((number, link)) if number != decided => Standing::Fenced(link.epoch),
        None if decided != 0 => Standing::Fenced(Epoch(0)),
        Some(_) | None => Standing::Open,
    }
}

fn is_anothers(link: &Link, server: &str) -> bool {
    link.server.as_deref().is_some_and(|writer| writer != server)
}

/// Returns whether a record was written on top of the tree that attempt `nonce` saved: that
/// save was the newest then, whatever came after it. Where two servers share a store this is
/// how one that never heard of its success learns of it: the other was free to go on at once.
pub fn builds_on(link: &Link, nonce: &str) -> bool {
    link.nonce != nonce && link.tree.as_deref() == Some(nonce)
}

/// Decides whether `server` may begin a claim on top of `newest`. `known` is the last epoch
/// that this node gave out; `is_void` says that an open claim of that server cannot live,
/// because the store has passed on from it.
pub fn admit(
    newest: Option<&Link>,
    server: &str,
    mode: Mode,
    known: Epoch,
    local: &Local,
    is_void: bool,
) -> Admission {
    let epoch = newest.map_or(known, |link| link.epoch.max(known)).next();
    let Some(link) = newest else {
        return Admission::Admitted { epoch, from_here: *local != Local::Nothing };
    };
    if mode == Mode::Shared
        && !is_void
        && let Some((holder, of)) = &link.holder
        && holder != server
    {
        return Admission::Elsewhere { server: holder.clone(), epoch: *of };
    }
    match local {
        Local::Unsaved(of, nonce) => match standing(newest, server, *of, nonce) {
            Standing::Fenced(newest) => Admission::Conflict(newest),
            Standing::Open | Standing::Committed => Admission::Admitted { epoch, from_here: true },
        },
        Local::Saved(nonce) => Admission::Admitted { epoch, from_here: link.tree.as_ref() == Some(nonce) },
        Local::Nothing => Admission::Admitted { epoch, from_here: false },
    }
}

/// Decides whether the end of claim `epoch` of `server` is to be written. A claim whose
/// `open` is not there is closed, too: its create may be under way, and would be taken
/// for a claim that lives when it lands. The number that the close takes is the one it needs.
pub fn close(newest: Option<&Link>, server: &str, epoch: Epoch) -> Closing {
    match newest {
        None => Closing::Append,
        Some(link) if link.epoch > epoch => Closing::Done,
        Some(link) if is_anothers(link, server) => Closing::Done,
        Some(link) if link.epoch == epoch && link.holder.is_none() => Closing::Done,
        Some(_) => Closing::Append,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(server: Option<&str>, epoch: u64, holder: bool) -> Link {
        let server = server.map(str::to_owned);
        let of = server.clone().unwrap_or_default();
        Link {
            epoch: Epoch(epoch),
            nonce: "theirs".to_owned(),
            term: Some(1),
            holder: holder.then_some((of, Epoch(epoch))),
            tree: Some("tree".to_owned()),
            server,
        }
    }

    #[test]
    fn only_the_server_of_the_newest_record_writes_on_top_of_it() {
        for (newest, expected) in [
            (None, Standing::Open),
            (Some(link(Some("a"), 4, true)), Standing::Open),
            (Some(link(Some("a"), 5, true)), Standing::Open),
            (Some(link(Some("a"), 6, true)), Standing::Fenced(Epoch(6))),
            (Some(link(Some("b"), 4, false)), Standing::Fenced(Epoch(4))),
            (Some(link(Some("b"), 5, false)), Standing::Fenced(Epoch(5))),
            (Some(link(None, 5, false)), Standing::Open),
            (Some(link(None, 6, false)), Standing::Fenced(Epoch(6))),
            (Some(Link { nonce: "mine".to_owned(), ..link(Some("b"), 9, true) }), Standing::Committed),
            (Some(Link { tree: Some("mine".to_owned()), ..link(Some("b"), 9, true) }), Standing::Committed),
            // What this server opened itself on top of it has to be closed.
            (Some(Link { tree: Some("mine".to_owned()), ..link(Some("a"), 5, true) }), Standing::Open),
        ] {
            assert_eq!(standing(newest.as_ref(), "a", Epoch(5), "mine"), expected, "{newest:?}");
        }
    }

    #[test]
    fn what_an_operator_decided_comes_right_after_the_record_it_was_decided_on() {
        let theirs = link(Some("b"), 9, true);
        let mine = Link { nonce: "mine".to_owned(), ..link(Some("a"), 5, false) };
        let on_mine = Link { tree: Some("mine".to_owned()), ..link(Some("b"), 9, true) };
        for (newest, decided, expected) in [
            (Some((4, &theirs)), 4, Standing::Open),
            (Some((5, &theirs)), 4, Standing::Fenced(Epoch(9))),
            (Some((3, &theirs)), 4, Standing::Fenced(Epoch(9))),
            (Some((5, &mine)), 4, Standing::Committed),
            (Some((6, &on_mine)), 4, Standing::Committed),
            (None, 4, Standing::Fenced(Epoch(0))),
            (None, 0, Standing::Open),
            (Some((1, &theirs)), 0, Standing::Fenced(Epoch(9))),
        ] {
            assert_eq!(standing_after(newest, decided, "mine"), expected, "{newest:?} after {decided}");
        }
    }

    #[test]
    fn a_claim_begins_above_every_epoch_and_from_the_newest_tree_only() {
        let admitted = |epoch, from_here| Admission::Admitted { epoch: Epoch(epoch), from_here };
        let elsewhere = Admission::Elsewhere { server: "b".to_owned(), epoch: Epoch(4) };
        let saved = |nonce: &str| Local::Saved(nonce.to_owned());
        let unsaved = |epoch| Local::Unsaved(Epoch(epoch), "mine".to_owned());
        let held = Some(link(Some("b"), 4, true));
        let free = Some(link(Some("b"), 4, false));
        let own = Some(link(Some("a"), 4, true));
        for (newest, mode, known, local, is_void, expected) in [
            (&None, Mode::Shared, 0, Local::Nothing, false, admitted(1, false)),
            (&None, Mode::Exclusive, 7, unsaved(7), false, admitted(8, true)),
            (&held, Mode::Shared, 9, saved("tree"), false, elsewhere),
            (&held, Mode::Shared, 2, saved("tree"), true, admitted(5, true)),
            (&held, Mode::Exclusive, 2, Local::Nothing, false, admitted(5, false)),
            (&free, Mode::Shared, 9, saved("tree"), false, admitted(10, true)),
            (&free, Mode::Shared, 9, saved("older"), false, admitted(10, false)),
            (&free, Mode::Exclusive, 9, unsaved(9), false, Admission::Conflict(Epoch(4))),
            (&own, Mode::Shared, 3, unsaved(4), false, admitted(5, true)),
            (&own, Mode::Shared, 3, unsaved(3), false, Admission::Conflict(Epoch(4))),
        ] {
            let decided = admit(newest.as_ref(), "a", mode, Epoch(known), &local, is_void);
            assert_eq!(decided, expected, "{newest:?} {mode:?} {known} {local:?} {is_void}");
        }
    }

    #[test]
    fn an_end_is_written_unless_nothing_of_the_claim_can_be_open() {
        for (newest, expected) in [
            (None, Closing::Append),
            (Some(link(Some("a"), 5, true)), Closing::Append),
            (Some(link(Some("a"), 4, false)), Closing::Append),
            (Some(link(Some("a"), 5, false)), Closing::Done),
            (Some(link(Some("a"), 6, true)), Closing::Done),
            (Some(link(Some("b"), 6, true)), Closing::Done),
        ] {
            assert_eq!(close(newest.as_ref(), "a", Epoch(5)), expected, "{newest:?}");
        }
    }
}
