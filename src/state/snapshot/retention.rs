//! What of a key's history may go, and its removal.
//!
//! A snapshot is kept by rank or by age, whichever keeps it; the newest always is.
//! Opens and closes say nothing once a later record is there, but for the one with which
//! another server took a kept snapshot up: from it the server that saved it, and never heard,
//! learns that its save counts. Record 1 stays as the
//! anchor of the numbers; its tree ages like any other.

use std::collections::{HashMap, HashSet};

use futures_util::{StreamExt, TryStreamExt, stream};

use crate::{
    model::{Epoch, Key, spec::Layout},
    state::Error,
    store::{self, Listed, Store},
};

use super::{
    codec::ObjectCodec,
    commit::{damaged, get_record, newest_record},
    manifest::{Manifest, Node},
    name::{
        ObjectKind, ObjectName, key_prefix, kind_prefix, object_key, plain_prefix, record_key, record_number,
        records_prefix,
    },
    record::{Record, RecordKind},
};

const PAGE: usize = 1_000;
/// 200 000 names; what is beyond waits for the next time.
const PAGES: usize = 200;
/// Records read together; each is small.
const READS: usize = 8;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// An object that was written within this time is left alone, whatever names it: longer
/// than one object may be on its way, and than two clocks differ.
pub(in crate::state) const GRACE_MS: u64 = 60 * 60 * 1_000;

/// What of a history is kept: `persist.keep_last` and `persist.keep_days`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// This many of the newest snapshots; 0 counts as 1.
    pub last: u32,
    /// Snapshots made within so many days; 0: none for their age.
    pub days: u32,
}

/// What retention needs to know of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::state) struct Link {
    /// Its number.
    pub(in crate::state) number: u64,
    /// Whether it made a tree the newest.
    pub(in crate::state) is_snapshot: bool,
    /// Whether another server than that of the record before, a snapshot, took it up.
    pub(in crate::state) is_handover: bool,
    /// When.
    pub(in crate::state) created_ms: u64,
}

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Records.
    pub records: u64,
    /// Objects.
    pub objects: u64,
    /// Their bytes as stored.
    pub bytes: u64,
}

// === impl Keep ===

impl Keep {
    fn last(self) -> usize {
        usize::try_from(self.last.max(1)).unwrap_or(usize::MAX)
    }

    /// Says whether age keeps what was made at `created_ms`.
    fn keeps_age(self, created_ms: u64, now_ms: u64) -> bool {
        self.days > 0 && created_ms.saturating_add(u64::from(self.days) * DAY_MS) > now_ms
    }
}

/// Names the links, newest first, whose records go. The newest link and record 1 never do.
pub(in crate::state) fn expired(links: &[Link], keep: Keep, now_ms: u64) -> Vec<u64> {
    let mut newer_snapshots = 0;
    let mut gone = Vec::new();
    for (rank, link) in links.iter().enumerate() {
        let keeps = if link.is_snapshot {
            newer_snapshots += 1;
            newer_snapshots <= keep.last() || keep.keeps_age(link.created_ms, now_ms)
        } else {
            rank == 0 || (link.is_handover && newer_snapshots < keep.last())
        };
        if !keeps && link.number != 1 {
            gone.push(link.number);
        }
    }
    gone
}

/// Says whether an object may be removed: an older epoch wrote it, long ago as far as
/// the store says when, and no kept tree needs it.
pub(in crate::state) fn is_garbage(
    name: &ObjectName,
    modified_ms: u64,
    own: Epoch,
    needed: &HashSet<ObjectName>,
    now_ms: u64,
) -> bool {
    name.epoch < own && is_old(modified_ms, now_ms) && !needed.contains(name)
}

/// Says whether what was written at `modified_ms` is on nobody's way any more.
fn is_old(modified_ms: u64, now_ms: u64) -> bool {
    modified_ms == 0 || modified_ms.saturating_add(GRACE_MS) <= now_ms
}

/// Names the packs of which this tree needs less than half: the next save writes the
/// files in them again, so that the rest can go.
pub(in crate::state) fn worn_packs(manifest: &Manifest) -> HashSet<u32> {
    let mut live: HashMap<u32, HashMap<u64, u64>> = HashMap::new();
    for item in &manifest.items {
        let Node::File { pieces, .. } = &item.node else { continue };
        for piece in pieces {
            // Equal contents share a piece; it counts once.
            live.entry(piece.object).or_default().insert(piece.offset, piece.bytes);
        }
    }
    let is_worn = |number: u32, needed: u64| {
        manifest
            .objects
            .get(number as usize)
            .is_some_and(|object| object.name.kind == ObjectKind::Pack && needed * 2 < object.bytes)
    };
    let sums = live.into_iter().map(|(number, pieces)| (number, pieces.into_values().sum()));
    sums.filter(|(number, needed)| is_worn(*number, *needed)).map(|(number, _)| number).collect()
}

