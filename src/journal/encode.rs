//! Operations as statements and values.
//!
//! Turning rows into JSON is the larger part of a commit's work. It is done by
//! the caller, before the queue, so that the one writer does not.

use rusqlite::{Connection, ffi, params};

use super::{ClaimRow, Op, error::Error};
use crate::model::{ClaimState, Key};

/// Rows nested deeper are refused: above 128 levels they could be written, but
/// not be read again at the next start.
const DEPTH_MAX: usize = 120;

/// An operation ready to be carried out.
pub(super) enum Write {
    PutSlot {
        slot: String,
        workload: String,
        phase: &'static str,
        row: String,
    },
    DropSlot {
        slot: String,
    },
    PutClaim {
        key: Key,
        epoch: i64,
        state: ClaimState,
        superseded_by: Option<i64>,
        row: String,
    },
    DropClaim {
        key: Key,
        epoch: i64,
    },
    PutTree {
        key: Key,
        epoch: i64,
        row: String,
    },
    DropTree {
        key: Key,
    },
    PutTenant {
        tenant: String,
        metadata: String,
    },
    PutSecret {
        tenant: String,
        name: String,
        sealed: Vec<u8>,
    },
    DropSecret {
        tenant: String,
        name: String,
    },
    PutRevision {
        revision: String,
        json: String,
    },
    DropRevision {
        revision: String,
    },
    BeginErasure {
        tenant: String,
    },
    EndErasure {
        tenant: String,
    },
    PutFact {
        name: &'static str,
        value: String,
    },
    /// Panics, for the tests of what the writer does then.
    #[cfg(test)]
    Panic,
    /// Holds the writer until the other end is dropped, for the tests of the queue.
    #[cfg(test)]
    Hold(std::sync::Mutex<std::sync::mpsc::Receiver<()>>),
}

