//! A store in memory, for tests and for whole nodes on virtual time.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Creation, Error, Listed, Store, key};

/// Keeps objects in an ordered map under one lock; each call is atomic and
/// completes without waiting.
#[derive(Debug, Default)]
pub struct MemoryStore {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

// === impl MemoryStore ===

impl MemoryStore {
    /// Creates an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns all objects as they are now, by key.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // A map is whole between two calls of its own methods.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn probe(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        key::check_key("get", key)?;
        Ok(self.lock().get(key).cloned())
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        key::check_key("put", key)?;
        key::check_body("put", key, body.len())?;
        self.lock().insert(key.to_owned(), body);
        Ok(())
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error> {
        key::check_key("create", key)?;
        key::check_body("create", key, body.len())?;
        let mut objects = self.lock();
        if objects.contains_key(key) {
            return Ok(Creation::Exists);
        }
        objects.insert(key.to_owned(), body);
        Ok(Creation::Created)
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Error> {
        key::check_list(prefix, after, limit)?;
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let objects = self.lock();
        Ok(objects
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, body)| Listed { key: key.clone(), bytes: body.len() as u64 })
            .collect())
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        key::check_key("delete", key)?;
        self.lock().remove(key);
        Ok(())
    }
}
