//! Intent in one file, by redb.
//!
//! One thread writes: it takes whatever commits are waiting, checks and applies
//! them in order within one transaction, and answers all of them after one
//! fsync. Readers see only what is durable.
//!
//! The feed is a table of its own, written in the same transaction as the
//! records. Watchers read it to catch up; after that the writer hands them each
//! commit, and a watcher that is too slow for that goes back to the table.
//! Revisions of a partition have no holes, so a watcher knows what it missed.
//!
//! After an I/O error redb refuses everything until the file is opened anew.
//! The writer does that, and looks whether its last transaction landed before
//! it says that nothing was written.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use async_trait::async_trait;
use bytes::Bytes;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase, ReadableTable,
    TableDefinition, TableError,
};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    Change, Commit, Cursor, Event, Expect, Partition, Position, Record, Store, StoreError, Watch,
};
use crate::private;

/// What this version writes. It grows when an older version could not read the file.
const FORMAT: u64 = 1;

/// The partition and the key, to the revision and the value.
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
/// The partition and the revision, to the changes.
const FEED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("feed");
/// The partition, to its [`Head`].
const HEADS: TableDefinition<'_, u16, &[u8]> = TableDefinition::new("heads");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const META_FORMAT: &str = "format";
/// Counts the transactions, to tell after an I/O error whether the last one landed.
const META_BATCH: &str = "batch";
/// A random number, made with the file: its revisions are not those of a file before it.
const META_INCARNATION: &str = "incarnation";

/// How many commits of a partition the feed keeps, if they fit into [`FEED_BYTES`].
const FEED_COMMITS: u64 = 4096;
/// How many bytes of a partition the feed keeps. The last commit is always kept.
const FEED_BYTES: u64 = 8 << 20;
/// How much one transaction takes in.
const BATCH_COMMITS: usize = 1024;
const BATCH_BYTES: usize = 16 << 20;
/// What one commit may hold.
const COMMIT_BYTES: usize = 64 << 20;
const CACHE_BYTES: usize = 64 << 20;
/// How many commits wait for a watcher before it has to go back to the feed.
const LIVE_COMMITS: usize = 512;
/// Larger commits are read from the feed, so that slow watchers can't fill the memory.
const LIVE_BYTES: usize = 32 << 10;
/// How much a watcher reads from the feed at a time.
const PAGE_COMMITS: usize = 256;
const PAGE_BYTES: usize = 1 << 20;

type Opener = Box<dyn Fn(&Builder, &Path) -> Result<Database, DatabaseError> + Send + Sync>;

/// Intent in one file. Dropping the last reference waits for the running transaction.
pub struct Embedded {
    shared: Arc<Shared>,
    live: broadcast::Sender<Notice>,
    /// Both are there until the drop.
    work: Option<mpsc::Sender<Work>>,
    writer: Option<JoinHandle<()>>,
    /// Held as long as this lives, also while redb's file is opened anew.
    _lock: Lock,
}

impl Embedded {
    /// Opens the file at `path`, creating it and its directory if needed.
    ///
    /// # Errors
    /// When another process has it open, when a newer version of Weir wrote
    /// it, when it is damaged, and when the disk can't be read or written.
    pub fn open(path: &Path) -> Result<Arc<Self>, StoreError> {
        Self::open_by(path, Box::new(|redb, path| redb.create(path)))
    }

    fn open_by(path: &Path, opener: Opener) -> Result<Arc<Self>, StoreError> {
        let lock = lock(path)?;
        let shared = Arc::new(Shared {
            path: path.to_path_buf(),
            opener,
            held: RwLock::default(),
        });
        let (live, _) = broadcast::channel(LIVE_COMMITS);
        let mut writer = Writer {
            shared: Arc::clone(&shared),
            live: live.clone(),
            batch: 0,
            incarnation: 0,
            announced: BTreeMap::new(),
        };
        shared.create_if_missing()?;
        writer.reopen()?;
        let (work, incoming) = mpsc::channel(BATCH_COMMITS);
        let writer = std::thread::Builder::new()
            .name("weir-store".into())
            .spawn(move || writer.run(incoming))
            .map_err(|e| StoreError::Unavailable(format!("can't start a thread: {e}")))?;
        Ok(Arc::new(Self {
            shared,
            live,
            work: Some(work),
            writer: Some(writer),
            _lock: lock,
        }))
    }