/// Why a write was not carried out.
#[derive(Debug)]
pub(super) enum Failure {
    /// This write is at fault.
    Write(Error),
    /// The database is.
    Database(rusqlite::Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

// === impl Write ===

impl Write {
    pub(super) fn new(op: Op) -> Result<Self, Error> {
        Ok(match op {
            Op::PutSlot(row) => Self::PutSlot {
                row: json("a slot", &row)?,
                slot: row.slot.into(),
                workload: row.workload.into(),
                phase: row.phase.as_str(),
            },
            Op::DropSlot(slot) => Self::DropSlot { slot: slot.into() },
            Op::PutClaim(row) => {
                let text = json("a claim", &row)?;
                let ClaimRow { key, epoch, state, superseded_by, .. } = *row;
                let superseded_by = superseded_by.map(|epoch| integer(epoch.0)).transpose()?;
                Self::PutClaim { key, epoch: integer(epoch.0)?, state, superseded_by, row: text }
            }
            Op::DropClaim(key, epoch) => Self::DropClaim { key, epoch: integer(epoch.0)? },
            Op::PutTree(row) => {
                Self::PutTree { row: json("a tree", &row)?, epoch: integer(row.epoch.0)?, key: row.key }
            }
            Op::DropTree(key) => Self::DropTree { key },
            Op::PutTenant(tenant, metadata) => {
                Self::PutTenant { tenant: tenant.into(), metadata: json("metadata", &metadata)? }
            }
            Op::PutSecret(tenant, name, sealed) => Self::PutSecret { tenant: tenant.into(), name, sealed },
            Op::DropSecret(tenant, name) => Self::DropSecret { tenant: tenant.into(), name },
            Op::PutRevision(revision, json) => Self::PutRevision { revision: revision.0, json },
            Op::DropRevision(revision) => Self::DropRevision { revision: revision.0 },
            Op::BeginErasure(tenant) => Self::BeginErasure { tenant: tenant.into() },
            Op::EndErasure(tenant) => Self::EndErasure { tenant: tenant.into() },
            Op::PutFact(name, value) => Self::PutFact { name, value },
        })
    }

    /// Carries the write out, inside the caller's transaction.
    pub(super) fn apply(&self, connection: &Connection) -> Result<(), Failure> {
        match self {
            Self::PutSlot { slot, workload, phase, row } => {
                connection
                    .prepare_cached(
                        "INSERT INTO slots (slot, workload, phase, row) VALUES (?1, ?2, ?3, ?4)
                         ON CONFLICT DO UPDATE SET workload = ?2, phase = ?3, row = ?4",
                    )?
                    .execute(params![slot, workload, phase, row])?;
            }
            Self::DropSlot { slot } => {
                connection.prepare_cached("DELETE FROM slots WHERE slot = ?1")?.execute([slot])?;
            }
            Self::PutClaim { key, epoch, state, superseded_by, row } => {
                put_claim(connection, key, *epoch, *state, *superseded_by, row)?;
            }
            Self::DropClaim { key, epoch } => {
                connection
                    .prepare_cached("DELETE FROM claims WHERE tenant = ?1 AND workload = ?2 AND epoch = ?3")?
                    .execute(params![key.tenant.as_str(), key.workload.as_str(), epoch])?;
            }
            Self::PutTree { key, epoch, row } => put_tree(connection, key, *epoch, row)?,
            Self::DropTree { key } => drop_tree(connection, key)?,
            Self::PutTenant { tenant, metadata } => {
                connection
                    .prepare_cached(
                        "INSERT INTO tenants (tenant, metadata) VALUES (?1, ?2)
                         ON CONFLICT DO UPDATE SET metadata = ?2",
                    )?
                    .execute([tenant, metadata])?;
            }
            Self::PutSecret { tenant, name, sealed } => {
                connection
                    .prepare_cached(
                        "INSERT INTO secrets (tenant, name, sealed) VALUES (?1, ?2, ?3)
                         ON CONFLICT DO UPDATE SET sealed = ?3",
                    )?
                    .execute(params![tenant, name, sealed])?;
            }
            Self::DropSecret { tenant, name } => {
                connection
                    .prepare_cached("DELETE FROM secrets WHERE tenant = ?1 AND name = ?2")?
                    .execute([tenant, name])?;
            }
            Self::PutRevision { revision, json } => {
                connection
                    .prepare_cached(
                        "INSERT INTO revisions (revision, json) VALUES (?1, ?2)
                         ON CONFLICT DO UPDATE SET json = ?2",
                    )?
                    .execute([revision, json])?;
            }
            Self::DropRevision { revision } => {
                connection
                    .prepare_cached("DELETE FROM revisions WHERE revision = ?1")?
                    .execute([revision])?;
            }
            Self::BeginErasure { tenant } => {
                connection
                    .prepare_cached("INSERT INTO erasures (tenant) VALUES (?1) ON CONFLICT DO NOTHING")?
                    .execute([tenant])?;
            }
            Self::EndErasure { tenant } => {
                for table in ["claims", "trees", "tenants", "secrets", "erasures"] {
                    connection
                        .prepare_cached(&format!("DELETE FROM {table} WHERE tenant = ?1"))?
                        .execute([tenant])?;
                }
            }
            Self::PutFact { name, value } => {
                connection
                    .prepare_cached(
                        "INSERT INTO facts (name, value) VALUES (?1, ?2)
                         ON CONFLICT DO UPDATE SET value = ?2",
                    )?
                    .execute([*name, value])?;
            }
            #[cfg(test)]
            Self::Panic => panic!("on purpose"),
            #[cfg(test)]
            Self::Hold(until) => {
                let _ = until.lock().unwrap().recv();
            }
        }
        Ok(())
    }
}

/// Writes a claim's row; a clean one settles what came before it.
///
/// Without that the journal would grow with every claim ever made. A dirty claim
/// that a later one superseded has handed its tree on: once a claim from then on
/// is clean, its data is in the store.
fn put_claim(
    connection: &Connection,
    key: &Key,
    epoch: i64,
    state: ClaimState,
    superseded_by: Option<i64>,
    row: &str,
) -> Result<(), Failure> {
    let (tenant, workload) = (key.tenant.as_str(), key.workload.as_str());
    connection
        .prepare_cached(
            "INSERT INTO claims (tenant, workload, epoch, state, superseded_by, row)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (tenant, workload, epoch)
             DO UPDATE SET state = ?4, superseded_by = ?5, row = ?6",
        )?
        .execute(params![tenant, workload, epoch, state.as_str(), superseded_by, row])
        .map_err(|error| match &error {
            rusqlite::Error::SqliteFailure(failure, _)
                if failure.extended_code == ffi::SQLITE_CONSTRAINT_UNIQUE =>
            {
                Failure::Write(Error::AlreadyLive { key: key.clone() })
            }
            _ => Failure::Database(error),
        })?;
    if state == ClaimState::Clean {
        connection
            .prepare_cached(
                "DELETE FROM claims WHERE tenant = ?1 AND workload = ?2 AND epoch < ?3
                 AND (state = 'clean' OR (state = 'dirty' AND superseded_by <= ?3))",
            )?
            .execute(params![tenant, workload, epoch])?;
    }
    Ok(())
}

/// Writes a tree's row. The epoch of a key never goes back (P1).
fn put_tree(connection: &Connection, key: &Key, epoch: i64, row: &str) -> Result<(), Failure> {
    let changed = connection
        .prepare_cached(
            "INSERT INTO trees (tenant, workload, epoch, row) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO UPDATE SET epoch = ?3, row = ?4 WHERE epoch <= ?3",
        )?
        .execute(params![key.tenant.as_str(), key.workload.as_str(), epoch, row])?;
    if changed == 0 {
        return Err(Failure::Write(Error::Refused {
            what: format!("the tree of {key} at epoch {epoch}"),
            reason: "a later epoch was given out".to_owned(),
        }));
    }
    Ok(())
}

/// Forgets a key's tree and keeps its epoch.
fn drop_tree(connection: &Connection, key: &Key) -> Result<(), Failure> {
    connection
        .prepare_cached(
            "UPDATE trees SET row = json_set(row, '$.cached', json('false'), '$.saved', NULL, '$.owner', NULL)
             WHERE tenant = ?1 AND workload = ?2",
        )?
        .execute([key.tenant.as_str(), key.workload.as_str()])?;
    Ok(())
}

fn json<T: serde::Serialize>(what: &str, row: &T) -> Result<String, Error> {
    let refused = |reason: String| Error::Refused { what: what.to_owned(), reason };
    let text = serde_json::to_string(row).map_err(|error| refused(error.to_string()))?;
    if depth(&text) > DEPTH_MAX {
        return Err(refused(format!("it is nested deeper than {DEPTH_MAX} levels")));
    }
    Ok(text)
}

/// Returns how deep the arrays and objects of a sound JSON text are nested.
fn depth(json: &str) -> usize {
    let (mut now, mut most, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'{' | b'[' => {
                now += 1;
                most = most.max(now);
            }
            b'}' | b']' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

fn integer(epoch: u64) -> Result<i64, Error> {
    i64::try_from(epoch).map_err(|_| Error::Refused {
        what: format!("epoch {epoch}"),
        reason: format!("it is above {}", i64::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_levels_and_not_text() {
        for (json, expected) in [
            ("1", 0),
            ("{}", 1),
            (r#"{"a":[{}],"b":[]}"#, 3),
            (r#"["[[[","\"[[","\\"]"#, 1),
            (r#"{"\\":[1]}"#, 2),
        ] {
            assert_eq!(depth(json), expected, "{json}");
        }
    }
}
