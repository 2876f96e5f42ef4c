//! The one writer: groups of operations into transactions.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use rusqlite::{Connection, ErrorCode};
use tokio::sync::oneshot;

use super::{
    Durability, Op,
    database::Database,
    encode::{Failure, Write},
    error::Error,
};

/// Commits taken into one transaction.
const BATCH_COMMITS: usize = 256;

/// How long a failed attempt to open the file again answers for the next ones,
/// in milliseconds.
const REOPEN_MS: u64 = 100;

/// The operations of one commit.
pub(super) struct Group {
    pub(super) writes: Vec<Write>,
    pub(super) durability: Durability,
}

/// A group and who waits for it.
pub(super) struct Commit {
    pub(super) group: Group,
    pub(super) reply: oneshot::Sender<Result<(), Error>>,
}

/// Holds the writing connection.
pub(super) struct Writer {
    connection: Option<Connection>,
    /// What `PRAGMA synchronous` of `connection` is.
    synchronous: Durability,
    /// The last attempt to open the file again, if it failed.
    refused: Option<(Instant, Error)>,
    // Last, so that the lock is dropped after the connection is closed.
    database: Arc<Database>,
}

// === impl Group ===

impl Group {
    pub(super) fn new(ops: Vec<Op>, durability: Durability) -> Result<Self, Error> {
        let writes = ops.into_iter().map(Write::new).collect::<Result<_, _>>()?;
        Ok(Self { writes, durability })
    }
}

// === impl Writer ===

impl Writer {
    pub(super) fn new(database: Arc<Database>, connection: Connection) -> Self {
        Self { connection: Some(connection), synchronous: Durability::Hard, refused: None, database }
    }

    /// Commits what comes until every sender is gone and the queue is empty.
    ///
    /// There is no linger: under load the queue fills while a batch is synced,
    /// and without load waiting only costs (300–1,000 µs of it gained nothing).
    pub(super) fn run(mut self, commits: &mpsc::Receiver<Commit>) {
        let mut batch = Vec::with_capacity(BATCH_COMMITS);
        while let Ok(first) = commits.recv() {
            batch.push(first);
            batch.extend(commits.try_iter().take(BATCH_COMMITS - 1));
            let groups: Vec<&Group> = batch.iter().map(|commit| &commit.group).collect();
            let results = self.commit_caught(&groups);
            for (commit, result) in batch.drain(..).zip(results) {
                // Nobody waits when the caller was dropped.
                let _ = commit.reply.send(result);
            }
        }
    }

    /// As [`Writer::commit`]; a panic leaves the outcome of the whole batch
    /// unknown and costs the connection, not the writer.
    fn commit_caught(&mut self, groups: &[&Group]) -> Vec<Result<(), Error>> {
        catch_unwind(AssertUnwindSafe(|| self.commit(groups))).unwrap_or_else(|_| {
            tracing::error!(commits = groups.len(), "the journal's writer panicked");
            self.connection = None;
            vec![Err(Error::Unknown); groups.len()]
        })
    }

    /// Commits all groups in one transaction, and if that fails each in one of
    /// its own. Returns a result for each.
    pub(super) fn commit(&mut self, groups: &[&Group]) -> Vec<Result<(), Error>> {
        let hard = groups.iter().any(|group| group.durability == Durability::Hard);
        let durability = if hard { Durability::Hard } else { Durability::Soft };
        match self.transact(groups, durability) {
            Ok(()) => vec![Ok(()); groups.len()],
            Err(error) if groups.len() == 1 => vec![Err(error)],
            Err(_) => self.commit_each(groups, durability),
        }
    }

