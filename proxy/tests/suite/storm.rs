//! Many callers, some of whom leave, and an instance that is killed meanwhile.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    instance,
    support::{SOON, Server, eventually, kill, pid, rest},
};

const CALLERS: usize = 2000;
const CAPACITY: u32 = 2;
/// The instance is killed when so many have been answered.
const KILL_AFTER: usize = 100;

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
    work_ms: u64,
    leaves_after: Option<Duration>,
}

#[tokio::test]
async fn no_storm_overloads_an_instance_or_leaks_a_slot() {
    open_files(2 * CALLERS as u64);
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let (name, value) = instance::env(books.path());
    let command = instance::command();
    let command = command.each_ref().map(String::as_str);
    let function = server.function(&command, &[(name, &value)]).await;
    let queue = json!({ "queue": { "maxRequests": 2 * CALLERS } });
    server.deploy(&function, (3, 3, CAPACITY), queue).await;
    let victim = pid(&server.ready(&function, 3).await[1]);

    let mut rng = StdRng::seed_from_u64(7);
    let callers = (0..CALLERS).map(|i| Caller {
        work_ms: rng.random_range(2..40),
        leaves_after: (i % 3 == 0).then(|| Duration::from_millis(rng.random_range(0..7000))),
    });
    let callers: Vec<Caller> = callers.collect();
    let ended = AtomicUsize::new(0);
    let answers = join_all(callers.iter().map(async |caller| {
        let head = server.head(&function, &format!("POST /work?ms={}", caller.work_ms));
        let head = format!("{head}connection: close\r\ncontent-length: 5\r\n\r\nhello");
        let mut stream = server.send(head.as_bytes()).await;
        let answer = rest(&mut stream);
        let answer = match caller.leaves_after {
            Some(after) => timeout(after, answer).await.ok(),
            None => Some(answer.await),
        };
        drop(stream);
        if ended.fetch_add(1, Ordering::SeqCst) + 1 == KILL_AFTER {
            kill(victim, Signal::KILL);
        }
        answer
    }))
    .await;

    let (mut served, mut lost) = (0, 0);
    for (caller, answer) in callers.iter().zip(&answers) {
        let Some(answer) = answer else {
            assert!(caller.leaves_after.is_some());
            continue;
        };
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            1,
            "one answer: {answer}"
        );
        if answer.starts_with("HTTP/1.1 200 ") {
            assert!(answer.ends_with("\r\n\r\ndone"), "{answer}");
            served += 1;
        } else {
            assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
            assert!(
                answer.contains("x-weir-error: instance-lost\r\n"),
                "{answer}"
            );
            lost += 1;
        }
    }
    let left = answers.iter().filter(|answer| answer.is_none()).count();
    println!("{served} served, {lost} lost with their instance, {left} left");
    assert!(left > 50 && lost < 20, "{left} left, {lost} lost");

    server.until_busy(&function, 0).await;
    assert_eq!(server.queue_depth(&function).await, 0);
    eventually("three instances are ready again", SOON, async || {
        let ready = server.instances(&function, "ready").await;
        (ready.len() == 3 && ready.iter().all(|i| pid(i) != victim)).then_some(())
    })
    .await;
    let highest = instance::highest(books.path());
    println!("the most in flight, by process: {highest:?}");
    assert!(highest.len() >= 3);
    let most = u32::try_from(*highest.iter().max().unwrap()).unwrap();
    assert_eq!(most, CAPACITY, "{highest:?}");
}
