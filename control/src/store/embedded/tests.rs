use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use futures_util::future::join_all;
use redb::StorageBackend;
use redb::backends::FileBackend;

use super::super::contract::{put, suite};
use super::*;

const P: Partition = Partition::Functions(3);
/// Tells a child of the test binary which file to write to.
const CHILD_FILE: &str = "WEIR_TEST_STORE";

async fn fresh() -> (Arc<dyn Store>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let store = Embedded::open(&directory.path().join("state")).unwrap();
    (store, directory)
}

suite!(fresh, FEED_COMMITS as usize);

fn text(error: StoreError) -> String {
    match error {
        StoreError::Unavailable(text) | StoreError::Unknown(text) | StoreError::Damaged(text) => {
            text
        }
        StoreError::Conflict { key } => panic!("a conflict on {key}"),
    }
}

fn refusal(path: &Path) -> String {
    match Embedded::open(path) {
        Ok(_) => panic!("opened"),
        Err(e) => text(e),
    }
}

#[tokio::test]
async fn keeps_everything_when_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/on/the/way/state");
    let mut revisions = Vec::new();
    for round in 0..3_u64 {
        let store = Embedded::open(&path).unwrap();
        let mut watch = store.watch(Cursor::default()).await.unwrap();
        for revision in 1..=round * 20 {
            match watch.next().await.unwrap() {
                Event::Commit(commit) => assert_eq!(commit.revision, revision),
                Event::FellBehind => panic!("fell behind"),
            }
        }
        for (n, revision) in revisions.iter().enumerate() {
            let found = store.get(P, &n.to_string()).await.unwrap().unwrap();
            assert_eq!(
                (found.revision, found.value),
                (*revision, n.to_string().into())
            );
        }
        for n in revisions.len()..revisions.len() + 20 {
            let change = put(&n.to_string(), Expect::Absent, n.to_string());
            revisions.push(store.commit(P, vec![change]).await.unwrap());
        }
        // A watch does not keep the file open.
        drop(store);
        while watch.next().await.is_ok() {}
    }
    assert_eq!(revisions, (1..=60).collect::<Vec<_>>());
}

/// A store that was lost counts again from the start: whoever watched the old one is not left waiting until it gets
/// to where that was, nor given other commits as the next ones.
#[tokio::test]
async fn tells_a_new_file_from_the_old_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let commit = async |store: &Embedded| {
        let change = put("k", Expect::Anything, "x");
        store.commit(P, vec![change]).await.unwrap()
    };
    let store = Embedded::open(&path).unwrap();
    assert_eq!(commit(&store).await, 1);
    let (_, position) = store.list(P, "").await.unwrap();
    drop(store);

    let store = Embedded::open(&path).unwrap();
    assert_eq!(store.list(P, "").await.unwrap().1, position);
    let cursor = Cursor([(P, position)].into());
    let mut watch = store.watch(cursor.clone()).await.unwrap();
    assert_eq!(commit(&store).await, 2);
    match watch.next().await.unwrap() {
        Event::Commit(commit) => assert_eq!(commit.revision, 2),
        Event::FellBehind => panic!("fell behind"),
    }

    // Lost while it is open, and while a watch waits.
    fs::remove_file(&path).unwrap();
    let generation = store.shared.held.read().unwrap().generation;
    let (answer, answered) = oneshot::channel();
    store
        .ask(Work::Reopen { generation, answer }, answered)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(watch.next().await.unwrap(), Event::FellBehind);
    for revision in 1..=3 {
        let mut watch = store.watch(cursor.clone()).await.unwrap();
        assert_eq!(watch.next().await.unwrap(), Event::FellBehind);
        assert_eq!(commit(&store).await, revision);
    }
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    match watch.next().await.unwrap() {
        Event::Commit(commit) => assert_eq!(commit.revision, 1),
        Event::FellBehind => panic!("fell behind"),
    }
}

/// Files from before there were incarnations are taken over.
#[tokio::test]
async fn gives_an_old_file_an_incarnation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let store = Embedded::open(&path).unwrap();
    let change = put("k", Expect::Absent, "x");
    store.commit(P, vec![change]).await.unwrap();
    drop(store);
    {
        let database = Database::create(&path).unwrap();
        let tx = database.begin_write().unwrap();
        tx.open_table(META)
            .unwrap()
            .remove(META_INCARNATION)
            .unwrap();
        tx.commit().unwrap();
    }
    let store = Embedded::open(&path).unwrap();
    let (records, position) = store.list(P, "").await.unwrap();
    assert_eq!((records.len(), position.revision), (1, 1));
    drop(store);
    let store = Embedded::open(&path).unwrap();
    assert_eq!(store.list(P, "").await.unwrap().1, position);
}

#[tokio::test]
async fn refuses_a_second_open() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let first = Embedded::open(&path).unwrap();
    let refused = refusal(&path);
    assert!(
        refused.contains("another weir uses the data directory"),
        "{refused}"
    );
    drop(first);
    Embedded::open(&path).unwrap();
}

