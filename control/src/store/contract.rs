//! The promises of a store, as a test suite that every implementation runs.
//!
//! Each promise is a function over a fresh, empty store. [`suite!`] makes a test
//! of each one. Whatever is promised here, all implementations keep; whatever
//! is not, nobody may lean on. Beyond what the trait says, this settles:
//!
//! - the expectations of a commit are about the records as they were before it;
//! - a commit without changes answers the present revision and is not in the feed;
//! - every other commit takes the next revision of its partition, also one that
//!   deletes what is not there, so revisions have no holes;
//! - a cursor that lies in the future, or in another incarnation of a partition,
//!   has fallen behind too, wherever its revision lies.
#![cfg(test)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::{
    Change, Commit, Cursor, Event, Expect, Partition, Position, Record, Store, StoreError, Watch,
};

/// Makes a test of every promise. `$fresh` is an `async fn() -> (Arc<dyn Store>, guard)`
/// that makes an empty store; `$feed` is how many commits its feed keeps at most.
macro_rules! suite {
    ($fresh:path, $feed:expr) => {
        $crate::store::contract::suite!(@each $fresh,
            gets_and_lists, keeps_partitions_apart, compares_and_sets, commits_all_or_nothing,
            leaves_no_trace_of_conflicts, numbers_commits_without_holes, deletes,
            takes_empty_commits, takes_big_values, watches_from_a_cursor, watches_while_writers_race,
            hands_on_every_change, catches_up_when_slow, counts_exactly, outlives_dropped_futures,
            watch_futures_may_be_dropped, refuses_cursors_of_the_future, refuses_cursors_of_another_life,
            goes_on_in_one_life,
        );

        #[tokio::test]
        async fn says_when_a_watch_fell_behind() {
            let (store, _guard) = $fresh().await;
            $crate::store::contract::says_when_a_watch_fell_behind(store, $feed).await;
        }
    };
    (@each $fresh:path, $($name:ident),* $(,)?) => {
        $(
            #[tokio::test]
            async fn $name() {
                let (store, _guard) = $fresh().await;
                $crate::store::contract::$name(store).await;
            }
        )*
    };
}
pub(crate) use suite;

const P: Partition = Partition::Functions(7);
const Q: Partition = Partition::Functions(63);

pub(crate) fn put(key: &str, expect: Expect, value: impl Into<Bytes>) -> Change {
    Change {
        key: key.into(),
        expect,
        value: Some(value.into()),
    }
}

fn delete(key: &str, expect: Expect) -> Change {
    Change {
        key: key.into(),
        expect,
        value: None,
    }
}

async fn value(store: &Arc<dyn Store>, partition: Partition, key: &str) -> Option<Bytes> {
    let found = store.get(partition, key).await.unwrap();
    found.map(|record| record.value)
}

async fn listed(store: &Arc<dyn Store>, partition: Partition, prefix: &str) -> (Vec<Record>, u64) {
    let (records, position) = store.list(partition, prefix).await.unwrap();
    (records, position.revision)
}

/// A cursor of these revisions, in the lives that the partitions are in now.
async fn at<const N: usize>(store: &Arc<dyn Store>, revisions: [(Partition, u64); N]) -> Cursor {
    let mut cursor = Cursor::default();
    for (partition, revision) in revisions {
        let (_, now) = store.list(partition, "").await.unwrap();
        cursor.0.insert(partition, Position { revision, ..now });
    }
    cursor
}

async fn contents(store: &Arc<dyn Store>, partition: Partition) -> BTreeMap<String, Bytes> {
    let (records, _) = listed(store, partition, "").await;
    records.into_iter().map(|r| (r.key, r.value)).collect()
}

#[track_caller]
fn assert_conflict(outcome: Result<u64, StoreError>, on: &str) {
    match outcome {
        Err(StoreError::Conflict { key }) => assert_eq!(key, on),
        other => panic!("expected a conflict on {on}, got {other:?}"),
    }
}

async fn event(watch: &mut Box<dyn Watch>) -> Event {
    tokio::time::timeout(Duration::from_secs(60), watch.next())
        .await
        .expect("an event within a minute")
        .unwrap()
}

