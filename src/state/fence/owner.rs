//! Owner records: which server may use a store.
//!
//! `owner/<n>` is a JSON object; `<n>` is `u64::MAX` − number, 16 hexadecimal digits, so
//! that the newest is listed first. Records are only ever created. A store passes on when
//! its owner says so (a clean stop), to the same identity (a restart), or by an operator's
//! `boilerhouse state takeover`; never because time has passed.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};

use super::Mode;
use crate::{
    clock::utc,
    store::{self, Creation, MAX_LIST_KEYS, Store},
};

/// The version this code writes, and the only one it reads.
pub const OWNER_VERSION: u32 = 1;

const PREFIX: &str = "owner/";
/// How often the next number may be found taken.
const ATTEMPTS: u32 = 8;
/// Records that are read at once.
const READS: usize = 16;

/// One link of the store's chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnerRecord {
    /// [`OWNER_VERSION`].
    pub version: u32,
    /// Rising by one from 1, also in the record's key.
    pub number: u64,
    /// Whom it concerns.
    pub server: String,
    /// The attempt that wrote it.
    pub nonce: String,
    /// How many servers may use the store.
    pub mode: Mode,
    /// What holds from now on.
    pub state: OwnerState,
    /// When, milliseconds since the epoch.
    pub created_ms: u64,
    /// Written by an operator's command and not by the server itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_operator: bool,
}

/// What an owner record says of its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerState {
    /// It uses the store.
    Held,
    /// It does not any more.
    Released,
}

/// Who uses a store: servers, with the record under which each does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Tenure {
    /// Nobody.
    #[default]
    Free,
    /// One server.
    Exclusive(OwnerRecord),
    /// Several, by identity.
    Shared(BTreeMap<String, OwnerRecord>),
}

/// Whether a server may take a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may append its own record.
    Take,
    /// It has: this is its term.
    Held(u64),
    /// Others have it.
    Elsewhere(Vec<OwnerRecord>),
}

/// Says why a store is not held.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Others have it; an operator decides.
    #[error("{}", explain(.0))]
    Elsewhere(Vec<OwnerRecord>),
    /// It is not known: try again.
    #[error("the store's owner cannot be found out")]
    Store(#[source] store::Error),
    /// What is there is no owner record.
    #[error("the store's owner cannot be found out: {0}")]
    Damaged(String),
}

// === impl OwnerRecord ===

impl OwnerRecord {
    /// Returns whether its server shares the store.
    pub fn is_shared(&self) -> bool {
        self.mode == Mode::Shared
    }
}

fn explain(owners: &[OwnerRecord]) -> String {
    let named: Vec<String> = owners
        .iter()
        .map(|owner| {
            let how = if owner.is_shared() { ", shared" } else { "" };
            format!("{:?} (since {}{how})", owner.server, utc(owner.created_ms))
        })
        .collect();
    format!(
        "the store is held by {}; stop that server in order, or, when it runs no more, give the store to this one \
         with `boilerhouse state takeover`",
        named.join(", ")
    )
}

/// Returns who uses a store after these records, oldest first.
pub fn tenure<'a>(records: impl IntoIterator<Item = &'a OwnerRecord>) -> Tenure {
    records.into_iter().fold(Tenure::Free, |before, record| match (before, record.state, record.mode) {
        (_, OwnerState::Held, Mode::Exclusive) => Tenure::Exclusive(record.clone()),
        (Tenure::Shared(mut all), OwnerState::Held, Mode::Shared) => {
            all.insert(record.server.clone(), record.clone());
            Tenure::Shared(all)
        }
        (_, OwnerState::Held, Mode::Shared) => {
            Tenure::Shared(BTreeMap::from([(record.server.clone(), record.clone())]))
        }
        (Tenure::Exclusive(owner), OwnerState::Released, _) if owner.server == record.server => Tenure::Free,
        (Tenure::Shared(mut all), OwnerState::Released, _) => {
            all.remove(&record.server);
            if all.is_empty() { Tenure::Free } else { Tenure::Shared(all) }
        }
        (before, OwnerState::Released, _) => before,
    })
}