/// Removes the records that `keep` does not keep, then the objects that no kept record
/// needs. `newest` is the record that the caller committed or read; while it is not the
/// newest any more, nothing is removed.
///
/// Records go first: an object that is still there without a record is only
/// waste, a record without its objects would be a lie. Objects of `newest`'s own
/// epoch are left for a later one: an attempt may be writing them now. A save under
/// way reuses nothing but what the newest record needs, and that is kept.
///
/// `all` looks for objects without a record even when no record goes: what a save
/// left that did not end.
///
/// # Errors
/// Of the first call that fails; what was removed stays removed, the rest waits
/// for the next time.
pub(in crate::state) async fn retain(
    store: &dyn Store,
    key: &Key,
    newest: &Record,
    keep: Keep,
    now_ms: u64,
    codec: &ObjectCodec,
    all: bool,
) -> Result<Collected, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let key_digest = key.digest();
    let listed = list_all(store, &records_prefix(&key_digest)).await.map_err(failed)?;
    let numbers: Vec<u64> = listed.iter().filter_map(|name| record_number(&key_digest, &name.key)).collect();
    let mut collected = Collected::default();
    let gone = gone(store, key, &key_digest, &numbers, keep, now_ms).await?;
    // Where much is kept, marking costs much: it waits until there is something to be had.
    let kept: Vec<u64> = numbers.into_iter().filter(|number| !gone.contains(number)).collect();
    if !all && gone.len() < (kept.len() / 16).max(1) {
        return Ok(collected);
    }
    must_be_newest(store, key, &key_digest, newest).await?;
    for number in &gone {
        store.delete(&record_key(&key_digest, *number)).await.map_err(failed)?;
        collected.records += 1;
    }
    let is_anchor_only = |records: &[Record], record: &Record| {
        // Record 1 stays when its tree does not.
        let snapshots = records.iter().filter(|record| Link::of(record).is_snapshot).count();
        record.number == 1
            && records.len() > 1
            && snapshots > keep.last()
            && !keep.keeps_age(record.created_ms, now_ms)
    };
    let needed = needed(store, key, &key_digest, &kept, codec, &is_anchor_only).await?;
    let mut garbage: Vec<Listed> = Vec::new();
    let layout = newest.tree.as_ref().and_then(|tree| tree.manifest.kind.layout());
    if layout != Some(Layout::Mirror) {
        // Plain objects are the newest tree's or nobody's; what is being written now is young.
        for prefix in [plain_prefix(&key_digest), kind_prefix(&key_digest, ObjectKind::Kept)] {
            let listed = list_all(store, &prefix).await.map_err(failed)?;
            garbage.extend(listed.into_iter().filter(|listed| is_old(listed.modified_ms, now_ms)));
        }
    }
    for kind in ObjectKind::OF_SNAPSHOTS {
        for listed in list_all(store, &kind_prefix(&key_digest, kind)).await.map_err(failed)? {
            let parsed = listed.key.strip_prefix(&key_prefix(&key_digest)).and_then(ObjectName::parse);
            let is_garbage =
                |name: ObjectName| is_garbage(&name, listed.modified_ms, newest.epoch, &needed, now_ms);
            if parsed.is_some_and(is_garbage) {
                garbage.push(listed);
            }
        }
    }
    if garbage.is_empty() {
        return Ok(collected);
    }
    must_be_newest(store, key, &key_digest, newest).await?;
    for listed in &garbage {
        store.delete(&listed.key).await.map_err(failed)?;
        collected.objects += 1;
        collected.bytes += listed.bytes;
    }
    Ok(collected)
}

/// Reads as many records as it takes to know which go: from the newest on until enough
/// snapshots are seen, then from the oldest on until age keeps one.
async fn gone(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    numbers: &[u64],
    keep: Keep,
    now_ms: u64,
) -> Result<HashSet<u64>, Error> {
    let mut links: Vec<(Link, Option<String>)> = Vec::new();
    let mut snapshots = 0;
    let mut from = 0;
    while from < numbers.len() && snapshots < keep.last() {
        let until = numbers.len().min(from + READS.max(keep.last() - snapshots));
        for record in read_all(store, key, key_digest, &numbers[from..until]).await? {
            let link = Link::of(&record);
            if let (Some(newer), true) = (links.last_mut(), link.is_snapshot) {
                newer.0.is_handover = !newer.0.is_snapshot && newer.1 != record.server;
            }
            snapshots += usize::from(link.is_snapshot);
            links.push((link, record.server));
        }
        from = until;
    }
    let links: Vec<Link> = links.into_iter().map(|(link, _)| link).collect();
    let mut gone: HashSet<u64> = expired(&links, keep, now_ms).into_iter().collect();
    let mut rest = &numbers[from..];
    if keep.days == 0 {
        gone.extend(rest.iter().copied().filter(|number| *number != 1));
        return Ok(gone);
    }
    while !rest.is_empty() {
        let (newer, oldest) = rest.split_at(rest.len().saturating_sub(READS));
        let mut is_done = false;
        for record in read_all(store, key, key_digest, oldest).await? {
            let link = Link::of(&record);
            let is_kept = link.is_snapshot && keep.keeps_age(link.created_ms, now_ms);
            is_done |= is_kept;
            if !is_kept && link.number != 1 {
                gone.insert(link.number);
            }
        }
        rest = newer;
        if is_done {
            break;
        }
    }
    Ok(gone)
}

