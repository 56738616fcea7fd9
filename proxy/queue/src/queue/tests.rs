use std::cell::Cell;
use std::pin::Pin;
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Wake};

use super::*;

type Plain = Arc<Queue<&'static str, u32>>;

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn now() -> Duration {
    NOW.get()
}

fn pass(millis: u64) {
    NOW.set(now() + Duration::from_millis(millis));
}

const LIMITS: Limits = Limits {
    max_requests: 100_000,
    max_bytes: 1_000,
};

fn queue() -> Plain {
    Queue::new(LIMITS, now)
}

fn ask(request: u128) -> Ask {
    Ask {
        request,
        priority: 5,
        account: 1,
        arrival: now(),
        preference: Preference::LeastLoaded,
        home: 0,
    }
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Woken {
    fn times(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll<T: Clone, C>(
    waiting: &mut Waiting<T, C>,
    woken: &Arc<Woken>,
) -> Poll<Result<Slot<T, C>, Refused>> {
    let waker = Waker::from(Arc::clone(woken));
    Pin::new(waiting).poll(&mut Context::from_waker(&waker))
}

fn poll_once<T: Clone, C>(waiting: &mut Waiting<T, C>) -> Poll<Result<Slot<T, C>, Refused>> {
    poll(waiting, &Arc::default())
}

fn received<T: Clone, C>(waiting: &mut Waiting<T, C>) -> Slot<T, C> {
    match poll_once(waiting) {
        Poll::Ready(Ok(slot)) => slot,
        other => panic!("no slot but {other:?}"),
    }
}

fn at_once<T: Clone, C>(entered: Entered<T, C>) -> Slot<T, C> {
    match entered {
        Entered::Slot(slot) => slot,
        other => panic!("no slot but {other:?}"),
    }
}

fn in_line<T: Clone, C>(entered: Entered<T, C>) -> Waiting<T, C> {
    match entered {
        Entered::Waiting(waiting) => waiting,
        other => panic!("not waiting but {other:?}"),
    }
}

fn refused<T: Clone, C>(entered: Entered<T, C>) -> Refused {
    match entered {
        Entered::Refused(refused) => refused,
        other => panic!("not refused but {other:?}"),
    }
}

#[test]
fn a_free_slot_is_taken_at_once_and_given_back() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    let slot = at_once(queue.enter(ask(1)));
    assert_eq!((*slot.target(), slot.instance()), ("one", 1));
    assert!(!slot.was_queued());
    assert_eq!(queue.busy_of(1), Some(1));
    drop(slot);
    assert_eq!(queue.busy_of(1), Some(0));
    assert_eq!(queue.busy_of(2), None);
}

#[test]
fn a_freed_slot_wakes_one_waiter_only() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    let slot = at_once(queue.enter(ask(1)));
    let (woken_a, woken_b) = (Arc::default(), Arc::default());
    let mut a = in_line(queue.enter(ask(2)));
    let mut b = in_line(queue.enter(ask(3)));
    assert!((a.first(), b.first()) == (true, false) && !a.cold());
    assert!(poll(&mut a, &woken_a).is_pending() && poll(&mut b, &woken_b).is_pending());
    drop(slot);
    assert_eq!((woken_a.times(), woken_b.times()), (1, 0));
    assert_eq!((queue.position(2), queue.position(3)), (None, Some(0)));
    let slot = received(&mut a);
    assert!(slot.was_queued());
    drop(slot);
    assert_eq!(woken_b.times(), 1);
}

#[test]
fn a_moved_waiter_is_woken_where_it_was_last_polled() {
    let queue = queue();
    let mut waiting = in_line(queue.enter(ask(1)));
    let (old, new) = (Arc::default(), Arc::default());
    assert!(poll(&mut waiting, &old).is_pending());
    assert!(poll(&mut waiting, &new).is_pending());
    assert_eq!(Arc::strong_count(&old), 1, "the old waker is let go");
    queue.put_instance(1, "one", 1);
    assert_eq!((old.times(), new.times()), (0, 1));
}

#[test]
fn a_granted_slot_nobody_received_goes_to_the_next() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    let mut slot = at_once(queue.enter(ask(1)));
    assert_eq!(slot.take_connection(), None);
    let a = in_line(queue.enter(ask(2)));
    let mut b = in_line(queue.enter(ask(3)));
    slot.release_with(77);
    drop(a);
    let mut slot = received(&mut b);
    assert_eq!(slot.take_connection(), Some(77), "and its connection too");
    drop(slot);
    assert_eq!(queue.load().busy, 0);
}

