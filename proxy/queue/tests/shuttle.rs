//! A few threads in all their interleavings up to a bound, then in chosen ones.
//!
//! A lost wake-up shows as a deadlock, which the checker reports with the
//! schedule that led there. Run with `--features shuttle`.
#![cfg(feature = "shuttle")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use weir_queue::{
    Ask, Entered, InstanceKey, Limits, Preference, Queue as WeirQueue, Refused, Slot, Waiting,
};

type Queue = WeirQueue<InstanceKey, Connection>;
type Outcome = Result<Slot<InstanceKey, Connection>, Refused>;

/// Counts itself, so that a leak is seen.
struct Connection(Arc<AtomicUsize>);

impl Connection {
    fn open(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const DFS: Option<usize> = Some(20_000);
const RANDOM: usize = 3_000;
const PCT_DEPTH: usize = 3;

/// Depth first up to a bound, which only the smallest case stays below; then
/// at random, and with few preemptions at random places.
fn check(case: fn()) {
    shuttle::check_dfs(case, DFS);
    check_at_random(case);
}

fn check_at_random(case: fn()) {
    shuttle::check_random(case, RANDOM);
    shuttle::check_pct(case, RANDOM, PCT_DEPTH);
}

fn queue(capacity: usize) -> Arc<Queue> {
    let limits = Limits {
        max_requests: 100,
        max_bytes: 100,
    };
    let queue = Queue::new(limits, || Duration::ZERO);
    if capacity > 0 {
        queue.put_instance(1, 1, capacity);
    }
    queue
}

fn ask(request: u128) -> Ask {
    Ask {
        request,
        priority: 5,
        account: request as u64 % 2,
        arrival: Duration::ZERO,
        preference: Preference::LeastLoaded,
        home: 0,
    }
}

fn take(queue: &Arc<Queue>, request: u128) -> Outcome {
    match queue.enter(ask(request)) {
        Entered::Slot(slot) => Ok(slot),
        Entered::Waiting(waiting) => block_on(waiting),
        Entered::Refused(refused) => Err(refused),
    }
}

fn held(queue: &Arc<Queue>, request: u128) -> Slot<InstanceKey, Connection> {
    match queue.enter(ask(request)) {
        Entered::Slot(slot) => slot,
        other => panic!("no slot but {other:?}"),
    }
}

fn in_line(queue: &Arc<Queue>, request: u128) -> Waiting<InstanceKey, Connection> {
    match queue.enter(ask(request)) {
        Entered::Waiting(waiting) => waiting,
        other => panic!("not waiting but {other:?}"),
    }
}

fn poll_once(waiting: &mut Waiting<InstanceKey, Connection>) -> Poll<Outcome> {
    Pin::new(waiting).poll(&mut Context::from_waker(Waker::noop()))
}

/// In one reading: nobody waits beside a free slot.
fn nothing_idles(queue: &Queue) {
    let load = queue.load();
    assert!(load.queued == 0 || load.busy >= load.capacity, "{load:?}");
}

fn all_is_back(queue: &Arc<Queue>) {
    let load = queue.load();
    assert_eq!((load.queued, load.queued_bytes, load.busy), (0, 0, 0));
    assert_eq!(Arc::strong_count(queue), 1);
}

fn run(threads: Vec<Box<dyn FnOnce() + Send>>) {
    let handles: Vec<_> = threads.into_iter().map(thread::spawn).collect();
    for handle in handles {
        handle.join().unwrap();
    }
}

macro_rules! at_once {
    ($queue:ident: $($body:block)*) => {
        run(vec![$({
            let $queue = Arc::clone(&$queue);
            Box::new(move || {
                // Not every body names it.
                let _ = &$queue;
                $body
            })
        }),*])
    };
}

#[test]
fn each_gets_its_turn_on_one_slot() {
    check(|| {
        let queue = queue(1);
        at_once!(queue:
            { drop(take(&queue, 1).unwrap()) }
            { drop(take(&queue, 2).unwrap()) }
            { nothing_idles(&queue) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn never_more_in_flight_than_capacity() {
    check_at_random(|| {
        let queue = queue(2);
        let (flying, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let threads = (0..4).map(|request| {
            let (queue, flying, open) =
                (Arc::clone(&queue), Arc::clone(&flying), Arc::clone(&open));
            Box::new(move || {
                let mut slot = take(&queue, request).unwrap();
                let connection = slot.take_connection();
                let connection = connection.unwrap_or_else(|| Connection::open(&open));
                assert!(flying.fetch_add(1, Ordering::Relaxed) < 2);
                assert!(open.load(Ordering::Relaxed) <= 2);
                thread::yield_now();
                nothing_idles(&queue);
                flying.fetch_sub(1, Ordering::Relaxed);
                slot.release_with(connection);
            }) as Box<dyn FnOnce() + Send>
        });
        run(threads.collect());
        all_is_back(&queue);
        drop(queue);
        assert_eq!(open.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn one_cancelled_before_or_after_its_grant_passes_it_on() {
    check(|| {
        let queue = queue(1);
        let slot = held(&queue, 1);
        let first = in_line(&queue, 2);
        let second = in_line(&queue, 3);
        at_once!(queue:
            { drop(slot); nothing_idles(&queue) }
            { drop(first); nothing_idles(&queue) }
            { drop(block_on(second).unwrap()); nothing_idles(&queue) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn one_that_polls_and_leaves_passes_it_on() {
    check(|| {
        let queue = queue(1);
        let slot = held(&queue, 1);
        let mut first = in_line(&queue, 2);
        let second = in_line(&queue, 3);
        at_once!(queue:
            { drop(slot) }
            // Leaves before the grant, before receipt or with the slot.
            { let _received = poll_once(&mut first); nothing_idles(&queue); drop(first) }
            { drop(block_on(second).unwrap()); nothing_idles(&queue) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn an_instance_lost_before_between_or_after_keeps_nobody_waiting() {
    check(|| {
        let queue = queue(1);
        let slot = held(&queue, 1);
        let mut first = in_line(&queue, 2);
        let second = in_line(&queue, 3);
        at_once!(queue:
            { drop(slot) }
            { let _received = poll_once(&mut first); drop(first); nothing_idles(&queue) }
            { queue.remove_instance(1); queue.put_instance(2, 2, 1); nothing_idles(&queue) }
            { drop(block_on(second).unwrap()) }
        );
        all_is_back(&queue);
        assert_eq!((queue.busy_of(1), queue.busy_of(2)), (None, Some(0)));
    });
}

#[test]
fn an_instance_lost_and_back_counts_what_it_still_does() {
    check(|| {
        let queue = queue(1);
        let flying = Arc::new(AtomicUsize::new(1));
        let slot = held(&queue, 1);
        let second = in_line(&queue, 2);
        let after = Arc::clone(&flying);
        at_once!(queue:
            { flying.fetch_sub(1, Ordering::Relaxed); drop(slot) }
            { queue.remove_instance(1); queue.put_instance(1, 1, 1) }
            {
                let slot = block_on(second).unwrap();
                assert_eq!(after.load(Ordering::Relaxed), 0);
                drop(slot);
                nothing_idles(&queue)
            }
        );
        all_is_back(&queue);
    });
}

#[test]
fn eject_and_restore_lose_no_wake_up() {
    check(|| {
        let queue = queue(1);
        at_once!(queue:
            { drop(take(&queue, 1).unwrap()) }
            { queue.eject(1); nothing_idles(&queue); queue.restore(1) }
            { drop(take(&queue, 2).unwrap()); nothing_idles(&queue) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn a_retired_instance_has_no_work_and_gets_none() {
    check(|| {
        let queue = queue(1);
        at_once!(queue:
            {
                if queue.retire_if_idle(1) {
                    assert_eq!(queue.busy_of(1), None);
                    queue.put_instance(2, 2, 1);
                }
            }
            { drop(take(&queue, 1).unwrap()) }
            { drop(take(&queue, 2).unwrap()); nothing_idles(&queue) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn the_first_instance_wakes_as_many_as_it_has_slots() {
    check(|| {
        let queue = queue(0);
        at_once!(queue:
            { queue.put_instance(1, 1, 1) }
            { drop(take(&queue, 1).unwrap()) }
            { queue.put_instance(1, 1, 2); nothing_idles(&queue) }
            { drop(take(&queue, 2).unwrap()) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn nobody_waits_on_a_closed_queue() {
    check(|| {
        let queue = queue(1);
        let slot = held(&queue, 1);
        at_once!(queue:
            { queue.close("deleted".into()) }
            { drop(slot) }
            { if let Err(refused) = take(&queue, 2) {
                assert_eq!(refused, Refused::Closed("deleted".into()));
            } }
            { drop(take(&queue, 3)) }
        );
        all_is_back(&queue);
    });
}

#[test]
fn a_waiter_moved_between_tasks_is_woken_in_the_last() {
    check(|| {
        let queue = queue(1);
        let slot = held(&queue, 1);
        let mut waiting = in_line(&queue, 2);
        at_once!(queue:
            { drop(slot); nothing_idles(&queue) }
            {
                let slot = match poll_once(&mut waiting) {
                    Poll::Ready(slot) => slot,
                    Poll::Pending => block_on(&mut waiting),
                };
                drop(slot.unwrap());
                nothing_idles(&queue)
            }
        );
        all_is_back(&queue);
    });
}

/// Requests that give up anywhere, while the fleet changes under them.
#[test]
fn storms_leave_nothing() {
    check_at_random(|| {
        let queue = queue(1);
        let open = Arc::new(AtomicUsize::new(0));
        let mut threads: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
        for thread in 0..3 {
            let (queue, open) = (Arc::clone(&queue), Arc::clone(&open));
            threads.push(Box::new(move || {
                for turn in 0..3 {
                    request(&queue, &open, thread * 10 + turn);
                }
            }));
        }
        let fleet = Arc::clone(&queue);
        threads.push(Box::new(move || {
            for _ in 0..6 {
                let key = thread_rng().gen_range(1..3);
                match thread_rng().gen_range(0..6) {
                    0 => fleet.put_instance(key, key, thread_rng().gen_range(0..3)),
                    1 => fleet.remove_instance(key),
                    2 => fleet.eject(key),
                    3 => fleet.restore(key),
                    4 => fleet.drain_instance(key),
                    _ => drop(fleet.retire_if_idle(key)),
                }
            }
            // So that those who stay to the end get their slot.
            fleet.put_instance(3, 3, 1);
        }));
        run(threads);
        all_is_back(&queue);
        drop(queue);
        assert_eq!(open.load(Ordering::Relaxed), 0);
    });
}

fn request(queue: &Arc<Queue>, open: &Arc<AtomicUsize>, request: u128) {
    let mut slot = match queue.enter(ask(request)) {
        Entered::Slot(slot) => slot,
        Entered::Waiting(mut waiting) => match thread_rng().gen_range(0..4) {
            0 => return,
            1 => {
                let _received = poll_once(&mut waiting);
                return;
            }
            _ => block_on(waiting).unwrap(),
        },
        Entered::Refused(refused) => panic!("{refused}"),
    };
    if thread_rng().gen_bool(0.5) {
        let connection = slot.take_connection();
        slot.release_with(connection.unwrap_or_else(|| Connection::open(open)));
    }
}