async fn commit_of(watch: &mut Box<dyn Watch>) -> Commit {
    match event(watch).await {
        Event::Commit(commit) => commit,
        Event::FellBehind => panic!("fell behind"),
    }
}

/// Nothing more comes: what is committed now is the next event.
async fn assert_drained(store: &Arc<dyn Store>, watch: &mut Box<dyn Watch>) {
    let revision = store
        .commit(
            Partition::Accounts,
            vec![put("last", Expect::Anything, "x")],
        )
        .await
        .unwrap();
    let commit = commit_of(watch).await;
    assert_eq!(
        (commit.partition, commit.revision),
        (Partition::Accounts, revision)
    );
}

fn apply(contents: &mut BTreeMap<String, Bytes>, commit: &Commit) {
    for (key, value) in commit.changes.iter() {
        match value {
            Some(value) => contents.insert(key.clone(), value.clone()),
            None => contents.remove(key),
        };
    }
}

pub(crate) async fn gets_and_lists(store: Arc<dyn Store>) {
    assert_eq!(store.get(P, "a").await.unwrap(), None);
    assert_eq!(listed(&store, P, "").await, (vec![], 0));
    let keys = [
        "b",
        "a/2",
        "a",
        "a/10",
        "a0",
        "ä",
        "",
        "a/",
        "\u{10ffff}",
        "a\0",
    ];
    for key in keys {
        let written = format!("value of {key}");
        store
            .commit(P, vec![put(key, Expect::Absent, written)])
            .await
            .unwrap();
    }
    for (at, key) in keys.iter().enumerate() {
        let found = store.get(P, key).await.unwrap().unwrap();
        assert_eq!(found.key, *key);
        assert_eq!(found.value, format!("value of {key}"));
        assert_eq!(found.revision, at as u64 + 1);
    }
    assert_eq!(store.get(P, "a/1").await.unwrap(), None);

    for prefix in ["", "a", "a/", "a/1", "ä", "zz", "\u{10ffff}"] {
        let mut expected: Vec<_> = keys.iter().filter(|k| k.starts_with(prefix)).collect();
        expected.sort();
        let (found, revision) = listed(&store, P, prefix).await;
        assert_eq!(revision, keys.len() as u64);
        assert_eq!(
            found.iter().map(|r| r.key.as_str()).collect::<Vec<_>>(),
            expected.iter().map(|k| **k).collect::<Vec<_>>(),
            "{prefix:?}"
        );
        for record in found {
            assert_eq!(store.get(P, &record.key).await.unwrap(), Some(record));
        }
    }
    // Bytes are bytes.
    let odd = Bytes::from((0..=255).collect::<Vec<u8>>());
    store
        .commit(
            P,
            vec![
                put("odd", Expect::Absent, odd.clone()),
                put("none", Expect::Absent, ""),
            ],
        )
        .await
        .unwrap();
    assert_eq!(value(&store, P, "odd").await, Some(odd));
    assert_eq!(value(&store, P, "none").await, Some(Bytes::new()));
}

pub(crate) async fn keeps_partitions_apart(store: Arc<dyn Store>) {
    for (at, partition) in Partition::all().enumerate() {
        let change = put("same", Expect::Absent, format!("{at}"));
        assert_eq!(store.commit(partition, vec![change]).await.unwrap(), 1);
    }
    for (at, partition) in Partition::all().enumerate() {
        assert_eq!(
            value(&store, partition, "same").await.unwrap(),
            format!("{at}")
        );
        let (records, revision) = listed(&store, partition, "").await;
        assert_eq!((records.len(), revision), (1, 1));
    }
}