/// Decides whether `server` may take the store; `nonce` is the attempt's.
pub fn verdict(tenure: &Tenure, server: &str, mode: Mode, nonce: &str) -> Verdict {
    let own = match tenure {
        Tenure::Free => return Verdict::Take,
        Tenure::Exclusive(owner) => Some(owner),
        Tenure::Shared(all) => all.get(server),
    };
    if let Some(own) = own.filter(|own| own.nonce == nonce && own.server == server) {
        return Verdict::Held(own.number);
    }
    match tenure {
        Tenure::Free => Verdict::Take,
        Tenure::Exclusive(owner) if owner.server == server => Verdict::Take,
        Tenure::Exclusive(owner) => Verdict::Elsewhere(vec![owner.clone()]),
        Tenure::Shared(_) if mode == Mode::Shared => Verdict::Take,
        Tenure::Shared(all) => {
            let others: Vec<_> = all.values().filter(|other| other.server != server).cloned().collect();
            if others.is_empty() { Verdict::Take } else { Verdict::Elsewhere(others) }
        }
    }
}

/// Returns whether a claim that `server` opened under `term` cannot live any more: the
/// store has passed on from it since.
pub fn is_void<'a>(
    records: impl IntoIterator<Item = &'a OwnerRecord>,
    server: &str,
    term: Option<u64>,
) -> bool {
    records.into_iter().filter(|record| record.number > term.unwrap_or(0)).any(|record| match record.state {
        OwnerState::Released => record.server == server,
        OwnerState::Held => record.mode == Mode::Exclusive && record.server != server,
    })
}

/// Reads every owner record, oldest first; none is proof that there are none.
///
/// # Errors
/// [`Error::Store`] and [`Error::Damaged`].
pub async fn read(store: &dyn Store) -> Result<Vec<OwnerRecord>, Error> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let page = store.list(PREFIX, names.last().map(String::as_str), MAX_LIST_KEYS).await;
        let page = page.map_err(Error::Store)?;
        let is_last = page.len() < MAX_LIST_KEYS;
        names.extend(page.into_iter().map(|listed| listed.key));
        if is_last {
            break;
        }
    }
    if names.is_empty() {
        return match store.get(&owner_key(1)).await.map_err(Error::Store)? {
            None => Ok(Vec::new()),
            Some(_) => Err(Error::Damaged(format!("{} is there but is not listed", owner_key(1)))),
        };
    }
    names.reverse();
    let reads = names.into_iter().map(async |name| match store.get(&name).await {
        Ok(Some(body)) => decode(&name, &body).map(Some),
        // Removed between, because a later one says all that it said.
        Ok(None) => Ok(None),
        Err(error) => Err(Error::Store(error)),
    });
    let all: Vec<Option<OwnerRecord>> = stream::iter(reads).buffered(READS).try_collect().await?;
    Ok(all.into_iter().flatten().collect())
}

/// Returns the number of the newest owner record; 0: none is listed.
///
/// # Errors
/// [`Error::Store`] and [`Error::Damaged`].
pub async fn newest_number(store: &dyn Store) -> Result<u64, Error> {
    let listed = store.list(PREFIX, None, 1).await.map_err(Error::Store)?;
    listed.first().map_or(Ok(0), |listed| {
        number_of(&listed.key)
            .ok_or_else(|| Error::Damaged(format!("{} is no owner record's name", listed.key)))
    })
}

/// Takes the store for a server, unless others have it; returns its term. The same nonce
/// may be tried again: it takes at most once.
///
/// # Errors
/// See [`Error`]; after [`Error::Store`] it may be taken.
pub async fn take(
    store: &dyn Store,
    server: &str,
    mode: Mode,
    nonce: &str,
    now_ms: u64,
) -> Result<u64, Error> {
    for _ in 0..ATTEMPTS {
        let records = read(store).await?;
        match verdict(&tenure(&records), server, mode, nonce) {
            Verdict::Held(term) => {
                prune(store, &records, server, mode, term).await;
                return Ok(term);
            }
            Verdict::Elsewhere(owners) => return Err(Error::Elsewhere(owners)),
            Verdict::Take => {}
        }
        let record = record(&records, server, nonce, mode, OwnerState::Held, now_ms);
        append(store, &record).await?;
    }
    Err(busy())
}