#[test]
fn leaving_the_line_leaves_nothing() {
    let queue = queue();
    let mut a = in_line(queue.enter(ask(2)));
    assert!(a.cold());
    a.add_bytes(10).unwrap();
    drop(a);
    let load = queue.load();
    assert_eq!((load.queued, load.queued_bytes, load.arrivals), (0, 0, 1));
    assert_eq!(queue.position(2), None);
    queue.put_instance(1, "one", 1);
    assert_eq!(queue.busy_of(1), Some(0));
}

#[test]
fn the_line_is_bounded_in_requests() {
    let queue = queue();
    queue.set_limits(Limits {
        max_requests: 1,
        max_bytes: 0,
    });
    let waiting = in_line(queue.enter(ask(1)));
    let full = Refused::Full {
        requests: true,
        limit: 1,
    };
    assert_eq!(refused(queue.enter(ask(2))), full);
    drop(waiting);
    drop(in_line(queue.enter(ask(2))));
}

#[test]
fn the_line_is_bounded_in_bytes() {
    let queue = queue();
    let full = Err(Refused::Full {
        requests: false,
        limit: 1_000,
    });
    let mut a = in_line(queue.enter(ask(1)));
    let mut b = in_line(queue.enter(ask(2)));
    a.add_bytes(600).unwrap();
    b.add_bytes(300).unwrap();
    assert_eq!(b.spare_bytes(), 100);
    assert_eq!(b.add_bytes(101), full);
    assert_eq!(b.add_bytes(u64::MAX), full);
    queue.put_instance(1, "one", 1);
    assert_eq!(queue.load().queued_bytes, 300, "the granted ones are gone");
    assert_eq!(a.add_bytes(5_000), Ok(()));
    assert_eq!(queue.load().queued_bytes, 300);
    queue.close("shut".into());
    assert_eq!(queue.load().queued_bytes, 0);
    assert_eq!(b.add_bytes(1), Err(Refused::Closed("shut".into())));
}

#[test]
fn closing_refuses_the_present_and_the_later() {
    let queue = queue();
    let woken = Arc::default();
    let mut waiting = in_line(queue.enter(ask(1)));
    assert!(poll(&mut waiting, &woken).is_pending());
    queue.close("deleted".into());
    queue.close("again".into());
    assert_eq!(woken.times(), 1);
    let why = Refused::Closed("deleted".into());
    assert_eq!(
        poll_once(&mut waiting).map(Result::err),
        Poll::Ready(Some(why.clone()))
    );
    assert_eq!(refused(queue.enter(ask(2))), why);
    assert_eq!(queue.load().queued, 0);
}

#[test]
fn failing_the_waiters_keeps_the_queue_and_the_granted() {
    let queue = queue();
    let mut a = in_line(queue.enter(ask(1)));
    let mut b = in_line(queue.enter(ask(2)));
    queue.put_instance(1, "one", 1);
    queue.fail_waiters("no start".into());
    assert!(matches!(
        poll_once(&mut b),
        Poll::Ready(Err(Refused::Closed(_)))
    ));
    drop(received(&mut a));
    drop(at_once(queue.enter(ask(3))));
}

#[test]
fn a_lowered_capacity_binds_new_grants() {
    let queue = queue();
    queue.put_instance(1, "one", 2);
    let a = at_once(queue.enter(ask(1)));
    let b = at_once(queue.enter(ask(2)));
    queue.put_instance(1, "one", 1);
    let mut waiting = in_line(queue.enter(ask(3)));
    a.release_with(1);
    assert!(poll_once(&mut waiting).is_pending());
    assert_eq!(queue.instances()[0].idle_connections, 0);
    drop(b);
    assert!(poll_once(&mut waiting).is_ready());
}

#[test]
fn a_lowered_capacity_drops_surplus_idle_connections() {
    let queue = queue();
    queue.put_instance(1, "one", 4);
    let slots: Vec<_> = (0..4).map(|id| at_once(queue.enter(ask(id)))).collect();
    for (connection, slot) in (0..).zip(slots) {
        slot.release_with(connection);
    }
    assert_eq!(queue.instances()[0].idle_connections, 4);
    queue.put_instance(1, "one", 1);
    assert_eq!(queue.instances()[0].idle_connections, 1);
    let taken = at_once(queue.enter(ask(9))).take_connection();
    assert_eq!(taken, Some(3), "the last used stays");
}

#[test]
fn a_connection_of_the_same_core_is_preferred_and_a_new_one_next() {
    let queue = queue();
    queue.put_instance(1, "one", 3);
    let on = |home: usize| {
        at_once(queue.enter(Ask {
            home,
            ..ask(home as u128)
        }))
    };
    let (a, b) = (on(1), on(2));
    a.release_with(11);
    b.release_with(22);
    assert_eq!(on(1).take_connection(), Some(11));
    // That one was taken and dropped: room for one more, so none of core 2's.
    let mut new = on(3);
    assert_eq!(new.take_connection(), None);
    new.release_with(33);
    let mut held = on(4);
    assert_eq!(held.take_connection(), None, "2 idle of 3: make one");
    assert_eq!(on(4).take_connection(), Some(33), "full: the last used");
    held.release_with(44);
}