pub(crate) async fn compares_and_sets(store: Arc<dyn Store>) {
    let one = store
        .commit(P, vec![put("k", Expect::Absent, "1")])
        .await
        .unwrap();
    assert_conflict(
        store.commit(P, vec![put("k", Expect::Absent, "x")]).await,
        "k",
    );
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(one + 1), "x")])
            .await,
        "k",
    );
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(0), "x")])
            .await,
        "k",
    );
    assert_conflict(
        store
            .commit(P, vec![put("other", Expect::Revision(one), "x")])
            .await,
        "other",
    );
    assert_conflict(
        store
            .commit(P, vec![put("other", Expect::Revision(0), "x")])
            .await,
        "other",
    );
    let two = store
        .commit(P, vec![put("k", Expect::Revision(one), "2")])
        .await
        .unwrap();
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(one), "x")])
            .await,
        "k",
    );
    let three = store
        .commit(P, vec![put("k", Expect::Anything, "3")])
        .await
        .unwrap();
    let new = store
        .commit(P, vec![put("new", Expect::Anything, "n")])
        .await
        .unwrap();
    assert_eq!((two, three, new), (one + 1, one + 2, one + 3));
    let found = store.get(P, "k").await.unwrap().unwrap();
    assert_eq!((found.value, found.revision), (Bytes::from("3"), three));
    // Written anew with the same value, it is another revision all the same.
    let four = store
        .commit(P, vec![put("k", Expect::Revision(three), "3")])
        .await
        .unwrap();
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(three), "3")])
            .await,
        "k",
    );
    assert_eq!(store.get(P, "k").await.unwrap().unwrap().revision, four);
}

pub(crate) async fn commits_all_or_nothing(store: Arc<dyn Store>) {
    let start = store
        .commit(
            P,
            vec![put("a", Expect::Absent, "1"), put("b", Expect::Absent, "1")],
        )
        .await
        .unwrap();
    assert_eq!(store.get(P, "a").await.unwrap().unwrap().revision, start);
    assert_eq!(store.get(P, "b").await.unwrap().unwrap().revision, start);
    let before = contents(&store, P).await;
    // The first and the last change are good, the one between is not.
    let outcome = store
        .commit(
            P,
            vec![
                put("a", Expect::Revision(start), "2"),
                put("b", Expect::Absent, "2"),
                delete("a", Expect::Anything),
                put("c", Expect::Absent, "2"),
            ],
        )
        .await;
    assert_conflict(outcome, "b");
    assert_eq!(contents(&store, P).await, before);
    // Expectations are about what was there before the commit, and later changes win.
    let twice = vec![put("d", Expect::Absent, "1"), put("d", Expect::Absent, "2")];
    store.commit(P, twice).await.unwrap();
    assert_eq!(value(&store, P, "d").await.unwrap(), "2");

    // Two records that are only ever written together are never seen apart.
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..100 {
                let n = n.to_string();
                let changes = vec![
                    put("a", Expect::Anything, n.clone()),
                    put("b", Expect::Anything, n),
                ];
                store.commit(P, changes).await.unwrap();
            }
        })
    };
    store
        .commit(
            P,
            vec![
                put("a", Expect::Anything, "0"),
                put("b", Expect::Anything, "0"),
            ],
        )
        .await
        .unwrap();
    while !writer.is_finished() {
        let seen = contents(&store, P).await;
        assert_eq!(seen["a"], seen["b"]);
    }
    writer.await.unwrap();
}

pub(crate) async fn leaves_no_trace_of_conflicts(store: Arc<dyn Store>) {
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    store
        .commit(P, vec![put("k", Expect::Absent, "1")])
        .await
        .unwrap();
    // Many at once, so that good and bad ones share whatever can be shared.
    let outcomes = join_all((0..100).map(|n| {
        let expect = if n % 2 == 0 {
            Expect::Anything
        } else {
            Expect::Absent
        };
        store.commit(
            P,
            vec![
                put(&format!("new{n}"), Expect::Anything, "x"),
                put("k", expect, "x"),
            ],
        )
    }))
    .await;
    for (n, outcome) in outcomes.into_iter().enumerate() {
        if n % 2 == 0 {
            outcome.unwrap();
        } else {
            assert_conflict(outcome, "k");
        }
    }
    let (records, revision) = listed(&store, P, "new").await;
    assert_eq!((records.len(), revision), (50, 51));
    for expected in 1..=51 {
        assert_eq!(commit_of(&mut watch).await.revision, expected);
    }
    assert_drained(&store, &mut watch).await;
}