#[tokio::test]
async fn refuses_what_it_does_not_know() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    drop(Embedded::open(&path).unwrap());
    {
        let database = Database::create(&path).unwrap();
        let tx = database.begin_write().unwrap();
        tx.open_table(META).unwrap().insert(META_FORMAT, 2).unwrap();
        tx.commit().unwrap();
    }
    let refused = refusal(&path);
    assert!(
        refused.contains("newer version of weir (format 2"),
        "{refused}"
    );

    let other = directory.path().join("other");
    fs::write(&other, "not a database".repeat(1000)).unwrap();
    let refused = refusal(&other);
    assert!(refused.contains("not a file of weir's"), "{refused}");
}

/// Not a test: what [`survives_being_killed`] starts and kills.
#[tokio::test]
async fn child_that_commits() {
    let Some(path) = std::env::var_os(CHILD_FILE) else {
        return;
    };
    let store = Embedded::open(Path::new(&path)).unwrap();
    let mut next = store.list(P, "").await.unwrap().1.revision + 1;
    loop {
        // Several at once, so that kills fall amid batches.
        let changes = |n: u64| {
            let value = format!("{n} ").repeat(1 + n as usize % 500);
            vec![
                put(&format!("{n:08}"), Expect::Absent, value),
                put("last", Expect::Anything, n.to_string()),
            ]
        };
        let done = join_all((next..next + 5).map(|n| store.commit(P, changes(n)))).await;
        for revision in done {
            let mut out = std::io::stdout();
            // Two writes could be cut apart by the kill.
            out.write_all(format!("\nacknowledged {}\n", revision.unwrap()).as_bytes())
                .unwrap();
            out.flush().unwrap();
            next += 1;
        }
    }
}

#[tokio::test]
async fn survives_being_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let mut acknowledged = 0;
    for round in 0..25_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::embedded::tests::child_that_commits",
                "--nocapture",
            ])
            .env(CHILD_FILE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Killed after some acknowledgements; what was in the pipe by then counts too.
        let until = acknowledged + 1 + round * 7 % 60;
        let out = BufReader::new(child.stdout.take().unwrap());
        for line in out.lines() {
            let line = line.unwrap();
            if let Some(revision) = line.strip_prefix("acknowledged ") {
                let revision: u64 = revision.parse().unwrap();
                assert_eq!(revision, acknowledged + 1);
                acknowledged = revision;
                if acknowledged == until {
                    child.kill().unwrap();
                }
            }
        }
        assert!(!child.wait().unwrap().success());
        assert!(
            acknowledged >= until,
            "the child ended by itself in round {round}"
        );

        let store = Embedded::open(&path).unwrap();
        let (records, Position { revision, .. }) = store.list(P, "0").await.unwrap();
        assert!(revision >= acknowledged, "{revision} < {acknowledged}");
        assert_eq!(records.len() as u64, revision);
        for (record, n) in records.iter().zip(1..) {
            assert_eq!(
                (record.key.as_str(), record.revision),
                (format!("{n:08}").as_str(), n)
            );
            assert_eq!(record.value, format!("{n} ").repeat(1 + n as usize % 500));
        }
        let last = store.get(P, "last").await.unwrap().unwrap();
        assert_eq!(
            (last.value, last.revision),
            (revision.to_string().into(), revision)
        );
        acknowledged = revision;
    }
}

/// What goes wrong with the disk, and when.
#[derive(Debug, Default)]
struct Fate {
    /// Writing calls that still go well, once `armed`.
    left: AtomicI64,
    armed: AtomicBool,
    /// It goes wrong but once.
    once: AtomicBool,
    full: AtomicBool,
    reads_fail: AtomicBool,
}