#[test]
fn draining_is_ended_by_put_and_not_by_restore() {
    let queue = queue();
    queue.put_instance(1, "one", 2);
    let slot = at_once(queue.enter(ask(1)));
    queue.drain_instance(1);
    let mut waiting = in_line(queue.enter(ask(2)));
    assert!(waiting.cold());
    assert!(!queue.retire_if_idle(1), "busy");
    queue.restore(1);
    assert!(poll_once(&mut waiting).is_pending());
    assert!(queue.instances()[0].draining);
    queue.put_instance(1, "one", 2);
    drop(received(&mut waiting));
    drop(slot);
    assert!(queue.retire_if_idle(1));
    assert!(!queue.retire_if_idle(1), "gone");
    assert_eq!((queue.busy_of(1), queue.instances().len()), (None, 0));
}

#[test]
fn a_granted_slot_nobody_received_keeps_its_instance_from_retiring() {
    let queue = queue();
    let waiting = in_line(queue.enter(ask(1)));
    queue.put_instance(1, "one", 1);
    assert!(!queue.retire_if_idle(1));
    drop(waiting);
    assert!(queue.retire_if_idle(1));
}

#[test]
fn an_ejected_instance_gets_nothing_until_restored() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    at_once(queue.enter(ask(1))).release_with(5);
    queue.eject(1);
    assert!(queue.instances()[0].ejected);
    assert_eq!(queue.instances()[0].idle_connections, 0);
    let mut waiting = in_line(queue.enter(ask(2)));
    queue.restore(1);
    drop(received(&mut waiting));
    queue.eject(9);
    queue.restore(9);
}

#[test]
fn what_a_lost_instance_still_does_counts_when_it_is_back() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    let slot = at_once(queue.enter(ask(1)));
    queue.remove_instance(1);
    assert_eq!((queue.instances().len(), queue.busy_of(1)), (0, Some(1)));
    let mut waiting = in_line(queue.enter(ask(2)));
    queue.put_instance(1, "again", 1);
    assert_eq!(*slot.target(), "one");
    assert!(poll_once(&mut waiting).is_pending());
    slot.release_with(3);
    let slot = received(&mut waiting);
    assert_eq!(*slot.target(), "again");
    queue.remove_instance(1);
    slot.release_with(4);
    assert_eq!(queue.busy_of(1), None);
}

#[test]
fn a_waiters_preference_is_honoured_among_free_ones() {
    let queue = queue();
    queue.put_instance(1, "one", 1);
    queue.put_instance(2, "two", 1);
    for _ in 0..20 {
        let slot = at_once(queue.enter(Ask {
            preference: Preference::Ranked([9, 2, 1].into()),
            ..ask(1)
        }));
        assert_eq!(*slot.target(), "two");
    }
}

#[test]
fn position_is_by_priority_and_arrival() {
    let queue = queue();
    pass(100);
    let join = |request, priority, arrival| {
        in_line(queue.enter(Ask {
            priority,
            arrival: Duration::from_millis(arrival),
            ..ask(request)
        }))
    };
    let _waiting = [join(1, 5, 7), join(2, 5, 3), join(3, 9, 0), join(4, 0, 99)];
    let positions = [1, 2, 3, 4, 5].map(|request| queue.position(request));
    assert_eq!(positions, [Some(2), Some(1), Some(3), Some(0), None]);
}

#[test]
fn the_integral_and_the_phases_follow_the_clock() {
    pass(5_000);
    let queue = queue();
    let before = queue.load();
    let waiting = in_line(queue.enter(ask(1)));
    pass(2_000);
    queue.put_instance(1, "one", 1);
    let other = in_line(queue.enter(ask(2)));
    pass(1_000);
    let load = queue.load();
    assert_eq!(
        (load.busy, load.queued, load.capacity, load.ready_instances),
        (1, 1, 1, 1)
    );
    assert_eq!(load.busy_area - before.busy_area, 4.0);
    assert_eq!(load.clock - before.clock, Duration::from_secs(3));
    drop((waiting, other));
    queue.eject(1);
    pass(500);
    let phase = queue.phase();
    assert_eq!(phase.warm, Duration::from_secs(1));
    assert_eq!(phase.cold, Duration::from_millis(2_500));
    assert_eq!(queue.load().busy_area, load.busy_area);
}

#[test]
fn an_instance_without_capacity_is_not_ready() {
    let queue = queue();
    queue.put_instance(1, "one", 0);
    assert_eq!(queue.load().ready_instances, 0);
    assert!(in_line(queue.enter(ask(1))).cold());
}