pub(crate) async fn numbers_commits_without_holes(store: Arc<dyn Store>) {
    for expected in 1..=20 {
        let partition = [P, Q][expected % 2];
        let revision = store
            .commit(partition, vec![put("k", Expect::Anything, "x")])
            .await
            .unwrap();
        assert_eq!(revision, (expected as u64).div_ceil(2));
    }
    let mut together =
        join_all((0..100).map(|_| store.commit(P, vec![put("k", Expect::Anything, "y")])))
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect::<Vec<_>>();
    together.sort_unstable();
    assert_eq!(together, (11..=110).collect::<Vec<_>>());
    assert_eq!(listed(&store, P, "").await.1, 110);
    assert_eq!(listed(&store, Q, "").await.1, 10);
}

pub(crate) async fn deletes(store: Arc<dyn Store>) {
    assert_conflict(
        store
            .commit(P, vec![delete("k", Expect::Revision(1))])
            .await,
        "k",
    );
    let one = store
        .commit(
            P,
            vec![put("k", Expect::Absent, "1"), put("l", Expect::Absent, "1")],
        )
        .await
        .unwrap();
    assert_conflict(
        store.commit(P, vec![delete("k", Expect::Absent)]).await,
        "k",
    );
    let two = store
        .commit(P, vec![delete("k", Expect::Revision(one))])
        .await
        .unwrap();
    assert_eq!(store.get(P, "k").await.unwrap(), None);
    assert_eq!(listed(&store, P, "k").await, (vec![], two));
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(one), "x")])
            .await,
        "k",
    );
    // What is not there can be deleted; it counts as a commit.
    let three = store
        .commit(P, vec![delete("k", Expect::Anything)])
        .await
        .unwrap();
    let four = store
        .commit(P, vec![delete("k", Expect::Absent)])
        .await
        .unwrap();
    let five = store
        .commit(P, vec![put("k", Expect::Absent, "2")])
        .await
        .unwrap();
    assert_eq!(
        (two, three, four, five),
        (one + 1, one + 2, one + 3, one + 4)
    );
    // A key never gets a revision back that it had in an earlier life.
    assert_conflict(
        store
            .commit(P, vec![put("k", Expect::Revision(one), "x")])
            .await,
        "k",
    );

    let mut watch = store.watch(at(&store, [(P, one)]).await).await.unwrap();
    for expected in [None, None, None, Some(Bytes::from("2"))] {
        assert_eq!(
            *commit_of(&mut watch).await.changes,
            [("k".into(), expected)]
        );
    }
}

pub(crate) async fn takes_empty_commits(store: Arc<dyn Store>) {
    assert_eq!(store.commit(P, vec![]).await.unwrap(), 0);
    store
        .commit(P, vec![put("k", Expect::Absent, "1")])
        .await
        .unwrap();
    assert_eq!(store.commit(P, vec![]).await.unwrap(), 1);
    let mut watch = store.watch(at(&store, [(P, 1)]).await).await.unwrap();
    assert_drained(&store, &mut watch).await;
}

pub(crate) async fn takes_big_values(store: Arc<dyn Store>) {
    let big = |seed: usize| {
        Bytes::from(
            (0..1 << 20)
                .map(|n| (n * 31 + n / 251 + seed) as u8)
                .collect::<Vec<_>>(),
        )
    };
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    for n in 0..4 {
        store
            .commit(
                P,
                vec![
                    put("k", Expect::Anything, big(n)),
                    put(&n.to_string(), Expect::Absent, big(n + 100)),
                ],
            )
            .await
            .unwrap();
        let commit = commit_of(&mut watch).await;
        assert_eq!(commit.changes[0].1, Some(big(n)));
        assert_eq!(commit.changes[1].1, Some(big(n + 100)));
    }
    assert_eq!(value(&store, P, "k").await, Some(big(3)));
    assert_eq!(listed(&store, P, "").await.0.len(), 5);
}