/// Returns the names of everything that the trees of these records need.
async fn needed(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    kept: &[u64],
    codec: &ObjectCodec,
    is_anchor_only: &(dyn Fn(&[Record], &Record) -> bool + Sync),
) -> Result<HashSet<ObjectName>, Error> {
    let records = read_all(store, key, key_digest, kept).await?;
    let mut needed = HashSet::new();
    for (rank, record) in records.iter().enumerate() {
        let Some(tree) = &record.tree else { continue };
        // An open or close only carries on what is another record's to keep.
        if rank > 0 && tree.snapshot != record.number {
            continue;
        }
        if is_anchor_only(&records, record) || !needed.insert(tree.manifest) {
            continue;
        }
        // Record 1 may outlive its tree, and come back into the window when the
        // window grows. Its objects are gone already; nothing else is judged by it.
        let Some(manifest) = read_manifest(store, key, key_digest, &tree.manifest, codec).await? else {
            if record.number == 1 {
                continue;
            }
            let name = object_key(key_digest, &tree.manifest);
            return Err(damaged(key, format!("{name} is not there")));
        };
        needed.extend(manifest.objects.iter().map(|object| object.name));
    }
    Ok(needed)
}

/// Reads records by their numbers, in the order of the numbers.
pub(in crate::state) async fn read_all(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    numbers: &[u64],
) -> Result<Vec<Record>, Error> {
    stream::iter(numbers.to_vec())
        .map(|number| async move {
            let record = read_record(store, key, key_digest, number).await?;
            let name = record_key(key_digest, number);
            record.ok_or_else(|| damaged(key, format!("{name} is listed but not there")))
        })
        .buffered(READS)
        .try_collect()
        .await
}

/// Reads a record; `None`: it is proven absent.
pub(in crate::state) async fn read_record(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    number: u64,
) -> Result<Option<Record>, Error> {
    let name = record_key(key_digest, number);
    let body = get_record(store, &name).await.map_err(|source| Error::Store { key: key.clone(), source })?;
    let Some(body) = body else { return Ok(None) };
    let record = Record::decode(&body, key, number);
    record.map(Some).map_err(|problem| damaged(key, format!("record {name}: {problem}")))
}

/// Reads a manifest and checks it against its name; `None`: it is proven absent.
pub(in crate::state) async fn read_manifest(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    name: &ObjectName,
    codec: &ObjectCodec,
) -> Result<Option<Manifest>, Error> {
    let object = object_key(key_digest, name);
    let body = store.get(&object).await.map_err(|source| Error::Store { key: key.clone(), source })?;
    let Some(body) = body else { return Ok(None) };
    codec.decode_manifest(name, body).map(Some).map_err(|error| Error::of_codec(key, error))
}

async fn must_be_newest(store: &dyn Store, key: &Key, key_digest: &str, own: &Record) -> Result<(), Error> {
    match newest_record(store, key, key_digest).await? {
        Some(newest) if newest == *own => Ok(()),
        Some(newest) => Err(Error::Fenced { key: key.clone(), own: own.epoch, newest: newest.epoch }),
        None => Err(damaged(key, "the newest record is gone".into())),
    }
}

/// Lists everything below a prefix, up to a bound.
pub(in crate::state) async fn list_all(store: &dyn Store, prefix: &str) -> Result<Vec<Listed>, store::Error> {
    let mut all: Vec<Listed> = Vec::new();
    for _ in 0..PAGES {
        let page = store.list(prefix, all.last().map(|listed| listed.key.as_str()), PAGE).await?;
        let is_last = page.len() < PAGE;
        all.extend(page);
        if is_last {
            break;
        }
    }
    Ok(all)
}

// === impl Link ===

impl Link {
    fn of(record: &Record) -> Self {
        let is_snapshot = matches!(record.kind, RecordKind::Snapshot | RecordKind::Restore);
        Self { number: record.number, is_snapshot, is_handover: false, created_ms: record.created_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            manifest::{
                Piece,
                tests::{manifest_of, object},
            },
            name::Digest,
        },
        *,
    };