/// Gives the store up: [`take`] may succeed for others. Nothing happens when it is not held
/// under `nonce`.
///
/// # Errors
/// See [`Error`]; it is given up or not.
pub async fn release(
    store: &dyn Store,
    server: &str,
    mode: Mode,
    nonce: &str,
    now_ms: u64,
) -> Result<(), Error> {
    for _ in 0..ATTEMPTS {
        let records = read(store).await?;
        if !matches!(verdict(&tenure(&records), server, mode, nonce), Verdict::Held(_)) {
            return Ok(());
        }
        let ending = format!("{nonce}-released");
        append(store, &record(&records, server, &ending, mode, OwnerState::Released, now_ms)).await?;
    }
    Err(busy())
}

/// Declares by an operator's word that `from` uses the store no more, and gives it to `server`
/// unless that shares it already.
///
/// # Errors
/// [`Error::Store`] and [`Error::Damaged`].
pub async fn take_over(
    store: &dyn Store,
    from: &[OwnerRecord],
    server: &str,
    mode: Mode,
    nonce: &str,
    now_ms: u64,
) -> Result<(), Error> {
    for owner in from {
        let ending = format!("{nonce}-{}", owner.number);
        for attempt in 0.. {
            if attempt == ATTEMPTS {
                return Err(busy());
            }
            let records = read(store).await?;
            if !is_held(&tenure(&records), owner) {
                break;
            }
            let released = record(&records, &owner.server, &ending, owner.mode, OwnerState::Released, now_ms);
            append(store, &OwnerRecord { by_operator: true, ..released }).await?;
        }
    }
    let records = read(store).await?;
    match tenure(&records) {
        // It may be running: another record in its name would end its own.
        Tenure::Shared(all) if all.contains_key(server) => Ok(()),
        _ => take(store, server, mode, nonce, now_ms).await.map(|_| ()),
    }
}

fn is_held(tenure: &Tenure, owner: &OwnerRecord) -> bool {
    match tenure {
        Tenure::Free => false,
        Tenure::Exclusive(now) => now.server == owner.server,
        Tenure::Shared(all) => all.contains_key(&owner.server),
    }
}

fn record(
    records: &[OwnerRecord],
    server: &str,
    nonce: &str,
    mode: Mode,
    state: OwnerState,
    created_ms: u64,
) -> OwnerRecord {
    OwnerRecord {
        version: OWNER_VERSION,
        number: records.last().map_or(1, |last| last.number + 1),
        server: server.to_owned(),
        nonce: nonce.to_owned(),
        mode,
        state,
        created_ms,
        by_operator: false,
    }
}

/// Creates a record. A number that is taken and an answer that is lost are both settled by
/// reading the chain again, which the callers do.
async fn append(store: &dyn Store, record: &OwnerRecord) -> Result<(), Error> {
    let body = serde_json::to_vec(record).expect("an owner record has only text keys");
    match store.create(&owner_key(record.number), Bytes::from(body)).await {
        Ok(Creation::Created | Creation::Exists) | Err(store::Error::Unknown { .. }) => Ok(()),
        Err(error) => Err(Error::Store(error)),
    }
}

/// Removes records that say nothing any more, as far as that works: without this, every
/// start would be one to read for ever. Record 1 stays, so that absence can be proven.
async fn prune(store: &dyn Store, records: &[OwnerRecord], server: &str, mode: Mode, term: u64) {
    let is_old = |record: &&OwnerRecord| {
        let own = record.server == server && !record.by_operator;
        record.number != 1 && record.number < term && (mode == Mode::Exclusive || own)
    };
    for record in records.iter().filter(is_old) {
        if let Err(error) = store.delete(&owner_key(record.number)).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "old owner record stays for now");
            return;
        }
    }
}

fn busy() -> Error {
    Error::Store(store::Error::Unavailable {
        operation: "create",
        key: PREFIX.to_owned(),
        reason: format!("the next owner record was taken {ATTEMPTS} times in a row"),
    })
}

fn owner_key(number: u64) -> String {
    format!("{PREFIX}{:016x}", u64::MAX - number)
}