pub(crate) async fn watches_from_a_cursor(store: Arc<dyn Store>) {
    for n in 0..10 {
        let n = n.to_string();
        store
            .commit(P, vec![put(&n, Expect::Absent, n.clone())])
            .await
            .unwrap();
        store
            .commit(
                Q,
                vec![
                    put(&n, Expect::Absent, n.clone()),
                    delete("x", Expect::Anything),
                ],
            )
            .await
            .unwrap();
    }
    // Two watches, with a cursor of their own; what the cursor does not name starts at 0.
    let mut early = store.watch(at(&store, [(P, 4)]).await).await.unwrap();
    let mut late = store
        .watch(at(&store, [(P, 10), (Q, 10)]).await)
        .await
        .unwrap();
    for n in 10..15 {
        let n = n.to_string();
        store
            .commit(P, vec![put(&n, Expect::Absent, n.clone())])
            .await
            .unwrap();
    }
    let mut at = BTreeMap::from([(P, 4), (Q, 0)]);
    while at != BTreeMap::from([(P, 15), (Q, 10)]) {
        let commit = commit_of(&mut early).await;
        let before = at.get_mut(&commit.partition).unwrap();
        *before += 1;
        assert_eq!(commit.revision, *before);
        let n = (commit.revision - 1).to_string();
        assert_eq!(commit.changes[0], (n.clone(), Some(n.into())));
        assert_eq!(
            commit.changes.len(),
            if commit.partition == Q { 2 } else { 1 }
        );
    }
    assert_drained(&store, &mut early).await;
    for revision in 11..=15 {
        let commit = commit_of(&mut late).await;
        assert_eq!((commit.partition, commit.revision), (P, revision));
    }
    assert_eq!(commit_of(&mut late).await.partition, Partition::Accounts);
}

/// Eight writers, watches that start before, amid and after: each sees each commit once.
pub(crate) async fn watches_while_writers_race(store: Arc<dyn Store>) {
    const WRITERS: usize = 8;
    const COMMITS: usize = 100;
    let partitions = [P, Q, Partition::Keys];
    let watcher = |store: Arc<dyn Store>, total: usize| async move {
        let mut watch = store.watch(Cursor::default()).await.unwrap();
        let mut at = BTreeMap::<_, u64>::new();
        let mut seen = BTreeMap::<_, BTreeMap<String, Bytes>>::new();
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..total {
            let commit = commit_of(&mut watch).await;
            let revision = at.entry(commit.partition).or_default();
            *revision += 1;
            assert_eq!(
                commit.revision, *revision,
                "in order, none lost, none doubled"
            );
            apply(seen.entry(commit.partition).or_default(), &commit);
            assert!(answered.insert((
                commit.partition,
                commit.revision,
                commit.changes[0].clone()
            )));
        }
        (seen, answered, watch)
    };
    let total = WRITERS * COMMITS;
    let mut watchers = vec![tokio::spawn(watcher(Arc::clone(&store), total))];
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut answered = Vec::new();
                for n in 0..COMMITS {
                    let partition = partitions[(writer + n) % partitions.len()];
                    let value = Bytes::from(format!("{writer} {n}"));
                    let key = if n % 3 == 0 {
                        "all".to_owned()
                    } else {
                        format!("of {writer}")
                    };
                    let revision = store
                        .commit(partition, vec![put(&key, Expect::Anything, value.clone())])
                        .await
                        .unwrap();
                    answered.push((partition, revision, (key, Some(value))));
                }
                answered
            })
        })
        .collect();
    let mut answered = std::collections::BTreeSet::new();
    for (at, writer) in writers.into_iter().enumerate() {
        if at % 3 == 0 {
            watchers.push(tokio::spawn(watcher(Arc::clone(&store), total)));
        }
        answered.extend(writer.await.unwrap());
    }
    watchers.push(tokio::spawn(watcher(Arc::clone(&store), total)));
    assert_eq!(answered.len(), total);
    for watcher in watchers {
        let (seen, heard, mut watch) = watcher.await.unwrap();
        assert!(heard == answered, "the feed is what was acknowledged");
        for partition in partitions {
            assert_eq!(
                seen[&partition],
                contents(&store, partition).await,
                "the last write wins"
            );
        }
        // The others' last words come before this watch's.
        let last = store
            .commit(Partition::Accounts, vec![put("end", Expect::Anything, "")])
            .await
            .unwrap();
        while commit_of(&mut watch).await.revision != last {}
    }
}