    async fn ask<T>(&self, work: Work, answer: oneshot::Receiver<T>) -> Result<T, StoreError> {
        let stopped = "the thread that writes it has stopped: start weir again and report its log";
        // A commit that the thread had begun with may be there.
        let unanswered = match &work {
            Work::Commit(_) => StoreError::Unknown,
            Work::Reopen { .. } => StoreError::Unavailable,
        };
        let refused = |_| StoreError::Unavailable(stopped.into());
        let queue = self.work.as_ref().ok_or(()).map_err(refused)?;
        queue.send(work).await.map_err(|_| refused(()))?;
        answer.await.map_err(|_| unanswered(stopped.into()))
    }

    /// Reads; where an earlier I/O error is in the way, opens the file anew and reads again.
    async fn read<T, F>(&self, inline: bool, f: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&ReadTransaction) -> Result<T, Trouble> + Clone + Send + 'static,
    {
        let once = async |f: F| {
            if inline {
                return self.shared.read(f);
            }
            let shared = Arc::clone(&self.shared);
            match tokio::task::spawn_blocking(move || shared.read(f)).await {
                Ok(outcome) => outcome,
                Err(e) => Err((Trouble::Other(e.to_string()), 0)),
            }
        };
        match once(f.clone()).await {
            Ok(found) => Ok(found),
            Err((trouble, generation)) if trouble.needs_reopening() => {
                let (answer, answered) = oneshot::channel();
                self.ask(Work::Reopen { generation, answer }, answered)
                    .await??;
                once(f)
                    .await
                    .map_err(|(trouble, _)| self.shared.explain(&trouble))
            }
            Err((trouble, _)) => Err(self.shared.explain(&trouble)),
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.work = None;
        if let Some(writer) = self.writer.take() {
            // A panic of the writer has been logged, and there's nobody to tell.
            let _ = writer.join();
        }
        // Watches may outlive this: the file is closed under them.
        self.shared.close();
    }
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, partition: Partition, key: &str) -> Result<Option<Record>, StoreError> {
        let wanted = record_key(partition, key);
        let key = key.to_owned();
        self.read(true, move |tx| {
            let records = tx.open_table(RECORDS)?;
            match records.get(wanted.as_slice())? {
                Some(stored) => Ok(Some(decode_record(key.clone(), stored.value())?)),
                None => Ok(None),
            }
        })
        .await
    }

    async fn list(
        &self,
        partition: Partition,
        prefix: &str,
    ) -> Result<(Vec<Record>, Position), StoreError> {
        let start = record_key(partition, prefix);
        self.read(false, move |tx| {
            let position = Position {
                incarnation: incarnation(tx)?,
                revision: head(&tx.open_table(HEADS)?, partition)?.revision,
            };
            let records = tx.open_table(RECORDS)?;
            let mut found = Vec::new();
            for entry in records.range(start.as_slice()..)? {
                let (key, stored) = entry?;
                if !key.value().starts_with(&start) {
                    break;
                }
                let key = std::str::from_utf8(&key.value()[2..])
                    .map_err(|_| Trouble::Damaged("a key is not UTF-8".into()))?;
                found.push(decode_record(key.to_owned(), stored.value())?);
            }
            Ok((found, position))
        })
        .await
    }

    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<u64, StoreError> {
        let size = size_of_changes(&changes);
        if size > COMMIT_BYTES {
            return Err(StoreError::Unavailable(format!(
                "a change of {size} bytes is larger than the {COMMIT_BYTES} that are allowed"
            )));
        }
        let (answer, answered) = oneshot::channel();
        let job = Job {
            partition,
            changes,
            size,
            answer,
        };
        self.ask(Work::Commit(job), answered).await?
    }

    async fn watch(&self, cursor: Cursor) -> Result<Box<dyn Watch>, StoreError> {
        // Listening comes first, so that nothing falls between the feed and the live commits.
        let live = self.live.subscribe();
        let incarnation = self.read(true, incarnation).await?;
        let over = cursor.0.values().any(|at| at.incarnation != incarnation);
        let cursor = cursor.0.into_iter();
        Ok(Box::new(Following {
            shared: Arc::clone(&self.shared),
            live,
            behind: Partition::all().collect(),
            incarnation,
            cursor: cursor
                .map(|(partition, at)| (partition, at.revision))
                .collect(),
            ready: VecDeque::new(),
            over,
        }))
    }
}