fn number_of(name: &str) -> Option<u64> {
    let hex = name.strip_prefix(PREFIX).filter(|hex| hex.len() == 16)?;
    u64::from_str_radix(hex, 16).ok().map(|left| u64::MAX - left).filter(|number| owner_key(*number) == name)
}

fn decode(name: &str, body: &[u8]) -> Result<OwnerRecord, Error> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let damaged = |problem: String| Error::Damaged(format!("{name}: {problem}"));
    let Versioned { version } = serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))?;
    if version != OWNER_VERSION {
        return Err(damaged(format!("it has format version {version}, this server reads {OWNER_VERSION}")));
    }
    let record: OwnerRecord = serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))?;
    if number_of(name) != Some(record.number) {
        return Err(damaged(format!("its number is {}", record.number)));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn a_store_passes_on_by_release_same_identity_and_takeover_only() {
        let store = MemoryStore::new();
        let take = |server, mode, nonce| take(&store, server, mode, nonce, 5);
        use Mode::{Exclusive, Shared};
        assert_eq!(take("a", Exclusive, "a1").await.unwrap(), 1);
        assert_eq!(take("a", Exclusive, "a1").await.unwrap(), 1, "a nonce takes once");
        assert_eq!(take("a", Exclusive, "a2").await.unwrap(), 2, "the same identity");
        let refused = take("b", Exclusive, "b1").await.unwrap_err();
        assert!(
            refused.to_string().contains("\"a\"") && refused.to_string().contains("takeover"),
            "{refused}"
        );
        assert!(matches!(take("b", Shared, "b1").await, Err(Error::Elsewhere(_))));
        release(&store, "a", Exclusive, "a1", 6).await.unwrap();
        assert!(take("b", Exclusive, "b1").await.is_err(), "an older attempt releases nothing");
        release(&store, "a", Exclusive, "a2", 6).await.unwrap();
        assert_eq!(take("b", Exclusive, "b1").await.unwrap(), 4);
        assert_eq!(newest_number(&store).await.unwrap(), 4);
        let Err(Error::Elsewhere(owners)) = take("a", Exclusive, "a3").await else { panic!("taken") };
        take_over(&store, &owners, "a", Exclusive, "a3", 7).await.unwrap();
        let all = read(&store).await.unwrap();
        assert_eq!(verdict(&tenure(&all), "a", Exclusive, "a3"), Verdict::Held(6));
        assert!(is_void(&all, "b", Some(4)) && !is_void(&all, "a", Some(6)));
        assert_eq!(all.first().map(|record| record.number), Some(1), "record 1 stays");
    }

    #[tokio::test]
    async fn sharers_join_each_other_and_no_one_else() {
        let store = MemoryStore::new();
        use Mode::{Exclusive, Shared};
        for (server, nonce, term) in [("a", "a1", 1), ("b", "b1", 2), ("a", "a2", 3)] {
            assert_eq!(take(&store, server, Shared, nonce, 5).await.unwrap(), term, "{nonce}");
        }
        let Err(Error::Elsewhere(owners)) = take(&store, "a", Exclusive, "a3", 5).await else {
            panic!("b uses it, too");
        };
        assert_eq!(owners.iter().map(|owner| owner.server.as_str()).collect::<Vec<_>>(), ["b"]);
        take_over(&store, &owners, "a", Shared, "a4", 6).await.unwrap();
        let all = read(&store).await.unwrap();
        assert!(is_void(&all, "b", Some(2)) && !is_void(&all, "a", Some(1)));
        assert_eq!(verdict(&tenure(&all), "a", Shared, "a2"), Verdict::Held(3), "a goes on as it was");
        assert_eq!(take(&store, "b", Shared, "b2", 7).await.unwrap(), 5);
        let all = read(&store).await.unwrap();
        assert!(!is_void(&all, "b", Some(5)) && is_void(&all, "b", Some(2)));
    }

    #[test]
    fn names_and_versions_are_checked() {
        assert_eq!(number_of("owner/fffffffffffffffe"), Some(1));
        for name in ["owner/x", "owner/ffff", "t/fffffffffffffffe", "owner/FFFFFFFFFFFFFFFE"] {
            assert_eq!(number_of(name), None, "{name}");
        }
        let error = decode("owner/fffffffffffffffe", br#"{"version":2}"#).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
    }
}