/// A watcher that is told of each commit before the next is made stays on the live path.
pub(crate) async fn hands_on_every_change(store: Arc<dyn Store>) {
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    for n in 1..=50_u64 {
        let revision = store
            .commit(P, vec![put("k", Expect::Anything, n.to_string())])
            .await
            .unwrap();
        let commit = commit_of(&mut watch).await;
        assert_eq!((commit.partition, commit.revision, revision), (P, n, n));
        assert_eq!(
            *commit.changes,
            [("k".into(), Some(Bytes::from(n.to_string())))]
        );
        // What a watch has told can be read.
        assert!(store.get(P, "k").await.unwrap().unwrap().revision >= n);
    }
}

/// A watch that sleeps for longer than anyone would buffer for it, but not for too long.
pub(crate) async fn catches_up_when_slow(store: Arc<dyn Store>) {
    const COMMITS: u64 = 1500;
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    assert_drained(&store, &mut watch).await;
    let many =
        (0..COMMITS).map(|n| store.commit(P, vec![put("k", Expect::Anything, n.to_string())]));
    for outcome in join_all(many).await {
        outcome.unwrap();
    }
    for expected in 1..=COMMITS {
        let commit = commit_of(&mut watch).await;
        assert_eq!((commit.partition, commit.revision), (P, expected));
    }
    assert_drained(&store, &mut watch).await;
}

pub(crate) async fn counts_exactly(store: Arc<dyn Store>) {
    const WRITERS: u64 = 8;
    const EACH: u64 = 25;
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut conflicts = 0;
                let mut done = 0;
                while done < EACH {
                    let (expect, now) = match store.get(P, "counter").await.unwrap() {
                        None => (Expect::Absent, 0),
                        Some(r) => (
                            Expect::Revision(r.revision),
                            std::str::from_utf8(&r.value)
                                .unwrap()
                                .parse::<u64>()
                                .unwrap(),
                        ),
                    };
                    match store
                        .commit(P, vec![put("counter", expect, (now + 1).to_string())])
                        .await
                    {
                        Ok(_) => done += 1,
                        Err(StoreError::Conflict { .. }) => conflicts += 1,
                        Err(other) => panic!("{other}"),
                    }
                }
                conflicts
            })
        })
        .collect();
    let mut conflicts = 0;
    for writer in writers {
        conflicts += writer.await.unwrap();
    }
    assert_eq!(
        value(&store, P, "counter").await.unwrap(),
        (WRITERS * EACH).to_string()
    );
    assert_eq!(listed(&store, P, "").await.1, WRITERS * EACH);
    assert!(conflicts > 0, "the writers did race");
}

/// A commit whose caller went away is carried out whole or not at all, and blocks nobody.
pub(crate) async fn outlives_dropped_futures(store: Arc<dyn Store>) {
    for n in 0..100 {
        let changes = vec![
            put(&format!("a{n}"), Expect::Absent, "x"),
            put(&format!("b{n}"), Expect::Absent, "x"),
        ];
        let commit = store.commit(P, changes);
        tokio::select! {
            biased;
            outcome = commit => { outcome.unwrap(); }
            () = async { for _ in 0..n % 4 { tokio::task::yield_now().await; } } => {}
        }
    }
    let revision = store
        .commit(P, vec![put("end", Expect::Absent, "x")])
        .await
        .unwrap();
    let seen = contents(&store, P).await;
    for n in 0..100 {
        assert_eq!(
            seen.contains_key(&format!("a{n}")),
            seen.contains_key(&format!("b{n}"))
        );
    }
    assert_eq!(seen.len() as u64, 2 * (revision - 1) + 1, "each one once");
}

pub(crate) async fn watch_futures_may_be_dropped(store: Arc<dyn Store>) {
    let mut watch = store.watch(Cursor::default()).await.unwrap();
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..100_u64 {
                store
                    .commit(P, vec![put("k", Expect::Anything, n.to_string())])
                    .await
                    .unwrap();
            }
        })
    };
    let mut next = 1;
    while next <= 100 {
        let heard = tokio::select! {
            biased;
            heard = watch.next() => Some(heard.unwrap()),
            () = tokio::task::yield_now() => None,
        };
        match heard {
            None => {}
            Some(Event::Commit(commit)) => {
                assert_eq!(commit.revision, next);
                next += 1;
            }
            Some(Event::FellBehind) => panic!("fell behind"),
        }
    }
    writer.await.unwrap();
    assert_drained(&store, &mut watch).await;
}