/// What the writer is asked to do.
enum Work {
    Commit(Job),
    /// Opens the file anew, unless that has been done since `generation`.
    Reopen {
        generation: u64,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
}

struct Job {
    partition: Partition,
    changes: Vec<Change>,
    size: usize,
    /// Nobody may be listening any more; the commit is carried out all the same.
    answer: oneshot::Sender<Result<u64, StoreError>>,
}

/// Keys and their new values, as in [`Commit`].
type Changes = Arc<[(String, Option<Bytes>)]>;

/// A durable commit, for the watchers.
#[derive(Clone)]
struct Notice {
    incarnation: u64,
    partition: Partition,
    revision: u64,
    /// Small ones come along, the others are in the feed.
    changes: Option<Changes>,
}

/// How far a partition has got, and what its feed holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Head {
    revision: u64,
    /// The oldest revision in the feed; `revision + 1` if it is empty.
    oldest: u64,
    feed_bytes: u64,
}

/// Why something did not work, in redb's words or ours.
#[derive(Debug)]
enum Trouble {
    Redb(redb::Error),
    /// The file is not open: opening it anew failed, or the store was dropped.
    Closed,
    Damaged(String),
    Other(String),
}

impl<E: Into<redb::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

impl Trouble {
    /// Whether redb refuses to go on with the file as it is open now.
    fn needs_reopening(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Redb(e) => matches!(
                e,
                redb::Error::Io(_)
                    | redb::Error::Backend(_)
                    | redb::Error::PreviousIo
                    | redb::Error::DatabaseClosed
                    | redb::Error::LockPoisoned(_)
            ),
            Self::Damaged(_) | Self::Other(_) => false,
        }
    }

    /// Whether it is the consequence of an earlier failure, so that trying again may do.
    fn is_earlier(&self) -> bool {
        matches!(
            self,
            Self::Closed | Self::Redb(redb::Error::PreviousIo | redb::Error::DatabaseClosed)
        )
    }
}

/// The open file.
#[derive(Default)]
struct Held {
    database: Option<Database>,
    /// Counts how often the file was opened.
    generation: u64,
}

/// What a file says of itself when it is opened.
struct Found {
    incarnation: u64,
    /// The number of the last transaction.
    batch: u64,
    heads: BTreeMap<Partition, Head>,
}

struct Shared {
    path: PathBuf,
    opener: Opener,
    held: RwLock<Held>,
}

