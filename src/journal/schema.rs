//! The tables, and how an older journal is brought up to this version.
//!
//! The version is SQLite's `user_version`: the number of migrations that were
//! carried out. Columns are what is queried; everything of a row, those columns
//! included, is in its `row` as JSON.

use rusqlite::{Connection, TransactionBehavior};

/// Marks the file as ours (`Boil`), beside `user_version`.
const APPLICATION_ID: u32 = 0x426f_696c;

/// One step from a version to the next, carried out in one transaction. A step
/// that was released is never edited: a test holds its digest.
pub(super) struct Migration {
    /// What it does, for the log.
    pub(super) what: &'static str,
    /// How.
    pub(super) sql: &'static str,
}

/// All steps; step `n` makes version `n + 1`.
pub(super) const MIGRATIONS: &[Migration] = &[
    Migration {
        what: "create the tables",
        sql: "
        CREATE TABLE slots (
            slot TEXT PRIMARY KEY NOT NULL,
            workload TEXT NOT NULL,
            phase TEXT NOT NULL,
            row TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE claims (
            tenant TEXT NOT NULL,
            workload TEXT NOT NULL,
            epoch INTEGER NOT NULL,
            state TEXT NOT NULL,
            superseded_by INTEGER,
            row TEXT NOT NULL,
            PRIMARY KEY (tenant, workload, epoch)
        ) STRICT, WITHOUT ROWID;

        -- P1: two live claims of one key cannot be stored.
        CREATE UNIQUE INDEX claims_live ON claims (tenant, workload)
            WHERE state IN ('claiming', 'active', 'releasing');

        CREATE TABLE trees (
            tenant TEXT NOT NULL,
            workload TEXT NOT NULL,
            epoch INTEGER NOT NULL,
            row TEXT NOT NULL,
            PRIMARY KEY (tenant, workload)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE tenants (
            tenant TEXT PRIMARY KEY NOT NULL,
            metadata TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE secrets (
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            sealed BLOB NOT NULL,
            PRIMARY KEY (tenant, name)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE revisions (
            revision TEXT PRIMARY KEY NOT NULL,
            json TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE facts (
            name TEXT PRIMARY KEY NOT NULL,
            value TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;
    ",
    },
    Migration {
        what: "note erasures",
        sql: "
        CREATE TABLE erasures (
            tenant TEXT PRIMARY KEY NOT NULL
        ) STRICT, WITHOUT ROWID;
    ",
    },
    Migration {
        what: "note under which ownership of the store a claim began and a key was opened",
        sql: "
        UPDATE claims SET row = json_set(row, '$.term', NULL, '$.opened', json('false'), '$.close', json('false'));
        UPDATE trees SET row = json_set(row, '$.opened', NULL);
    ",
    },
];

/// What stands in the way of a migration.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// The journal has a version above the last migration.
    Newer { found: u32, known: u32 },
    /// The file is a database of somebody else's.
    Foreign,
    /// The database failed; nothing of the failed step remains.
    Database(rusqlite::Error),
}

impl From<rusqlite::Error> for Obstacle {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// Returns the database's version if `migrations` can bring it further; changes nothing.
pub(super) fn examine(connection: &Connection, migrations: &[Migration]) -> Result<u32, Obstacle> {
    let known = u32::try_from(migrations.len()).unwrap_or(u32::MAX);
    let found = version(connection)?;
    let application: u32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let objects: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let blank = found == 0 && application == 0 && objects == 0;
    if !blank && application != APPLICATION_ID {
        return Err(Obstacle::Foreign);
    }
    if found > known { Err(Obstacle::Newer { found, known }) } else { Ok(found) }
}

/// Carries out the `migrations` that the database has not had.
pub(super) fn migrate(connection: &mut Connection, migrations: &[Migration]) -> Result<(), Obstacle> {
    let found = examine(connection, migrations)?;
    for (at, migration) in (0_u32..).zip(migrations).skip(found as usize) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
        transaction.execute_batch(migration.sql)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", at + 1)?;
        transaction.commit()?;
        tracing::info!(version = at + 1, what = migration.what, "journal migrated");
    }
    Ok(())
}

/// Returns the number of migrations the database has had.
pub(super) fn version(connection: &Connection) -> Result<u32, rusqlite::Error> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: Migration = Migration {
        what: "add a column",
        sql: "ALTER TABLE facts ADD COLUMN noted_ms INTEGER NOT NULL DEFAULT 7;",
    };

    fn version_1() -> Connection {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, &MIGRATIONS[..1]).unwrap();
        connection.execute("INSERT INTO facts VALUES ('boot_id', 'x')", []).unwrap();
        connection
    }

    fn steps(next: Migration) -> Vec<Migration> {
        vec![Migration { what: MIGRATIONS[0].what, sql: MIGRATIONS[0].sql }, next]
    }

    /// A journal out there was made by this very text.
    #[test]
    fn a_released_step_is_never_edited() {
        let released = ["1ff54ac3bc3601bc", "a1b7bed5e6d4b5e5", "e67d5d15c8a4fb4f"];
        let now: Vec<String> = MIGRATIONS
            .iter()
            .map(|step| blake3::hash(step.sql.as_bytes()).to_hex()[..16].to_owned())
            .collect();
        assert_eq!(now, released, "add a step instead");
    }

    #[test]
    fn an_older_journal_gets_the_steps_it_lacks_and_keeps_its_rows() {
        let mut connection = version_1();
        migrate(&mut connection, &steps(NEXT)).unwrap();
        assert_eq!(version(&connection).unwrap(), 2);
        let row: (String, i64) = connection
            .query_row("SELECT value, noted_ms FROM facts WHERE name = 'boot_id'", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(row, ("x".to_owned(), 7));
        migrate(&mut connection, &steps(NEXT)).unwrap();
    }

    #[test]
    fn rows_of_before_terms_say_that_nothing_was_opened() {
        let mut connection = version_1();
        connection
            .execute_batch(
                "INSERT INTO claims VALUES ('t', 'w', 1, 'active', NULL, '{\"epoch\":1}');
                 INSERT INTO trees VALUES ('t', 'w', 1, '{\"cached\":true}');",
            )
            .unwrap();
        migrate(&mut connection, MIGRATIONS).unwrap();
        let row = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, String>(0)).unwrap();
        let claim = r#"{"epoch":1,"term":null,"opened":false,"close":false}"#;
        assert_eq!(row("SELECT row FROM claims"), claim);
        assert_eq!(row("SELECT row FROM trees"), r#"{"cached":true,"opened":null}"#);
    }

    #[test]
    fn a_step_that_fails_leaves_the_older_version_whole() {
        let mut connection = version_1();
        let broken =
            Migration { what: "break", sql: "DELETE FROM facts; ALTER TABLE nothing ADD COLUMN x TEXT;" };
        assert!(matches!(migrate(&mut connection, &steps(broken)), Err(Obstacle::Database(_))));
        assert_eq!(version(&connection).unwrap(), 1);
        let rows: i64 = connection.query_row("SELECT count(*) FROM facts", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 1);
        migrate(&mut connection, &steps(NEXT)).unwrap();
    }

    #[test]
    fn a_newer_journal_and_a_foreign_database_are_refused() {
        let mut newer = version_1();
        migrate(&mut newer, &steps(NEXT)).unwrap();
        let refused = migrate(&mut newer, &MIGRATIONS[..1]);
        assert!(matches!(refused, Err(Obstacle::Newer { found: 2, known: 1 })), "{refused:?}");

        for sql in ["CREATE TABLE theirs (x)", "PRAGMA user_version = 1", "PRAGMA application_id = 5"] {
            let mut foreign = Connection::open_in_memory().unwrap();
            foreign.execute_batch(sql).unwrap();
            let refused = migrate(&mut foreign, MIGRATIONS);
            assert!(matches!(refused, Err(Obstacle::Foreign)), "{sql}: {refused:?}");
        }
    }
}