/// A connection and a target that look at the queue as they go: they would
/// deadlock if they went under its lock.
#[derive(Clone)]
struct Nosy(Weak<Queue<Arc<Nosy>, Nosy>>);

impl Drop for Nosy {
    fn drop(&mut self) {
        if let Some(queue) = self.0.upgrade() {
            queue.load();
        }
    }
}

#[test]
fn nothing_foreign_is_dropped_under_the_lock() {
    let queue: Arc<Queue<Arc<Nosy>, Nosy>> = Queue::new(LIMITS, now);
    let nosy = || Nosy(Arc::downgrade(&queue));
    let enter = |id| at_once(queue.enter(ask(id)));
    queue.put_instance(1, Arc::new(nosy()), 2);
    queue.put_instance(1, Arc::new(nosy()), 2);
    let (a, b) = (enter(1), enter(2));
    a.release_with(nosy());
    b.release_with(nosy());
    queue.put_instance(1, Arc::new(nosy()), 1);
    queue.eject(1);
    queue.restore(1);
    enter(3).release_with(nosy());
    let slot = enter(4);
    let granted = in_line(queue.enter(ask(5)));
    queue.remove_instance(1);
    slot.release_with(nosy());
    queue.put_instance(1, Arc::new(nosy()), 1);
    drop(granted);
    let granted = {
        let slot = enter(6);
        let granted = in_line(queue.enter(ask(7)));
        slot.release_with(nosy());
        granted
    };
    queue.remove_instance(1);
    drop(granted);
    queue.put_instance(2, Arc::new(nosy()), 1);
    assert!(queue.retire_if_idle(2));
    assert_eq!(queue.load().busy, 0);
}

/// A task that leaves the line when its waker is dropped or woken.
#[test]
fn wakers_may_come_back_to_the_queue() {
    struct Leaver(Plain);
    impl Wake for Leaver {
        fn wake(self: Arc<Self>) {
            self.0.load();
        }
    }
    impl Drop for Leaver {
        fn drop(&mut self) {
            self.0.load();
        }
    }
    let queue = queue();
    let mut waiting = in_line(queue.enter(ask(1)));
    for _ in 0..2 {
        let waker = Waker::from(Arc::new(Leaver(Arc::clone(&queue))));
        let mut context = Context::from_waker(&waker);
        assert!(Pin::new(&mut waiting).poll(&mut context).is_pending());
    }
    queue.put_instance(1, "one", 1);
    let mut other = in_line(queue.enter(ask(2)));
    let waker = Waker::from(Arc::new(Leaver(Arc::clone(&queue))));
    assert!(
        Pin::new(&mut other)
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    drop(waker);
    drop(other);
    drop(waiting);
    assert_eq!(queue.load().busy, 0);
}

const MANY: u128 = 10_000;

fn on_a_small_stack(test: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .stack_size(64 * 1024)
        .spawn(test)
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn ten_thousand_that_leave_at_once_do_not_recurse() {
    on_a_small_stack(|| {
        let queue = queue();
        queue.put_instance(1, "one", 1);
        let slot = at_once(queue.enter(ask(0)));
        let mut line: Vec<_> = (1..=MANY).map(|id| in_line(queue.enter(ask(id)))).collect();
        let mut last = line.pop().unwrap();
        // The first is granted; as each goes, unreceived, the next one is.
        drop(slot);
        drop(line);
        drop(received(&mut last));
        assert_eq!(queue.load().busy + queue.load().queued, 0);
    });
}

#[test]
fn ten_thousand_cancelled_from_behind_leave_no_trace() {
    on_a_small_stack(|| {
        let queue = queue();
        queue.put_instance(1, "one", 1);
        let slot = at_once(queue.enter(ask(0)));
        let mut line: Vec<_> = (1..=MANY).map(|id| in_line(queue.enter(ask(id)))).collect();
        while let Some(waiting) = line.pop() {
            drop(waiting);
        }
        drop(slot);
        assert_eq!(queue.load().busy + queue.load().queued, 0);
        assert_eq!(queue.state.lock().requests.len(), 0);
        assert_eq!(queue.state.lock().entries.len(), 0);
    });
}

#[test]
fn ten_thousand_granted_at_once_and_all_dropped() {
    on_a_small_stack(|| {
        let queue = queue();
        let line: Vec<_> = (0..MANY).map(|id| in_line(queue.enter(ask(id)))).collect();
        queue.put_instance(1, "one", MANY as usize / 2);
        assert_eq!(queue.load().busy, MANY as usize / 2);
        drop(line);
        assert_eq!(queue.load().busy + queue.load().queued, 0);
    });
}