impl Shared {
    /// Reads in one transaction. With an error comes the generation it happened in.
    fn read<T>(
        &self,
        f: impl FnOnce(&ReadTransaction) -> Result<T, Trouble>,
    ) -> Result<T, (Trouble, u64)> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = &held.database else {
            return Err((Trouble::Closed, held.generation));
        };
        database
            .begin_read()
            .map_err(Trouble::from)
            .and_then(|tx| f(&tx))
            .map_err(|trouble| (trouble, held.generation))
    }

    fn close(&self) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.database = None;
    }

    /// Opens the file anew.
    fn reopen(&self) -> Result<Found, StoreError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        // redb lets go of the file before it is opened again.
        held.database = None;
        held.generation += 1;
        let (database, found) = self.open_file(&self.path)?;
        held.database = Some(database);
        Ok(found)
    }

    fn open_file(&self, path: &Path) -> Result<(Database, Found), StoreError> {
        let mut redb = Builder::new();
        redb.set_cache_size(CACHE_BYTES);
        let database = (self.opener)(&redb, path).map_err(|e| self.explain_opening(e))?;
        let found = check_format(&database).map_err(|trouble| self.explain(&trouble))?;
        Ok((database, found))
    }

    /// Makes the file under another name first: one that is cut short while it is made
    /// would not open again.
    fn create_if_missing(&self) -> Result<(), StoreError> {
        let explain = |e: io::Error| self.explain_io(&e);
        match fs::metadata(&self.path) {
            Ok(found) if found.len() > 0 => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(explain(e)),
        }
        let unfinished = with_suffix(&self.path, ".new");
        private::file(&unfinished)
            .and_then(|file| file.set_len(0))
            .map_err(explain)?;
        let (database, _) = self.open_file(&unfinished)?;
        database.close().map_err(|e| self.explain_opening(e))?;
        fs::rename(&unfinished, &self.path).map_err(explain)?;
        // The name has to survive a power cut too.
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(explain)
    }

    /// The commits of a partition after `after`, as many as make a page; `None` if the
    /// feed does not reach back to it. The flag says that there are no more.
    fn page(
        &self,
        life: u64,
        partition: Partition,
        after: u64,
    ) -> Result<Option<(Vec<Commit>, bool)>, StoreError> {
        self.read(|tx| {
            if incarnation(tx)? != life {
                return Ok(None);
            }
            let head = head(&tx.open_table(HEADS)?, partition)?;
            if after == head.revision {
                return Ok(Some((Vec::new(), true)));
            }
            if after > head.revision || after + 1 < head.oldest {
                return Ok(None);
            }
            let feed = tx.open_table(FEED)?;
            let (from, to) = (
                feed_key(partition, after + 1),
                feed_key(partition, head.revision),
            );
            let (mut commits, mut bytes) = (Vec::new(), 0);
            for (revision, entry) in (after + 1..).zip(feed.range(from.as_slice()..=to.as_slice())?)
            {
                let (key, stored) = entry?;
                if key.value() != feed_key(partition, revision) {
                    return Err(Trouble::Damaged(format!(
                        "the feed lacks {partition:?} {revision}"
                    )));
                }
                bytes += stored.value().len();
                commits.push(Commit {
                    partition,
                    revision,
                    changes: decode_changes(stored.value())?,
                });
                if commits.len() >= PAGE_COMMITS || bytes >= PAGE_BYTES {
                    break;
                }
            }
            let reached = commits.last().map_or(after, |c| c.revision);
            if commits.is_empty() {
                return Err(Trouble::Damaged(format!(
                    "the feed lacks {partition:?} {}",
                    after + 1
                )));
            }
            Ok(Some((commits, reached == head.revision)))
        })
        .map_err(|(trouble, _)| self.explain(&trouble))
    }

    fn explain(&self, trouble: &Trouble) -> StoreError {
        let path = self.path.display();
        match trouble {
            Trouble::Damaged(what) => StoreError::Damaged(format!("{path}: {what}")),
            Trouble::Other(what) => StoreError::Unavailable(what.clone()),
            Trouble::Closed => StoreError::Unavailable(format!("{path} is closed")),
            Trouble::Redb(redb::Error::Io(e)) => self.explain_io(e),
            Trouble::Redb(redb::Error::Backend(e)) => match e.downcast_ref::<io::Error>() {
                Some(e) => self.explain_io(e),
                None => StoreError::Unavailable(format!("{path}: {e}")),
            },
            Trouble::Redb(redb::Error::Corrupted(what)) => StoreError::Damaged(format!(
                "{path}: {what}; check the disk and put back a backup"
            )),
            Trouble::Redb(e) => StoreError::Unavailable(format!("{path}: {e}")),
        }
    }

    fn explain_io(&self, error: &io::Error) -> StoreError {
        let path = self.path.display();
        StoreError::Unavailable(match error.kind() {
            io::ErrorKind::StorageFull => {
                format!("the disk that holds {path} is full: free some space and try again")
            }
            io::ErrorKind::QuotaExceeded => format!(
                "the disk quota for {path} is used up: free some space or raise it, and try again"
            ),
            io::ErrorKind::PermissionDenied => {
                format!("{path} may not be read and written: let the user that runs weir do so")
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                format!("{path} is on a file system that is mounted read-only: mount it writable")
            }
            io::ErrorKind::FileTooLarge => {
                format!("{path} may not grow further: raise the limit for file sizes (ulimit -f)")
            }
            _ => format!("reading or writing {path} failed: {error}; check the disk"),
        })
    }

    fn explain_opening(&self, error: DatabaseError) -> StoreError {
        let path = self.path.display();
        match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                in_use(&self.path)
            }
            DatabaseError::UpgradeRequired(_) => StoreError::Damaged(format!(
                "{path} has a file format that is too old for this version of weir"
            )),
            DatabaseError::Storage(redb::StorageError::Io(e))
                if e.kind() == io::ErrorKind::InvalidData =>
            {
                StoreError::Damaged(format!(
                    "{path} is not a file of weir's ({e}): put back a backup, or give weir another data directory"
                ))
            }
            other => self.explain(&Trouble::from(other)),
        }
    }
}

fn in_use(path: &Path) -> StoreError {
    StoreError::Unavailable(format!(
        "another weir uses the data directory {}: stop it, or give this one a directory of its own",
        directory(path).display()
    ))
}

/// What became of a batch: for each job its revision or its conflict, and what to announce.
struct Outcome {
    answers: Vec<Result<u64, StoreError>>,
    notices: Vec<Notice>,
}

/// What was in the way, and what the batch would have come to if it was its commit that failed.
struct Failure {
    trouble: Trouble,
    prepared: Option<Outcome>,
}

impl Failure {
    fn new(trouble: impl Into<Trouble>, prepared: Option<Outcome>) -> Box<Self> {
        let trouble = trouble.into();
        Box::new(Self { trouble, prepared })
    }
}

