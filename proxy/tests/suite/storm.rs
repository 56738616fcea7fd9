//! Many callers, some of whom leave, and instances that are killed meanwhile.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use rand::{
    RngExt,
    rngs::StdRng,
    seq::{IndexedRandom, index},
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    instance::{self, Book},
    support::{Function, SOON, Server, eventually, kill, pid, random, rest},
};

const CALLERS: usize = 2000;
const INSTANCES: u32 = 3;
const CAPACITY: u32 = 2;
const KILLS: usize = 8;

/// Each caller is a connection of this process.
fn open_files(needed: u64) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|now| now < needed) {
        let raised = Rlimit {
            current: Some(needed),
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, raised).unwrap();
    }
}

struct Caller {
    number: usize,
    work_ms: u64,
    leaves_after: Option<Duration>,
}

impl Caller {
    fn random(number: usize, rng: &mut StdRng) -> Self {
        let leaves = number.is_multiple_of(3);
        Self {
            number,
            work_ms: rng.random_range(20..50),
            leaves_after: leaves.then(|| Duration::from_millis(rng.random_range(0..9000))),
        }
    }

    /// Everything that it was answered, unless it left.
    async fn call(&self, server: &Server, function: &Function) -> Option<String> {
        let line = format!("POST /work?ms={}&caller={}", self.work_ms, self.number);
        let head = server.head(function, &line);
        let head = format!("{head}connection: close\r\ncontent-length: 5\r\n\r\nhello");
        let mut stream = server.send(head.as_bytes()).await;
        let answer = rest(&mut stream);
        match self.leaves_after {
            Some(after) => timeout(after, answer).await.ok(),
            None => Some(answer.await),
        }
    }
}

/// When each process was killed.
type Deaths = HashMap<u32, Duration>;

/// Kills a ready instance each time that so many callers have their answer or have left.
async fn kill_after(
    server: &Server,
    function: &Function,
    rng: &mut StdRng,
    ended: &AtomicUsize,
) -> Deaths {
    let mut moments = index::sample(rng, CALLERS * 9 / 10, KILLS).into_vec();
    moments.sort_unstable();
    println!("killed after {moments:?} callers");
    let mut deaths = Deaths::new();
    for moment in moments {
        eventually("so many ended", SOON * 3, async || {
            (ended.load(Ordering::SeqCst) >= moment).then_some(())
        })
        .await;
        let victim = eventually("an instance is ready", SOON, async || {
            let ready = server.instances(function, "ready").await;
            let alive: Vec<u32> = ready
                .iter()
                .map(pid)
                .filter(|pid| !deaths.contains_key(pid))
                .collect();
            alive.choose(rng).copied()
        })
        .await;
        kill(victim, Signal::KILL);
        deaths.insert(victim, instance::now());
    }
    deaths
}

#[tokio::test]
async fn no_storm_overloads_an_instance_leaks_a_slot_or_leaves_one_idle() {
    open_files(2 * CALLERS as u64);
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let function = server.bookkeeper(directory.path()).await;
    let queue = json!({ "queue": { "maxRequests": 2 * CALLERS } });
    server
        .deploy(&function, (INSTANCES, INSTANCES, CAPACITY), queue)
        .await;

    let mut rng = random();
    let callers: Vec<Caller> = (0..CALLERS)
        .map(|number| Caller::random(number, &mut rng))
        .collect();
    let ended = AtomicUsize::new(0);
    let calls = callers.iter().map(async |caller| {
        let answer = caller.call(&server, &function).await;
        ended.fetch_add(1, Ordering::SeqCst);
        answer
    });
    let (answers, deaths) = tokio::join!(
        join_all(calls),
        kill_after(&server, &function, &mut rng, &ended)
    );

    server.until_busy(&function, 0).await;
    assert_eq!(server.queue_depth(&function).await, 0);
    eventually("all instances are ready again", SOON, async || {
        let ready = server.instances(&function, "ready").await;
        (ready.len() == INSTANCES as usize && ready.iter().all(|i| !deaths.contains_key(&pid(i))))
            .then_some(())
    })
    .await;
    let books = instance::books(directory.path());
    assert_eq!(
        books.len(),
        INSTANCES as usize + KILLS,
        "one process more for each killed"
    );
    for book in &books {
        println!("at most {} in flight at {}", book.highest(), book.pid);
        assert!(
            book.highest() <= CAPACITY as usize,
            "{} in flight at {}",
            book.highest(),
            book.pid
        );
    }
    each_has_one_answer(&callers, &answers, &books, &deaths);
    slots_were_used(&books, &deaths);
}

/// Of those that stayed: what it asked for, or that it was lost with its instance. Nobody's work is done twice.
fn each_has_one_answer(
    callers: &[Caller],
    answers: &[Option<String>],
    books: &[Book],
    deaths: &Deaths,
) {
    let mut was_on: HashMap<&str, Vec<u32>> = HashMap::new();
    for book in books {
        for entry in book.entries.iter().filter(|entry| entry.came) {
            was_on.entry(&entry.caller).or_default().push(book.pid);
        }
    }
    let (mut served, mut lost, mut left) = (0, 0, 0);
    for (caller, answer) in callers.iter().zip(answers) {
        let was_on = was_on
            .get(caller.number.to_string().as_str())
            .map_or(&[][..], |on| on);
        assert!(
            was_on.len() <= 1,
            "caller {} was on {was_on:?}",
            caller.number
        );
        let Some(answer) = answer else {
            assert!(caller.leaves_after.is_some());
            left += 1;
            continue;
        };
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            1,
            "one answer: {answer}"
        );
        if answer.starts_with("HTTP/1.1 200 ") {
            assert!(answer.ends_with("\r\n\r\ndone"), "{answer}");
            assert_eq!(was_on.len(), 1);
            served += 1;
        } else {
            assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
            assert!(
                answer.contains("x-weir-error: instance-lost\r\n"),
                "{answer}"
            );
            // It may have been sent and not been read.
            assert!(
                was_on.iter().all(|pid| deaths.contains_key(pid)),
                "caller {} was on {was_on:?}",
                caller.number
            );
            lost += 1;
        }
    }
    println!("{served} served, {lost} lost with their instance, {left} left");
    assert!(left > 50, "{left} left");
    // Those on it, and those that came when its connections were closed and its listener not yet.
    assert!(lost <= 2 * KILLS * CAPACITY as usize, "{lost} lost");
}

/// While there were callers, slots that were alive were at work: the makespan is at most 1.4 times the time that the
/// work would take if it filled them.
fn slots_were_used(books: &[Book], deaths: &Deaths) {
    let entries = || {
        books
            .iter()
            .flat_map(|book| &book.entries)
            .map(|entry| entry.at)
    };
    let (start, end) = (entries().min().unwrap(), entries().max().unwrap());
    let makespan = end - start;
    let (mut alive, mut worked) = (Duration::ZERO, Duration::ZERO);
    for book in books {
        let end = deaths.get(&book.pid).map_or(end, |death| *death.min(&end));
        alive += end.saturating_sub(book.since.max(start)) * CAPACITY;
        worked += book.worked(end);
    }
    let slots = alive.div_duration_f64(makespan);
    let ratio = alive.div_duration_f64(worked);
    println!(
        "{worked:.1?} of work on {slots:.2} slots took {makespan:.1?}, {ratio:.3} times what it had to"
    );
    assert!(ratio <= 1.4, "{ratio}");
}