    const NOW: u64 = 100 * DAY_MS;

    /// A chain, newest first: `s` a snapshot, `o` an open or close, `h` one of another server;
    /// each made `age` days ago.
    fn chain(kinds: &str, ages: &[u64]) -> Vec<Link> {
        let numbers = (1..=kinds.len() as u64).rev();
        let links = kinds.chars().zip(ages).zip(numbers);
        links
            .map(|((kind, age), number)| Link {
                number,
                is_snapshot: kind == 's',
                is_handover: kind == 'h',
                created_ms: NOW - age * DAY_MS,
            })
            .collect()
    }

    #[test]
    fn a_snapshot_is_kept_by_rank_or_by_age_and_the_newest_and_record_one_always() {
        let days = [0, 1, 2, 3, 4];
        #[rustfmt::skip]
        let rows: &[(&str, u32, u32, &[u64])] = &[
            ("sssss", 2, 0, &[3, 2]),
            ("sssss", 9, 0, &[]),
            ("sssss", 0, 0, &[4, 3, 2]),
            ("sssss", 1, 3, &[2]),
            ("sssss", 1, 9, &[]),
            ("sssss", 4, 1, &[]),
            ("osoos", 1, 0, &[3, 2]),
            ("ossos", 1, 9, &[2]),
            ("sosos", 2, 0, &[4, 2]),
            ("ooooo", 1, 0, &[4, 3, 2]),
            ("shshs", 2, 0, &[2]),
            ("shsos", 3, 0, &[2]),
            ("shsos", 1, 0, &[4, 3, 2]),
        ];
        for (kinds, last, days_kept, gone) in rows {
            let keep = Keep { last: *last, days: *days_kept };
            assert_eq!(expired(&chain(kinds, &days), keep, NOW), *gone, "{kinds} {keep:?}");
        }
        assert_eq!(expired(&[], Keep { last: 3, days: 0 }, NOW), Vec::<u64>::new());
        let old = chain("ss", &[90, 99]);
        assert_eq!(expired(&old, Keep { last: 1, days: 1 }, NOW), Vec::<u64>::new(), "the newest and 1");
    }

    #[test]
    fn only_old_unneeded_objects_are_garbage() {
        let name =
            |epoch| ObjectName { kind: ObjectKind::Pack, epoch: Epoch(epoch), digest: Digest::of(b"x") };
        let needed = HashSet::from([name(1)]);
        let long_ago = NOW - GRACE_MS;
        let rows = [
            (1, long_ago, false, "a kept tree needs it"),
            (2, long_ago, true, "an older epoch's, and nobody's"),
            (2, 0, true, "the store does not say when"),
            (2, long_ago + 1, false, "it may be on its way"),
            (2, NOW + 5, false, "another clock"),
            (3, long_ago, false, "it may be being written"),
            (4, long_ago, false, "a later claim's"),
        ];
        for (epoch, modified_ms, expected, why) in rows {
            let found = is_garbage(&name(epoch), modified_ms, Epoch(3), &needed, NOW);
            assert_eq!(found, expected, "{why}");
        }
    }

    #[test]
    fn a_pack_is_worn_when_less_than_half_of_it_is_needed() {
        let object = |kind, body: &[u8]| object(ObjectName::of(kind, Epoch(1), body), 100);
        let piece = |object, offset, bytes| Piece { object, offset, bytes };
        let rows: [(&[u64], &[u32]); 4] = [(&[100], &[]), (&[50], &[]), (&[49], &[0]), (&[20, 30], &[])];
        for (sizes, worn) in rows {
            let mut offset = 0;
            let mut files = Vec::new();
            for (bytes, name) in sizes.iter().zip(["a", "b"]) {
                files.push((name, vec![piece(0, offset, *bytes)], *bytes));
                offset += bytes;
            }
            let manifest = manifest_of(vec![object(ObjectKind::Pack, b"p")], files);
            assert_eq!(worn_packs(&manifest), worn.iter().copied().collect(), "{sizes:?}");
        }
        let twice = vec![("a", vec![piece(0, 0, 30)], 30), ("b", vec![piece(0, 0, 30)], 30)];
        let manifest = manifest_of(vec![object(ObjectKind::Pack, b"p")], twice);
        assert_eq!(worn_packs(&manifest), HashSet::from([0]), "equal contents count once");
        let chunk =
            manifest_of(vec![object(ObjectKind::Chunk, b"c")], vec![("a", vec![piece(0, 0, 10)], 10)]);
        assert_eq!(worn_packs(&chunk), HashSet::new(), "a chunk is one file's");
    }
}