struct Writer {
    shared: Arc<Shared>,
    live: broadcast::Sender<Notice>,
    /// The number of the last transaction that is durable.
    batch: u64,
    /// The file's, which is another one where somebody removed it while it was open.
    incarnation: u64,
    /// What the watchers have been told.
    announced: BTreeMap<Partition, u64>,
}

impl Writer {
    fn run(mut self, mut incoming: mpsc::Receiver<Work>) {
        while let Some(first) = incoming.blocking_recv() {
            let (mut jobs, mut size, mut next) = (Vec::new(), 0, Some(first));
            while let Some(work) = next.take() {
                match work {
                    Work::Commit(job) => {
                        size += job.size;
                        jobs.push(job);
                    }
                    Work::Reopen { generation, answer } => {
                        // Whoever asked may have gone; that's no reason to leave the file closed.
                        let _ = answer.send(self.reopen_since(generation));
                    }
                }
                if jobs.len() < BATCH_COMMITS && size < BATCH_BYTES {
                    next = incoming.try_recv().ok();
                }
            }
            if !jobs.is_empty() {
                self.carry_out(jobs);
            }
        }
    }

    fn reopen_since(&mut self, generation: u64) -> Result<(), StoreError> {
        let now = {
            let held = self
                .shared
                .held
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            held.generation
        };
        if now == generation {
            self.reopen()?;
        }
        Ok(())
    }

    /// Opens the file anew and tells the watchers what they have not heard of yet.
    fn reopen(&mut self) -> Result<(), StoreError> {
        let found = self.shared.reopen()?;
        let another = std::mem::replace(&mut self.incarnation, found.incarnation);
        let another = another != found.incarnation;
        self.batch = found.batch;
        for (partition, head) in found.heads {
            let announced = self.announced.insert(partition, head.revision).unwrap_or(0);
            if another || head.revision > announced {
                self.announce(Notice {
                    incarnation: self.incarnation,
                    partition,
                    revision: head.revision,
                    changes: None,
                });
            }
        }
        Ok(())
    }

    fn announce(&mut self, notice: Notice) {
        self.announced.insert(notice.partition, notice.revision);
        // It's an error when nobody watches.
        let _ = self.live.send(notice);
    }

    fn carry_out(&mut self, jobs: Vec<Job>) {
        let outcome = match self.write(&jobs) {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::error!(%error, commits = jobs.len(), "commits failed");
                for job in jobs {
                    let _ = job.answer.send(Err(again(&error)));
                }
                return;
            }
        };
        for notice in outcome.notices {
            self.announce(notice);
        }
        for (job, answer) in jobs.into_iter().zip(outcome.answers) {
            let _ = job.answer.send(answer);
        }
    }

    /// Applies the jobs durably. After an error nothing of them is there, unless it says that
    /// this is not known.
    fn write(&mut self, jobs: &[Job]) -> Result<Outcome, StoreError> {
        for last_try in [false, true] {
            let attempted = self.batch + 1;
            let Failure { trouble, prepared } = match self.attempt(jobs, attempted) {
                Ok(outcome) => {
                    self.batch = attempted;
                    return Ok(outcome);
                }
                Err(failure) => *failure,
            };
            if !trouble.needs_reopening() {
                return Err(self.shared.explain(&trouble));
            }
            if let Err(error) = self.reopen() {
                return Err(if prepared.is_some() {
                    not_known(error)
                } else {
                    error
                });
            }
            if let Some(mut outcome) = prepared
                && self.batch == attempted
            {
                // It landed, but the fsync that would vouch for it failed: another one has to.
                if let Err(failure) = self.attempt(&[], attempted) {
                    return Err(not_known(self.shared.explain(&failure.trouble)));
                }
                // Opening the file has told the watchers.
                outcome.notices.clear();
                return Ok(outcome);
            }
            if last_try || !trouble.is_earlier() {
                return Err(self.shared.explain(&trouble));
            }
        }
        unreachable!("the second try returns");
    }

    /// One transaction.
    fn attempt(&self, jobs: &[Job], batch: u64) -> Result<Outcome, Box<Failure>> {
        let held = self
            .shared
            .held
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let database = held
            .database
            .as_ref()
            .ok_or_else(|| Failure::new(Trouble::Closed, None))?;
        let prepared = (|| {
            let mut tx = database.begin_write()?;
            tx.set_durability(Durability::Immediate)?;
            tx.set_quick_repair(true);
            let outcome = apply(&tx, jobs, batch)?;
            Ok((tx, outcome))
        })();
        let (tx, outcome) = prepared.map_err(|trouble: Trouble| Failure::new(trouble, None))?;
        // A batch of nothing but conflicts needs no fsync: what they met is durable.
        if outcome.notices.is_empty() && !jobs.is_empty() {
            return match tx.abort() {
                Ok(()) => Ok(outcome),
                Err(e) => Err(Failure::new(e, None)),
            };
        }
        match tx.commit() {
            Ok(()) => Ok(outcome),
            Err(e) => Err(Failure::new(e, Some(outcome))),
        }
    }
}

