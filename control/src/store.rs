//! Intent: the records that people ask for, kept durably.
//!
//! A store is a set of partitions; a partition is a small ordered map from key
//! to bytes with a revision of its own. A commit is atomic within one
//! partition and nothing wider, and the feed is ordered for each partition and
//! not over all: that is what Redis Cluster can hold (a partition's records,
//! feed and counter share a hash tag), so it is all that anyone may lean on.
//! What belongs to a function lives in the partition of that function.

pub mod contract;
pub mod embedded;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::model::FunctionId;

/// Functions are spread over this many partitions, for ever.
pub const FUNCTION_PARTITIONS: u16 = 64;

/// Where a record lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Partition {
    /// One of [`FUNCTION_PARTITIONS`].
    Functions(u16),
    Keys,
    Accounts,
}

impl Partition {
    /// The partition of a function: FNV-1a of its bytes, modulo 64. Never changes.
    #[must_use]
    pub fn of(function: FunctionId) -> Self {
        let hash = function
            .0
            .as_bytes()
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
                (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
            });
        Self::Functions((hash % u64::from(FUNCTION_PARTITIONS)) as u16)
    }

    /// All of them, in a fixed order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..FUNCTION_PARTITIONS)
            .map(Self::Functions)
            .chain([Self::Keys, Self::Accounts])
    }
}

/// A record and the revision (of its partition) that wrote it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub key: String,
    pub value: Bytes,
    pub revision: u64,
}

/// What must be so of a record for a change to go through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expect {
    Absent,
    Revision(u64),
    Anything,
}

/// One change of a commit. `value: None` deletes (deleting what is absent is no error under `Anything`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub key: String,
    pub expect: Expect,
    pub value: Option<Bytes>,
}

/// What a watcher hears: the changes of one commit, together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commit {
    pub partition: Partition,
    pub revision: u64,
    /// Key and new value; `None` where it was deleted.
    pub changes: Arc<[(String, Option<Bytes>)]>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another writer was first: read again and decide again.
    #[error("the record '{key}' was changed by someone else meanwhile")]
    Conflict { key: String },
    /// Nothing was written. The text says what to do (disk full, store unreachable).
    #[error("the control state can't be written: {0}")]
    Unavailable(String),
    /// The answer to a commit was lost. Only reading again tells whether it was written; to repeat it unread may
    /// be to meet one's own write as a conflict, or to undo what another wrote since.
    #[error("whether the change was written is not known: {0}")]
    Unknown(String),
    /// A value that no version of Weir wrote.
    #[error("the control state is damaged: {0}")]
    Damaged(String),
}

/// A moment of a partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Position {
    /// The life of the partition in which the revision counts. It is another one wherever acknowledged commits may
    /// be lost (data deleted, put back from a backup, a replica that lagged took over), because the revisions that
    /// follow are given a second time and say other things.
    pub incarnation: u64,
    pub revision: u64,
}

/// How far a watcher has got in each partition, opaque to callers: positions come from [`Store::list`]. A partition
/// that is not named is told from its beginning.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cursor(pub std::collections::BTreeMap<Partition, Position>);

/// What a watch yields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Commit(Commit),
    /// The feed no longer reaches back to the cursor, or goes on from another past: list all again, then watch anew.
    FellBehind,
}

/// A running watch. Dropping it ends it.
#[async_trait]
pub trait Watch: Send {
    /// The next event; after [`Event::FellBehind`] or an error the watch is over.
    async fn next(&mut self) -> Result<Event, StoreError>;
}

/// Durable intent. A call that returned `Ok` survives a `kill -9` and a power cut.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    async fn get(&self, partition: Partition, key: &str) -> Result<Option<Record>, StoreError>;
    /// The records whose key starts with `prefix`, in key order, and the partition's position they show.
    async fn list(
        &self,
        partition: Partition,
        prefix: &str,
    ) -> Result<(Vec<Record>, Position), StoreError>;
    /// All changes or none; answers the partition's new revision after it is durable. An implementation that tries
    /// again by itself has to know its own write when it meets it: that is no conflict.
    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<u64, StoreError>;
    /// Everything committed after `cursor`, each partition in order, none left out and none twice.
    async fn watch(&self, cursor: Cursor) -> Result<Box<dyn Watch>, StoreError>;
}