pub(crate) async fn refuses_cursors_of_the_future(store: Arc<dyn Store>) {
    store
        .commit(P, vec![put("k", Expect::Absent, "1")])
        .await
        .unwrap();
    for cursor in [(P, 2), (P, 1000), (Q, 1)] {
        let mut watch = store.watch(at(&store, [cursor]).await).await.unwrap();
        // Of other partitions it may tell before.
        while event(&mut watch).await != Event::FellBehind {}
    }
}

pub(crate) async fn refuses_cursors_of_another_life(store: Arc<dyn Store>) {
    for n in 0..3 {
        let change = put("k", Expect::Anything, n.to_string());
        store.commit(P, vec![change]).await.unwrap();
    }
    // The present revision too, after which nothing may ever come that would show the mistake.
    for (partition, revision) in [(P, 0), (P, 1), (P, 3), (P, 4), (Q, 0)] {
        let mut cursor = at(&store, [(partition, revision)]).await;
        for position in cursor.0.values_mut() {
            position.incarnation ^= 1;
        }
        let mut watch = store.watch(cursor).await.unwrap();
        // Of other partitions it may tell before.
        while event(&mut watch).await != Event::FellBehind {}
    }
}

pub(crate) async fn goes_on_in_one_life(store: Arc<dyn Store>) {
    let (_, before) = store.list(P, "").await.unwrap();
    store
        .commit(P, vec![put("k", Expect::Absent, "1")])
        .await
        .unwrap();
    let (_, after) = store.list(P, "k").await.unwrap();
    assert_eq!(
        (before.incarnation, before.revision + 1),
        (after.incarnation, after.revision)
    );
    let mut watch = store.watch(Cursor([(P, before)].into())).await.unwrap();
    assert_eq!(commit_of(&mut watch).await.revision, 1);
}

/// `feed` is how many commits of a partition the feed keeps at most.
pub(crate) async fn says_when_a_watch_fell_behind(store: Arc<dyn Store>, feed: usize) {
    store
        .commit(Q, vec![put("k", Expect::Absent, "q")])
        .await
        .unwrap();
    let mut slow = store.watch(Cursor::default()).await.unwrap();
    let mut written = 0;
    while written < 2 * feed {
        let some = (0..500).map(|n| {
            store.commit(
                P,
                vec![put(
                    &(n % 50).to_string(),
                    Expect::Anything,
                    (written + n).to_string(),
                )],
            )
        });
        join_all(some).await.into_iter().for_each(|r| {
            r.unwrap();
        });
        written += 500;
    }
    // A watch that did not keep up is told so, and not given a feed with a hole.
    let mut expected = 1;
    loop {
        match event(&mut slow).await {
            Event::Commit(commit) if commit.partition == P => {
                assert_eq!(commit.revision, expected);
                expected += 1;
            }
            Event::Commit(_) => {}
            Event::FellBehind => break,
        }
    }
    let mut fresh = store.watch(at(&store, [(Q, 1)]).await).await.unwrap();
    assert_eq!(event(&mut fresh).await, Event::FellBehind);
    // Listing and watching from there brings it up to date, whatever is written meanwhile.
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..50 {
                store
                    .commit(
                        P,
                        vec![put(&n.to_string(), Expect::Anything, format!("late {n}"))],
                    )
                    .await
                    .unwrap();
            }
        })
    };
    let mut cursor = Cursor::default();
    let mut seen = BTreeMap::new();
    for partition in Partition::all() {
        let (records, position) = store.list(partition, "").await.unwrap();
        cursor.0.insert(partition, position);
        if partition == P {
            seen = records.into_iter().map(|r| (r.key, r.value)).collect();
        }
    }
    let mut at = cursor.0[&P].revision;
    let mut watch = store.watch(cursor).await.unwrap();
    writer.await.unwrap();
    while at < written as u64 + 50 {
        let commit = commit_of(&mut watch).await;
        at += 1;
        assert_eq!((commit.partition, commit.revision), (P, at));
        apply(&mut seen, &commit);
    }
    assert_eq!(seen, contents(&store, P).await);
}