fn not_known(error: StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(text) => StoreError::Unknown(text),
        other => other,
    }
}

/// The same error, for another one who waits.
fn again(error: &StoreError) -> StoreError {
    match error {
        StoreError::Conflict { key } => StoreError::Conflict { key: key.clone() },
        StoreError::Unavailable(text) => StoreError::Unavailable(text.clone()),
        StoreError::Unknown(text) => StoreError::Unknown(text.clone()),
        StoreError::Damaged(text) => StoreError::Damaged(text.clone()),
    }
}

/// Applies each job whose expectations hold, in order.
fn apply(tx: &redb::WriteTransaction, jobs: &[Job], batch: u64) -> Result<Outcome, Trouble> {
    let mut records = tx.open_table(RECORDS)?;
    let mut feed = tx.open_table(FEED)?;
    let mut heads = tx.open_table(HEADS)?;
    let mut meta = tx.open_table(META)?;
    meta.insert(META_BATCH, batch)?;
    let incarnation = known_incarnation(&meta)?;

    let mut touched = BTreeMap::new();
    let mut outcome = Outcome {
        answers: Vec::with_capacity(jobs.len()),
        notices: Vec::with_capacity(jobs.len()),
    };
    for job in jobs {
        let partition = job.partition;
        let mut now = match touched.get(&partition) {
            Some(head) => *head,
            None => head(&heads, partition)?,
        };
        let mut conflict = None;
        for change in &job.changes {
            let revision = match (
                change.expect,
                records.get(record_key(partition, &change.key).as_slice())?,
            ) {
                (Expect::Anything, _) | (_, None) => None,
                (_, Some(stored)) => Some(split_record(stored.value())?.0),
            };
            let holds = match change.expect {
                Expect::Anything => true,
                Expect::Absent => revision.is_none(),
                Expect::Revision(expected) => revision == Some(expected),
            };
            if !holds {
                conflict = Some(change.key.clone());
                break;
            }
        }
        if let Some(key) = conflict {
            outcome.answers.push(Err(StoreError::Conflict { key }));
            continue;
        }
        if job.changes.is_empty() {
            outcome.answers.push(Ok(now.revision));
            continue;
        }

        now.revision += 1;
        for change in &job.changes {
            let key = record_key(partition, &change.key);
            match &change.value {
                Some(value) => {
                    let mut slot = records.insert_reserve(key.as_slice(), 8 + value.len())?;
                    slot.as_mut()[..8].copy_from_slice(&now.revision.to_be_bytes());
                    slot.as_mut()[8..].copy_from_slice(value);
                }
                None => {
                    records.remove(key.as_slice())?;
                }
            }
        }
        let encoded = encode_changes(&job.changes);
        feed.insert(
            feed_key(partition, now.revision).as_slice(),
            encoded.as_slice(),
        )?;
        now.feed_bytes += encoded.len() as u64;
        while now.revision - now.oldest >= FEED_COMMITS
            || (now.feed_bytes > FEED_BYTES && now.oldest < now.revision)
        {
            if let Some(trimmed) = feed.remove(feed_key(partition, now.oldest).as_slice())? {
                now.feed_bytes = now.feed_bytes.saturating_sub(trimmed.value().len() as u64);
            }
            now.oldest += 1;
        }
        touched.insert(partition, now);
        outcome.answers.push(Ok(now.revision));
        let small = job.size <= LIVE_BYTES;
        outcome.notices.push(Notice {
            incarnation,
            partition,
            revision: now.revision,
            changes: small.then(|| {
                let changes = job.changes.iter();
                changes.map(|c| (c.key.clone(), c.value.clone())).collect()
            }),
        });
    }
    for (partition, head) in touched {
        heads.insert(code(partition), encode_head(head).as_slice())?;
    }
    Ok(outcome)
}

