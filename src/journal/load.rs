//! Reading the journal.

use std::path::Path;

use rusqlite::{Connection, Row};
use serde::de::DeserializeOwned;

use super::{Loaded, error::Error};
use crate::model::{Revision, TenantId};

/// Why a row could not be read.
#[derive(Debug)]
pub(super) enum Failure {
    Database(rusqlite::Error),
    /// A row is not what this version writes.
    Row {
        table: &'static str,
        row: String,
        reason: String,
    },
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// Claims that are not over: all but clean ones, and but dirty ones whose data a
/// later clean one has saved. Of clean ones the newest of each key.
const CLAIMS: &str = "
    SELECT tenant || '/' || workload || ' epoch ' || epoch, row FROM claims AS this
    WHERE CASE state
        WHEN 'clean' THEN NOT EXISTS (
            SELECT 1 FROM claims AS later
            WHERE later.tenant = this.tenant AND later.workload = this.workload
              AND later.epoch > this.epoch AND later.state = 'clean')
        WHEN 'dirty' THEN superseded_by IS NULL OR NOT EXISTS (
            SELECT 1 FROM claims AS later
            WHERE later.tenant = this.tenant AND later.workload = this.workload
              AND later.epoch >= this.superseded_by AND later.state = 'clean')
        ELSE TRUE
    END
    ORDER BY tenant, workload, epoch";

/// Reads everything; each list is ordered by its key.
pub(super) fn load(connection: &Connection) -> Result<Loaded, Failure> {
    let mut loaded = Loaded {
        slots: rows(connection, "slots", "SELECT slot, row FROM slots ORDER BY slot")?,
        claims: rows(connection, "claims", CLAIMS)?,
        trees: rows(
            connection,
            "trees",
            "SELECT tenant || '/' || workload, row FROM trees ORDER BY tenant, workload",
        )?,
        ..Loaded::default()
    };
    for (tenant, metadata) in pairs(connection, "SELECT tenant, metadata FROM tenants ORDER BY tenant")? {
        let metadata = parsed("tenants", &tenant, &metadata)?;
        loaded.tenants.push((tenant_id("tenants", tenant)?, metadata));
    }
    let mut statement = connection.prepare("SELECT DISTINCT tenant FROM secrets ORDER BY tenant")?;
    for tenant in statement.query_map([], |row| row.get(0))? {
        loaded.with_secrets.push(tenant_id("secrets", tenant?)?);
    }
    let mut statement = connection.prepare("SELECT tenant FROM erasures ORDER BY tenant")?;
    for tenant in statement.query_map([], |row| row.get(0))? {
        loaded.erasures.push(tenant_id("erasures", tenant?)?);
    }
    let revisions = pairs(connection, "SELECT revision, json FROM revisions ORDER BY revision")?;
    loaded.revisions = revisions.into_iter().map(|(revision, json)| (Revision(revision), json)).collect();
    loaded.facts = pairs(connection, "SELECT name, value FROM facts")?.into_iter().collect();
    Ok(loaded)
}

/// Reads the sealed secrets of a tenant, ordered by name.
pub(super) fn secrets(
    connection: &Connection,
    tenant: &TenantId,
) -> Result<Vec<(String, Vec<u8>)>, rusqlite::Error> {
    let mut statement =
        connection.prepare_cached("SELECT name, sealed FROM secrets WHERE tenant = ?1 ORDER BY name")?;
    statement.query_map([tenant.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// Says what a failure means to whoever opens the journal at `path`.
pub(super) fn error(path: &Path, failure: Failure) -> Error {
    match failure {
        Failure::Database(error) => Error::database(path, &error),
        Failure::Row { table, row, reason } => {
            Error::corrupt(path, format!("table {table}, row {row}: {reason}"))
        }
    }
}

fn rows<T: DeserializeOwned>(
    connection: &Connection,
    table: &'static str,
    sql: &str,
) -> Result<Vec<T>, Failure> {
    let mut statement = connection.prepare(sql)?;
    let mut found = Vec::new();
    let mut cursor = statement.query([])?;
    while let Some(row) = cursor.next()? {
        let name: String = row.get(0)?;
        found.push(parsed(table, &name, row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?)?);
    }
    Ok(found)
}

fn pairs(connection: &Connection, sql: &str) -> Result<Vec<(String, String)>, rusqlite::Error> {
    let pair = |row: &Row<'_>| Ok((row.get(0)?, row.get(1)?));
    connection.prepare(sql)?.query_map([], pair)?.collect()
}

fn parsed<T: DeserializeOwned>(table: &'static str, row: &str, json: &str) -> Result<T, Failure> {
    serde_json::from_str(json).map_err(|error| Failure::Row {
        table,
        row: row.to_owned(),
        reason: error.to_string(),
    })
}

fn tenant_id(table: &'static str, tenant: String) -> Result<TenantId, Failure> {
    TenantId::new(tenant.clone()).map_err(|error| Failure::Row {
        table,
        row: tenant,
        reason: error.to_string(),
    })
}
