//! A store in memory, for tests and for whole nodes on virtual time.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::{Creation, Error, Listed, Parts, Store, Versioning, key};
use crate::clock::SharedClock;

/// Keeps objects in an ordered map under one lock; each call is atomic and
/// completes without waiting.
#[derive(Default)]
pub struct MemoryStore {
    objects: Mutex<BTreeMap<String, Object>>,
    clock: Option<SharedClock>,
}

#[derive(Clone)]
struct Object {
    body: Bytes,
    modified_ms: u64,
}

// === impl MemoryStore ===

impl MemoryStore {
    /// Creates an empty store that does not say when an object was written.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an empty store that says when an object was written, by `clock`.
    pub fn with_clock(clock: SharedClock) -> Self {
        Self { clock: Some(clock), ..Self::default() }
    }

    /// Returns all objects as they are now, by key.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.lock().iter().map(|(key, object)| (key.clone(), object.body.clone())).collect()
    }

    fn object(&self, body: Bytes) -> Object {
        Object { body, modified_ms: self.clock.as_ref().map_or(0, |clock| clock.unix_ms()) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Object>> {
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
        Ok(self.lock().get(key).map(|object| object.body.clone()))
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        key::check_key("put", key)?;
        key::check_body("put", key, body.len())?;
        let object = self.object(body);
        self.lock().insert(key.to_owned(), object);
        Ok(())
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error> {
        key::check_key("create", key)?;
        key::check_body("create", key, body.len())?;
        let object = self.object(body);
        let mut objects = self.lock();
        if objects.contains_key(key) {
            return Ok(Creation::Exists);
        }
        objects.insert(key.to_owned(), object);
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
            .map(|(key, object)| Listed {
                key: key.clone(),
                bytes: object.body.len() as u64,
                modified_ms: object.modified_ms,
            })
            .collect())
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        key::check_key("delete", key)?;
        self.lock().remove(key);
        Ok(())
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool, Error> {
        key::check_key("copy", from)?;
        key::check_key("copy", to)?;
        let mut objects = self.lock();
        let Some(body) = objects.get(from).map(|object| object.body.clone()) else { return Ok(false) };
        objects.insert(to.to_owned(), self.object(body));
        Ok(true)
    }

    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Error> {
        key::check_key("get_range", key)?;
        key::check_range(key, offset, bytes)?;
        Ok(self.lock().get(key).map(|object| key::cut(&object.body, offset, bytes)))
    }

    async fn put_parts(&self, key: &str, mut parts: Parts) -> Result<(), Error> {
        key::check_key("put_parts", key)?;
        let mut body = Vec::new();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|error| Error::source(key, &error))?;
            key::check_body("put_parts", key, part.len())?;
            body.extend_from_slice(&part);
        }
        let object = self.object(body.into());
        self.lock().insert(key.to_owned(), object);
        Ok(())
    }

    async fn versioning(&self) -> Result<Versioning, Error> {
        Ok(Versioning::Off)
    }

    async fn abort_uploads(&self, _before_ms: u64) -> Result<u64, Error> {
        Ok(0)
    }
}
