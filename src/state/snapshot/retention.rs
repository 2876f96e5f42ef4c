//! What of a key's history may go, and its removal.

use std::collections::HashSet;

use crate::{
    model::{Epoch, Key},
    state::Error,
    store::{self, Store},
};

use super::{
    commit::{damaged, newest_record},
    manifest::{Manifest, Record},
    name::{
        Digest, ObjectKind, ObjectName, key_prefix, object_key, record_key, record_number, records_prefix,
    },
};

const PAGE: usize = 1_000;
/// 200 000 names; what is beyond waits for the next time.
const PAGES: usize = 200;

/// Splits record numbers, newest first, into those whose trees are kept and those
/// whose records are removed. Record 1 is in neither when it is old: it stays, as
/// the anchor of the numbers, and its tree goes.
pub(in crate::state) fn split(numbers: &[u64], keep_last: u32) -> (Vec<u64>, Vec<u64>) {
    let keep = usize::try_from(keep_last.max(1)).unwrap_or(usize::MAX).min(numbers.len());
    let (kept, old) = numbers.split_at(keep);
    (kept.to_vec(), old.iter().copied().filter(|number| *number != 1).collect())
}

/// Says whether an object may be removed: an older epoch wrote it, and no kept tree needs it.
pub(in crate::state) fn is_garbage(name: &ObjectName, own: Epoch, needed: &HashSet<ObjectName>) -> bool {
    name.epoch < own && !needed.contains(name)
}

/// Removes records beyond `keep_last`, then the objects that no kept record needs.
/// `newest` is the record that was just committed; while it is not the newest any
/// more, nothing is removed. Answers how many objects went.
///
/// Records go first: an object that is still there without a record is only
/// waste, a record without its objects would be a lie. Objects of `newest`'s own
/// epoch are left for a later one: an attempt may be writing them now.
///
/// # Errors
/// Of the first call that fails; what was removed stays removed, the rest waits
/// for the next save.
pub(in crate::state) async fn retain(
    store: &dyn Store,
    key: &Key,
    newest: &Record,
    keep_last: u32,
) -> Result<u64, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let key_digest = key.digest();
    let listed = list_all(store, &records_prefix(&key_digest)).await.map_err(failed)?;
    let numbers: Vec<u64> = listed.iter().filter_map(|name| record_number(&key_digest, name)).collect();
    let (kept, old) = split(&numbers, keep_last);
    if old.is_empty() {
        return Ok(0);
    }
    must_be_newest(store, key, &key_digest, newest).await?;
    for number in old {
        store.delete(&record_key(&key_digest, number)).await.map_err(failed)?;
    }
    let mut needed = HashSet::new();
    for number in kept {
        add_needed(store, key, &key_digest, number, &mut needed).await?;
    }
    let mut garbage = Vec::new();
    for kind in ObjectKind::ALL {
        let prefix = format!("{}{}/", key_prefix(&key_digest), kind.letter());
        for name in list_all(store, &prefix).await.map_err(failed)? {
            let parsed = name.strip_prefix(&key_prefix(&key_digest)).and_then(ObjectName::parse);
            if parsed.is_some_and(|parsed| is_garbage(&parsed, newest.epoch, &needed)) {
                garbage.push(name);
            }
        }
    }
    must_be_newest(store, key, &key_digest, newest).await?;
    for name in &garbage {
        store.delete(name).await.map_err(failed)?;
    }
    Ok(garbage.len() as u64)
}

/// Adds the manifest of a kept record and everything it names.
async fn add_needed(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    number: u64,
    needed: &mut HashSet<ObjectName>,
) -> Result<(), Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let name = record_key(key_digest, number);
    let body = store.get(&name).await.map_err(failed)?;
    let body = body.ok_or_else(|| damaged(key, format!("{name} is listed but not there")))?;
    let record = Record::decode(&body, key, number).map_err(|problem| damaged(key, problem))?;
    if !needed.insert(record.manifest) {
        return Ok(());
    }
    let name = object_key(key_digest, &record.manifest);
    let body = store.get(&name).await.map_err(failed)?;
    let Some(body) = body else {
        // Record 1 may outlive its tree, and come back into the window when the
        // window grows. Its objects are gone already; nothing else is judged by it.
        if number == 1 {
            return Ok(());
        }
        return Err(damaged(key, format!("{name} is not there")));
    };
    if Digest::of(&body) != record.manifest.digest {
        return Err(damaged(key, format!("{name} does not have the bytes of its name")));
    }
    let manifest =
        Manifest::decode(&body, key).map_err(|problem| damaged(key, format!("{name}: {problem}")))?;
    needed.extend(manifest.objects.iter().map(|object| object.name));
    Ok(())
}

async fn must_be_newest(store: &dyn Store, key: &Key, key_digest: &str, own: &Record) -> Result<(), Error> {
    match newest_record(store, key, key_digest).await? {
        Some(newest) if newest == *own => Ok(()),
        Some(newest) => Err(Error::Fenced { key: key.clone(), own: own.epoch, newest: newest.epoch }),
        None => Err(damaged(key, "the newest record is gone".into())),
    }
}

async fn list_all(store: &dyn Store, prefix: &str) -> Result<Vec<String>, store::Error> {
    let mut names: Vec<String> = Vec::new();
    for _ in 0..PAGES {
        let page = store.list(prefix, names.last().map(String::as_str), PAGE).await?;
        let is_last = page.len() < PAGE;
        names.extend(page.into_iter().map(|listed| listed.key));
        if is_last {
            break;
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_one_and_the_newest_stay() {
        assert_eq!(split(&[5, 4, 3, 2, 1], 2), (vec![5, 4], vec![3, 2]));
        assert_eq!(split(&[5, 4, 1], 9), (vec![5, 4, 1], vec![]));
        assert_eq!(split(&[2, 1], 0), (vec![2], vec![]));
        assert_eq!(split(&[], 3), (vec![], vec![]));
    }

    #[test]
    fn only_old_unneeded_objects_are_garbage() {
        let name =
            |epoch| ObjectName { kind: ObjectKind::Pack, epoch: Epoch(epoch), digest: Digest::of(b"x") };
        let needed = HashSet::from([name(1)]);
        assert!(!is_garbage(&name(1), Epoch(3), &needed), "a kept tree needs it");
        assert!(is_garbage(&name(2), Epoch(3), &needed));
        assert!(!is_garbage(&name(3), Epoch(3), &needed), "it may be being written");
        assert!(!is_garbage(&name(4), Epoch(3), &needed), "a later claim's");
    }
}