    /// Commits each group alone. When the file itself fails, those that come
    /// after are not tried: they get the same error.
    fn commit_each(&mut self, groups: &[&Group], durability: Durability) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(groups.len());
        for group in groups {
            let result = self.transact(&[*group], durability);
            let failed = if self.connection.is_none() { result.clone().err() } else { None };
            results.push(result);
            if let Some(error) = failed {
                results.resize(groups.len(), Err(error));
                break;
            }
        }
        results
    }

    fn transact(&mut self, groups: &[&Group], durability: Durability) -> Result<(), Error> {
        let connection = self.ready(durability)?;
        let failure = match attempt(connection, groups) {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        let rolled_back = connection.is_autocommit() || connection.execute_batch("ROLLBACK").is_ok();
        let (error, broken) = match failure {
            Failure::Write(error) => (error, false),
            Failure::Database(error) => classify(self.database.path(), &error),
        };
        if broken || !rolled_back {
            tracing::error!(%error, "the journal failed; it is opened again for the next commit");
            self.connection = None;
        }
        Err(error)
    }

    /// Returns a connection that commits with `durability`, opening one if need be.
    fn ready(&mut self, durability: Durability) -> Result<&Connection, Error> {
        if self.connection.is_none() {
            if let Some((at, error)) = &self.refused
                && at.elapsed() < Duration::from_millis(REOPEN_MS)
            {
                return Err(error.clone());
            }
            match self.database.reopen() {
                Ok(connection) => {
                    tracing::info!(path = %self.database.path().display(), "the journal works again");
                    self.refused = None;
                    self.synchronous = Durability::Hard;
                    self.connection = Some(connection);
                }
                Err(error) => {
                    self.refused = Some((Instant::now(), error.clone()));
                    return Err(error);
                }
            }
        }
        let connection = self.connection.as_ref().expect("it was opened above if there was none");
        if self.synchronous != durability {
            let level = if durability == Durability::Hard { 2 } else { 1 };
            connection
                .pragma_update(None, "synchronous", level)
                .map_err(|error| Error::database(self.database.path(), &error))?;
            self.synchronous = durability;
        }
        Ok(connection)
    }
}

/// Carries out all groups in one transaction; on failure it may be left open.
fn attempt(connection: &Connection, groups: &[&Group]) -> Result<(), Failure> {
    connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    for write in groups.iter().flat_map(|group| &group.writes) {
        write.apply(connection)?;
    }
    connection.prepare_cached("COMMIT")?.execute([])?;
    Ok(())
}

/// Says what a failed transaction means, and whether the connection is spent.
///
/// A full disk leaves the connection sound: the next commit simply tries again.
fn classify(path: &std::path::Path, error: &rusqlite::Error) -> (Error, bool) {
    let refused = || Error::Refused { what: "a commit".to_owned(), reason: error.to_string() };
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation | ErrorCode::TooBig | ErrorCode::TypeMismatch) => {
            (refused(), false)
        }
        Some(ErrorCode::DiskFull) => (Error::unavailable(path, "its disk is full"), false),
        Some(_) => (Error::database(path, error), true),
        None => (refused(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(durability: Durability) -> Group {
        Group::new(vec![Op::PutFact("last", "x".into())], durability).unwrap()
    }

    /// What survives a power loss is what was synced: FULL whenever one asks for it.
    #[test]
    fn one_hard_commit_makes_its_batch_hard_and_the_next_soft_one_is_soft_again() {
        let directory = tempfile::tempdir().unwrap();
        let (database, connection) = Database::open(&directory.path().join("journal.db")).unwrap();
        let mut writer = Writer::new(Arc::new(database), connection);
        let (soft, hard) = (group(Durability::Soft), group(Durability::Hard));
        for (batch, expected) in [
            (vec![&hard], 2),
            (vec![&soft, &soft], 1),
            (vec![&soft, &hard, &soft], 2),
            (vec![&hard], 2),
            (vec![&soft], 1),
        ] {
            assert!(writer.commit(&batch).into_iter().all(|result| result.is_ok()));
            let connection = writer.connection.as_ref().unwrap();
            let level: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
            assert_eq!(level, expected);
        }
    }
}