/// A running watch.
struct Following {
    shared: Arc<Shared>,
    live: broadcast::Receiver<Notice>,
    /// The one that the cursor's revisions count in.
    incarnation: u64,
    cursor: BTreeMap<Partition, u64>,
    /// The partitions whose feed may hold more.
    behind: BTreeSet<Partition>,
    /// Read from the feed and not yet handed out.
    ready: VecDeque<Commit>,
    over: bool,
}

#[async_trait]
impl Watch for Following {
    /// Nothing is lost when the future is dropped before it is ready.
    async fn next(&mut self) -> Result<Event, StoreError> {
        loop {
            if self.over {
                return Ok(Event::FellBehind);
            }
            if let Some(commit) = self.ready.pop_front() {
                self.cursor.insert(commit.partition, commit.revision);
                return Ok(Event::Commit(commit));
            }
            if let Some(&partition) = self.behind.first() {
                let after = self.cursor.get(&partition).copied().unwrap_or(0);
                match self.shared.page(self.incarnation, partition, after) {
                    Ok(Some((commits, all))) => {
                        self.ready.extend(commits);
                        if all {
                            self.behind.remove(&partition);
                        }
                    }
                    Ok(None) => self.over = true,
                    Err(e) => {
                        self.over = true;
                        return Err(e);
                    }
                }
                continue;
            }
            match self.live.recv().await {
                Ok(notice) => {
                    let after = self.cursor.get(&notice.partition).copied().unwrap_or(0);
                    match notice.changes {
                        _ if notice.incarnation != self.incarnation => self.over = true,
                        _ if notice.revision <= after => {}
                        Some(changes) if notice.revision == after + 1 => {
                            self.ready.push_back(Commit {
                                partition: notice.partition,
                                revision: notice.revision,
                                changes,
                            });
                        }
                        _ => {
                            self.behind.insert(notice.partition);
                        }
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    self.behind = Partition::all().collect();
                }
                Err(broadcast::error::RecvError::Closed) => {
                    self.over = true;
                    return Err(StoreError::Unavailable("weir is stopping".into()));
                }
            }
        }
    }
}

/// A lock on a file. A process that is being started may hold a copy of the descriptor for
/// a moment, so closing it is not enough to let go.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "can't unlock the data directory");
        }
    }
}