#[derive(Debug)]
struct Faulty {
    file: FileBackend,
    fate: Arc<Fate>,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        if self.fate.full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if self.fate.armed.load(Ordering::SeqCst)
            && self.fate.left.fetch_sub(1, Ordering::SeqCst) <= 0
        {
            if self.fate.once.load(Ordering::SeqCst) {
                self.fate.armed.store(false, Ordering::SeqCst);
            }
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

impl StorageBackend for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if self.fate.reads_fail.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.file.set_len(len)
    }
    /// Fails after it has done its work, which is the more difficult case.
    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        self.check()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.file.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

fn open_faulty(path: &Path, fate: &Arc<Fate>) -> Result<Arc<Embedded>, StoreError> {
    let fate = Arc::clone(fate);
    Embedded::open_by(
        path,
        Box::new(move |redb, path| {
            let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
            redb.create_with_backend(Faulty {
                file: FileBackend::new(file)?,
                fate: Arc::clone(&fate),
            })
        }),
    )
}

#[tokio::test]
async fn recovers_from_a_full_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let fate = Arc::new(Fate::default());
    let store = open_faulty(&path, &fate).unwrap();
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    for round in 1..=3 {
        let key = format!("good {round}");
        assert_eq!(
            store
                .commit(P, vec![put(&key, Expect::Absent, "x")])
                .await
                .unwrap(),
            round
        );
        fate.full.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            let outcome = store
                .commit(P, vec![put("bad", Expect::Absent, vec![0; 100_000])])
                .await;
            let refused = text(outcome.unwrap_err());
            assert!(refused.contains("is full: free some space"), "{refused}");
        }
        fate.full.store(false, Ordering::SeqCst);
        // Readers get along without a commit that mends things first.
        assert!(store.get(P, &key).await.unwrap().is_some());
        assert_eq!(store.get(P, "bad").await.unwrap(), None);
        assert_eq!(store.list(P, "").await.unwrap().1.revision, round);
    }
    assert_eq!(
        store
            .commit(P, vec![put("end", Expect::Absent, "x")])
            .await
            .unwrap(),
        4
    );
    for expected in 1..=4 {
        match watch.next().await.unwrap() {
            Event::Commit(commit) => assert_eq!(commit.revision, expected),
            Event::FellBehind => panic!("fell behind"),
        }
    }
    drop(store);
    assert_eq!(
        Embedded::open(&path)
            .unwrap()
            .list(P, "")
            .await
            .unwrap()
            .0
            .len(),
        4
    );
}

#[tokio::test]
async fn recovers_from_failing_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let fate = Arc::new(Fate::default());
    let store = open_faulty(&path, &fate).unwrap();
    store
        .commit(P, vec![put("k", Expect::Absent, "x")])
        .await
        .unwrap();
    fate.reads_fail.store(true, Ordering::SeqCst);
    // Whether it is read at all depends on the cache; opening it anew needs the disk.
    let generation = store.shared.held.read().unwrap().generation;
    let (answer, answered) = oneshot::channel();
    let asked = store
        .ask(Work::Reopen { generation, answer }, answered)
        .await
        .unwrap();
    assert!(text(asked.unwrap_err()).contains("check the disk"));
    assert!(text(store.get(P, "k").await.unwrap_err()).contains("check the disk"));
    assert!(
        store
            .commit(P, vec![put("l", Expect::Absent, "x")])
            .await
            .is_err()
    );
    fate.reads_fail.store(false, Ordering::SeqCst);
    assert!(store.get(P, "k").await.unwrap().is_some());
    assert_eq!(
        store
            .commit(P, vec![put("l", Expect::Absent, "x")])
            .await
            .unwrap(),
        2
    );
}

/// A directory where fsync costs nothing, if there is one.
fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// Fails each single writing call in turn, for good and just once.
#[tokio::test]
async fn keeps_its_word_wherever_it_fails() {
    let mut ever_unknown = 0;
    for once in [false, true] {
        let mut failures = 0;
        for calls in 0.. {
            let directory = in_memory();
            let path = directory.path().join("state");
            let fate = Arc::new(Fate::default());
            fate.once.store(once, Ordering::SeqCst);
            fate.left.store(calls, Ordering::SeqCst);
            fate.armed.store(true, Ordering::SeqCst);
            let mut acknowledged = Vec::new();
            let mut refused = Vec::new();
            let mut unknown = 0;
            if let Ok(store) = open_faulty(&path, &fate) {
                for n in 0..8 {
                    let value = vec![n as u8; 3000 * n];
                    match store
                        .commit(P, vec![put(&n.to_string(), Expect::Absent, value)])
                        .await
                    {
                        Ok(revision) => acknowledged.push((n, revision)),
                        Err(StoreError::Unknown(_)) => unknown += 1,
                        Err(StoreError::Unavailable(_)) => refused.push(n),
                        Err(other) => panic!("{other}"),
                    }
                }
                failures += refused.len() + unknown;
                ever_unknown += unknown;
                if refused.is_empty() && unknown == 0 && fate.left.load(Ordering::SeqCst) > 0 {
                    break;
                }
            }
            fate.armed.store(false, Ordering::SeqCst);
            let store = Embedded::open(&path).unwrap();
            for (n, revision) in &acknowledged {
                let found = store.get(P, &n.to_string()).await.unwrap();
                assert_eq!(found.unwrap().revision, *revision, "failing after {calls}");
            }
            for n in refused {
                assert_eq!(
                    store.get(P, &n.to_string()).await.unwrap(),
                    None,
                    "failing after {calls}"
                );
            }
            let (records, Position { revision, .. }) = store.list(P, "").await.unwrap();
            assert_eq!(records.len() as u64, revision);
            assert!(records.len() <= acknowledged.len() + unknown);
            let mut watch = store.watch(Cursor::default()).await.unwrap();
            for expected in 1..=revision {
                match watch.next().await.unwrap() {
                    Event::Commit(commit) => assert_eq!(commit.revision, expected),
                    Event::FellBehind => panic!("fell behind"),
                }
            }
        }
        assert!(failures > 0);
    }
    // Where the disk fails for good amid a commit, nobody can say.
    assert!(ever_unknown > 0);
}
