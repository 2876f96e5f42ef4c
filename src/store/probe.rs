//! The proof that a store honours the condition of [`Store::create`].
//!
//! Some servers accept `If-None-Match: *` and ignore it. On those, two servers
//! that commit the same record would both believe they did.

use bytes::Bytes;

use super::{Creation, Error, PROBE, Store};
use crate::clock::{Clock, random_hex};

/// What an operator reads when the condition is ignored.
const IGNORED: &str = "the store ignores create-only writes (If-None-Match: *): two servers could commit the same \
                       record; use a store that honours the condition, or one directory or prefix per server";

/// Races two creates of one scratch key, tries a third after them, reads what is
/// there, and removes it.
///
/// The scratch key is `probe/<32 hex digits>`; a crash between leaves one object
/// of a few bytes there.
///
/// # Errors
/// [`Error::Refused`] when the condition is ignored; else what the store answered.
pub(super) async fn probe_create(store: &dyn Store, clock: &dyn Clock) -> Result<(), Error> {
    let key = format!("probe/{}", random_hex(clock, 16));
    let verdict = race(store, &key).await;
    let removed = store.delete(&key).await;
    verdict?;
    removed
}

async fn race(store: &dyn Store, key: &str) -> Result<(), Error> {
    let [first, second, third] = ["first", "second", "third"].map(|body| Bytes::from_static(body.as_bytes()));
    let (a, b) =
        futures_util::future::join(store.create(key, first.clone()), store.create(key, second.clone())).await;
    let (a, b) = (a?, b?);
    let late = store.create(key, third).await?;
    let body = store.get(key).await?;
    judge(key, (a, b, late), body.as_ref(), (&first, &second))
}

/// Decides from the three outcomes and the body that was read.
///
/// Two times `Exists` is possible and honest: a create whose answer was lost is
/// tried again by the adapter and then meets its own object.
fn judge(
    key: &str,
    outcomes: (Creation, Creation, Creation),
    body: Option<&Bytes>,
    (first, second): (&Bytes, &Bytes),
) -> Result<(), Error> {
    use Creation::{Created, Exists};
    let is_ours = match outcomes {
        (Created, Created, _) | (_, _, Created) => return Err(Error::refused(PROBE, key, IGNORED)),
        (Created, Exists, Exists) => body == Some(first),
        (Exists, Created, Exists) => body == Some(second),
        (Exists, Exists, Exists) => body == Some(first) || body == Some(second),
    };
    if !is_ours {
        let read = if body.is_some() { "another body" } else { "nothing" };
        let reason = format!("the store acknowledged a create-only write and then read {read}");
        return Err(Error::refused(PROBE, key, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use Creation::{Created, Exists};

    #[test]
    fn only_one_winner_whose_body_is_read_passes() {
        let (a, b) = (Bytes::from_static(b"a"), Bytes::from_static(b"b"));
        let rows = [
            ((Created, Exists, Exists), Some(&a), true),
            ((Exists, Created, Exists), Some(&b), true),
            ((Exists, Exists, Exists), Some(&b), true),
            ((Created, Created, Exists), Some(&b), false),
            ((Created, Exists, Created), Some(&a), false),
            ((Created, Exists, Exists), Some(&b), false),
            ((Created, Exists, Exists), None, false),
            ((Exists, Exists, Exists), None, false),
        ];
        for (outcomes, body, passes) in rows {
            let verdict = judge("k", outcomes, body, (&a, &b));
            assert_eq!(verdict.is_ok(), passes, "{outcomes:?} {body:?}: {verdict:?}");
        }
    }
}