/// Makes the directory where it is missing, and takes the lock.
fn lock(path: &Path) -> Result<Lock, StoreError> {
    let explain = |e: io::Error| {
        StoreError::Unavailable(format!(
            "can't open {}: {e}; check the data directory and who may write to it",
            path.display()
        ))
    };
    private::directory(directory(path)).map_err(explain)?;
    let lock = private::file(&with_suffix(path, ".lock")).map_err(explain)?;
    match lock.try_lock() {
        Ok(()) => Ok(Lock(lock)),
        Err(TryLockError::WouldBlock) => Err(in_use(path)),
        Err(TryLockError::Error(e)) => Err(explain(e)),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the tables of a new file, and refuses one whose format is not known.
fn check_format(database: &Database) -> Result<Found, Trouble> {
    let tx = database.begin_read()?;
    let (format, named) = match tx.open_table(META) {
        Ok(meta) => (
            meta.get(META_FORMAT)?.map(|found| found.value()),
            meta.get(META_INCARNATION)?.is_some(),
        ),
        Err(TableError::TableDoesNotExist(_)) => (None, false),
        Err(e) => return Err(e.into()),
    };
    drop(tx);
    match format {
        Some(FORMAT) if named => {}
        Some(newer) if newer != FORMAT => {
            return Err(Trouble::Other(format!(
                "it was written by a newer version of weir (format {newer}, this version knows \
                 {FORMAT}): run that version, or put back a backup from before it"
            )));
        }
        // A new file, or one from before there were incarnations.
        Some(_) | None => {
            let mut tx = database.begin_write()?;
            tx.set_durability(Durability::Immediate)?;
            tx.set_quick_repair(true);
            tx.open_table(RECORDS)?;
            tx.open_table(FEED)?;
            tx.open_table(HEADS)?;
            {
                let mut meta = tx.open_table(META)?;
                meta.insert(META_FORMAT, FORMAT)?;
                meta.insert(META_INCARNATION, rand::random::<u64>())?;
            }
            tx.commit()?;
        }
    }
    let tx = database.begin_read()?;
    let batch = tx.open_table(META)?.get(META_BATCH)?;
    let batch = batch.map_or(0, |found| found.value());
    let incarnation = incarnation(&tx)?;
    let heads = tx.open_table(HEADS)?;
    let heads = Partition::all()
        .map(|partition| Ok((partition, head(&heads, partition)?)))
        .collect::<Result<_, Trouble>>()?;
    Ok(Found {
        incarnation,
        batch,
        heads,
    })
}

fn incarnation(tx: &ReadTransaction) -> Result<u64, Trouble> {
    known_incarnation(&tx.open_table(META)?)
}

fn known_incarnation(meta: &impl ReadableTable<&'static str, u64>) -> Result<u64, Trouble> {
    let found = meta.get(META_INCARNATION)?;
    let missing = || Trouble::Damaged("it lacks its incarnation".into());
    found.map(|found| found.value()).ok_or_else(missing)
}

fn head(
    heads: &impl ReadableTable<u16, &'static [u8]>,
    partition: Partition,
) -> Result<Head, Trouble> {
    let Some(stored) = heads.get(code(partition))? else {
        return Ok(Head {
            revision: 0,
            oldest: 1,
            feed_bytes: 0,
        });
    };
    let mut left = stored.value();
    Ok(Head {
        revision: take_u64(&mut left)?,
        oldest: take_u64(&mut left)?,
        feed_bytes: take_u64(&mut left)?,
    })
}

fn encode_head(head: Head) -> Vec<u8> {
    [head.revision, head.oldest, head.feed_bytes]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect()
}

/// How a partition is written in the file. Never changes.
fn code(partition: Partition) -> u16 {
    match partition {
        Partition::Functions(n) => {
            debug_assert!(n < super::FUNCTION_PARTITIONS);
            n
        }
        Partition::Keys => 0x8000,
        Partition::Accounts => 0x8001,
    }
}

fn record_key(partition: Partition, key: &str) -> Vec<u8> {
    [&code(partition).to_be_bytes(), key.as_bytes()].concat()
}

fn feed_key(partition: Partition, revision: u64) -> Vec<u8> {
    [&code(partition).to_be_bytes()[..], &revision.to_be_bytes()].concat()
}

fn split_record(mut stored: &[u8]) -> Result<(u64, &[u8]), Trouble> {
    let revision = take_u64(&mut stored)?;
    Ok((revision, stored))
}

fn decode_record(key: String, stored: &[u8]) -> Result<Record, Trouble> {
    let (revision, value) = split_record(stored)?;
    Ok(Record {
        key,
        value: Bytes::copy_from_slice(value),
        revision,
    })
}

/// About what the changes take in the file.
fn size_of_changes(changes: &[Change]) -> usize {
    let sizes = changes.iter();
    sizes
        .map(|c| 16 + c.key.len() + c.value.as_ref().map_or(0, Bytes::len))
        .sum()
}

/// For each change the length of its key, the key, the length of its value plus one or
/// zero for a deletion, and the value. Lengths fit: see [`COMMIT_BYTES`].
fn encode_changes(changes: &[Change]) -> Vec<u8> {
    let mut out = Vec::with_capacity(size_of_changes(changes));
    for change in changes {
        out.extend((change.key.len() as u64).to_be_bytes());
        out.extend(change.key.as_bytes());
        match &change.value {
            Some(value) => {
                out.extend((value.len() as u64 + 1).to_be_bytes());
                out.extend(value);
            }
            None => out.extend(0_u64.to_be_bytes()),
        }
    }
    out
}

fn decode_changes(mut left: &[u8]) -> Result<Changes, Trouble> {
    let mut changes = Vec::new();
    while !left.is_empty() {
        let length = take_u64(&mut left)?;
        let key = std::str::from_utf8(take(&mut left, length)?)
            .map_err(|_| Trouble::Damaged("a key in the feed is not UTF-8".into()))?
            .to_owned();
        let value = match take_u64(&mut left)? {
            0 => None,
            length => Some(Bytes::copy_from_slice(take(&mut left, length - 1)?)),
        };
        changes.push((key, value));
    }
    Ok(changes.into())
}

fn take_u64(left: &mut &[u8]) -> Result<u64, Trouble> {
    match left.split_first_chunk() {
        Some((number, rest)) => {
            *left = rest;
            Ok(u64::from_be_bytes(*number))
        }
        None => Err(Trouble::Damaged("a stored value is cut short".into())),
    }
}

fn take<'a>(left: &mut &'a [u8], length: u64) -> Result<&'a [u8], Trouble> {
    let split = usize::try_from(length).ok();
    match split.and_then(|at| left.split_at_checked(at)) {
        Some((taken, rest)) => {
            *left = rest;
            Ok(taken)
        }
        None => Err(Trouble::Damaged("a stored value is cut short".into())),
    }
}

#[cfg(test)]
mod tests;
