//! Random storms against a plain model of the rules, looking at everything
//! after each step.
#![cfg(not(feature = "shuttle"))]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use weir_queue::{
    Ask, Entered, InstanceKey, Limits, Preference, Queue, Refused, SeatInfo, Slot, Waiting,
};

thread_local! {
    static NOW: Cell<u64> = const { Cell::new(0) };
    /// Open connections by instance.
    static OPEN: RefCell<BTreeMap<InstanceKey, usize>> = const { RefCell::new(BTreeMap::new()) };
}

fn clock() -> Duration {
    Duration::from_millis(NOW.get())
}

#[derive(Debug)]
struct Connection(InstanceKey);

impl Connection {
    fn open(key: InstanceKey) -> Self {
        OPEN.with_borrow_mut(|open| *open.entry(key).or_default() += 1);
        Self(key)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(|open| *open.get_mut(&self.0).unwrap() -= 1);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Enter {
        priority: u8,
        account: u64,
        age: u64,
        preference: Preference,
        home: usize,
    },
    Poll(Index),
    Cancel(Index),
    Release {
        slot: Index,
        keep: bool,
    },
    Put {
        key: InstanceKey,
        capacity: usize,
    },
    Remove(InstanceKey),
    Drain(InstanceKey),
    Retire(InstanceKey),
    Eject(InstanceKey),
    Restore(InstanceKey),
    Limit(usize),
    Bytes(Index, u64),
    Fail,
    Pass(u64),
}

fn preference() -> impl Strategy<Value = Preference> {
    prop_oneof![
        Just(Preference::LeastLoaded),
        any::<u64>().prop_map(Preference::Hash),
        prop::collection::vec(0u128..4, 0..4)
            .prop_map(|keys| Preference::Ranked(keys.into_boxed_slice())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let key = || 0u128..4;
    prop_oneof![
        12 => (0u8..3, 0u64..3, 0u64..30, preference(), 0usize..3).prop_map(
            |(priority, account, age, preference, home)| Step::Enter {
                priority, account, age, preference, home,
            }
        ),
        6 => any::<Index>().prop_map(Step::Poll),
        3 => any::<Index>().prop_map(Step::Cancel),
        8 => (any::<Index>(), any::<bool>()).prop_map(|(slot, keep)| Step::Release { slot, keep }),
        4 => (key(), 0usize..4).prop_map(|(key, capacity)| Step::Put { key, capacity }),
        1 => key().prop_map(Step::Remove),
        1 => key().prop_map(Step::Drain),
        1 => key().prop_map(Step::Retire),
        1 => key().prop_map(Step::Eject),
        1 => key().prop_map(Step::Restore),
        1 => (0usize..30).prop_map(Step::Limit),
        2 => (any::<Index>(), 0u64..60).prop_map(|(index, n)| Step::Bytes(index, n)),
        1 => Just(Step::Fail),
        3 => (0u64..20).prop_map(Step::Pass),
    ]
}

type Held = (Slot<InstanceKey, Connection>, Connection);

/// A waiter by its request id, and what the model holds of it.
struct Waiter {
    waiting: Waiting<InstanceKey, Connection>,
    priority: u8,
    account: u64,
    arrival: Duration,
    bytes: u64,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Line,
    Granted,
    Refused,
}

struct World {
    queue: Arc<Queue<InstanceKey, Connection>>,
    limits: Limits,
    waiters: BTreeMap<u128, Waiter>,
    held: Vec<Held>,
    /// Accounts by turn, for each priority.
    turns: BTreeMap<u8, Vec<u64>>,
    granted_from_line: u64,
    entered: u64,
    /// What the last look saw.
    seats: BTreeMap<InstanceKey, SeatInfo<InstanceKey>>,
    area: f64,
    phase: [Duration; 2],
}

impl World {
    fn new() -> Self {
        NOW.set(0);
        OPEN.take();
        let limits = Limits {
            max_requests: 30,
            max_bytes: 100,
        };
        Self {
            queue: Queue::new(limits, clock),
            limits,
            waiters: BTreeMap::new(),
            held: Vec::new(),
            turns: BTreeMap::new(),
            granted_from_line: 0,
            entered: 0,
            seats: BTreeMap::new(),
            area: 0.0,
            phase: [Duration::ZERO; 2],
        }
    }

    fn in_line(&self) -> usize {
        self.waiters
            .values()
            .filter(|waiter| waiter.stage == Stage::Line)
            .count()
    }

    fn bytes(&self) -> u64 {
        self.waiters.values().map(|waiter| waiter.bytes).sum()
    }

    fn busy(&self) -> usize {
        let granted = |waiter: &&Waiter| waiter.stage == Stage::Granted;
        self.held.len() + self.waiters.values().filter(granted).count()
    }

    fn some_waiter(&self, index: &Index) -> Option<u128> {
        let ids: Vec<_> = self.waiters.keys().copied().collect();
        (!ids.is_empty()).then(|| *index.get(&ids))
    }

    fn hold(&mut self, mut slot: Slot<InstanceKey, Connection>) {
        assert_eq!(*slot.target(), slot.instance());
        let connection = slot
            .take_connection()
            .unwrap_or_else(|| Connection::open(slot.instance()));
        assert_eq!(connection.0, slot.instance(), "its own instance's");
        assert!(slot.take_connection().is_none());
        self.held.push((slot, connection));
    }

    fn ready(&self) -> impl Iterator<Item = &SeatInfo<InstanceKey>> {
        self.seats
            .values()
            .filter(|seat| !seat.ejected && !seat.draining && seat.capacity > 0)
    }

    /// Does one step. The seats whose capacity it set are answered.
    fn step(&mut self, step: Step) {
        let queue = Arc::clone(&self.queue);
        match step {
            Step::Enter {
                priority,
                account,
                age,
                preference,
                home,
            } => {
                let request = u128::from(self.entered);
                self.entered += 1;
                let arrival = clock().saturating_sub(Duration::from_millis(age));
                let any_free = self.ready().any(|seat| seat.busy < seat.capacity);
                let cold = self.ready().next().is_none();
                let in_line = self.in_line();
                match queue.enter(Ask {
                    request,
                    priority,
                    account,
                    arrival,
                    preference,
                    home,
                }) {
                    Entered::Slot(slot) => {
                        assert!(any_free && !slot.was_queued());
                        self.hold(slot);
                    }
                    Entered::Waiting(waiting) => {
                        assert!(!any_free && in_line < self.limits.max_requests);
                        assert_eq!((waiting.cold(), waiting.first()), (cold, in_line == 0));
                        let turns = self.turns.entry(priority).or_default();
                        if !turns.contains(&account) {
                            turns.push(account);
                        }
                        let waiter = Waiter {
                            waiting,
                            priority,
                            account,
                            arrival,
                            bytes: 0,
                            stage: Stage::Line,
                        };
                        self.waiters.insert(request, waiter);
                    }
                    Entered::Refused(refused) => {
                        let limit = self.limits.max_requests;
                        assert!(!any_free && in_line >= limit);
                        let full = Refused::Full {
                            requests: true,
                            limit: limit as u64,
                        };
                        assert_eq!(refused, full);
                    }
                }
            }
            Step::Poll(index) => {
                let Some(id) = self.some_waiter(&index) else {
                    return;
                };
                let waiter = self.waiters.get_mut(&id).unwrap();
                let mut context = Context::from_waker(Waker::noop());
                let polled = Pin::new(&mut waiter.waiting).poll(&mut context);
                match (polled, waiter.stage) {
                    (Poll::Pending, Stage::Line) => {}
                    (Poll::Ready(Ok(slot)), Stage::Granted) => {
                        self.waiters.remove(&id);
                        assert!(slot.was_queued());
                        self.hold(slot);
                    }
                    (Poll::Ready(Err(Refused::Closed(_))), Stage::Refused) => {
                        self.waiters.remove(&id);
                    }
                    (polled, stage) => panic!("{polled:?} at {stage:?}"),
                }
            }
            Step::Cancel(index) => {
                if let Some(id) = self.some_waiter(&index) {
                    self.waiters.remove(&id);
                    self.trim_turns();
                }
            }
            Step::Release { slot, keep } => {
                if self.held.is_empty() {
                    return;
                }
                let at = slot.index(self.held.len());
                let (slot, connection) = self.held.remove(at);
                if keep {
                    slot.release_with(connection);
                } else {
                    drop(connection);
                    drop(slot);
                }
            }
            Step::Put { key, capacity } => queue.put_instance(key, key, capacity),
            Step::Remove(key) => queue.remove_instance(key),
            Step::Drain(key) => queue.drain_instance(key),
            Step::Retire(key) => {
                let busy = queue.busy_of(key);
                assert_eq!(queue.retire_if_idle(key), busy == Some(0));
            }
            Step::Eject(key) => queue.eject(key),
            Step::Restore(key) => queue.restore(key),
            Step::Limit(max_requests) => {
                self.limits.max_requests = max_requests;
                queue.set_limits(self.limits);
            }
            Step::Bytes(index, n) => {
                let Some(id) = self.some_waiter(&index) else {
                    return;
                };
                let fits = self.bytes() + n <= self.limits.max_bytes;
                let waiter = self.waiters.get_mut(&id).unwrap();
                let added = waiter.waiting.add_bytes(n);
                match waiter.stage {
                    Stage::Line => {
                        assert_eq!(added.is_ok(), fits);
                        waiter.bytes += if fits { n } else { 0 };
                    }
                    Stage::Granted => assert_eq!(added, Ok(())),
                    Stage::Refused => assert!(matches!(added, Err(Refused::Closed(_)))),
                }
            }
            Step::Fail => {
                queue.fail_waiters("no start".into());
                for waiter in self.waiters.values_mut() {
                    if waiter.stage == Stage::Line {
                        waiter.stage = Stage::Refused;
                        waiter.bytes = 0;
                    }
                }
                self.trim_turns();
            }
            Step::Pass(millis) => {
                let passed = Duration::from_millis(millis);
                self.area += (self.busy() + self.in_line()) as f64 * passed.as_secs_f64();
                let warm = self.ready().next().is_some();
                self.phase[usize::from(!warm)] += passed;
                NOW.set(NOW.get() + millis);
            }
        }
    }

    /// Accounts of which nobody waits lose their turn.
    fn trim_turns(&mut self) {
        let waiters = &self.waiters;
        for (priority, turns) in &mut self.turns {
            turns.retain(|account| {
                waiters.values().any(|waiter| {
                    waiter.stage == Stage::Line
                        && (waiter.priority, waiter.account) == (*priority, *account)
                })
            });
        }
    }

    /// The rules of the line, the plain way: who is granted next.
    fn grant_next(&mut self) {
        self.granted_from_line += 1;
        let of_all = self.granted_from_line.is_multiple_of(8);
        let line = || {
            self.waiters
                .iter()
                .filter(|(_, waiter)| waiter.stage == Stage::Line)
        };
        let urgent = line().map(|(_, waiter)| waiter.priority).min().unwrap();
        let turn = self.turns[&urgent][0];
        // Ids rise with each entry, so they stand for the order of joining.
        let (&id, _) = line()
            .filter(|(_, w)| of_all || (w.priority, w.account) == (urgent, turn))
            .min_by_key(|(id, waiter)| (waiter.arrival, **id))
            .unwrap();
        let waiter = self.waiters.get_mut(&id).unwrap();
        waiter.stage = Stage::Granted;
        waiter.bytes = 0;
        let (priority, account) = (waiter.priority, waiter.account);
        self.trim_turns();
        let turns = self.turns.get_mut(&priority).unwrap();
        if let Some(at) = turns.iter().position(|other| *other == account) {
            turns.remove(at);
            turns.push(account);
        }
    }

    fn look(&mut self) {
        let load = self.queue.load();
        let before = std::mem::take(&mut self.seats);
        self.seats = self
            .queue
            .instances()
            .into_iter()
            .map(|seat| (seat.key, seat))
            .collect();

        // As many as left the line by a grant are the ones the rules name.
        for _ in load.queued..self.in_line() {
            self.grant_next();
        }
        let mut line: Vec<_> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.stage == Stage::Line)
            .map(|(id, waiter)| (waiter.priority, waiter.arrival, *id))
            .collect();
        line.sort_unstable();
        for (position, (.., id)) in line.iter().enumerate() {
            assert_eq!(self.queue.position(*id), Some(position), "of {id}");
        }
        for (id, waiter) in &self.waiters {
            let waits = self.queue.position(*id).is_some();
            assert_eq!(waits, waiter.stage == Stage::Line, "{id}");
        }

        // The counts.
        assert_eq!(load.queued, line.len());
        assert_eq!(load.queued_bytes, self.bytes());
        assert_eq!(load.busy, self.busy());
        assert_eq!(load.arrivals, self.entered);
        assert_eq!(load.ready_instances, self.ready().count());
        let capacity: usize = self.ready().map(|seat| seat.capacity).sum();
        assert_eq!(load.capacity, capacity);
        assert!((load.busy_area - self.area).abs() < 1e-9);
        let phase = self.queue.phase();
        assert_eq!([phase.warm, phase.cold], self.phase);

        // No idle slot beside a waiter.
        let free = self.ready().any(|seat| seat.busy < seat.capacity);
        assert!(!free || line.is_empty(), "{:?}", self.seats);

        for (key, seat) in &self.seats {
            let held = self.held.iter().filter(|(slot, _)| slot.instance() == *key);
            let held = held.count();
            assert!(seat.busy >= held);
            assert_eq!(self.queue.busy_of(*key), Some(seat.busy));
            // Above its capacity only from before it was lowered or lost.
            let known = before.get(key).map_or(usize::MAX, |before| before.busy);
            assert!(seat.busy <= seat.capacity.max(known), "{seat:?}");
            assert!(
                seat.idle_connections == 0 || seat.idle_connections + seat.busy <= seat.capacity
            );
            // Idle ones, those in slots held, and at most one with each grant.
            let open = OPEN.with_borrow(|open| open.get(key).copied().unwrap_or(0));
            assert!(open >= seat.idle_connections + held);
            assert!(open <= seat.idle_connections + seat.busy);
        }
    }

    fn end(mut self) {
        self.waiters.clear();
        self.trim_turns();
        self.look();
        self.held.clear();
        self.look();
        let load = self.queue.load();
        assert_eq!((load.queued, load.queued_bytes, load.busy), (0, 0, 0));
        for key in 0..4 {
            self.queue.remove_instance(key);
            assert_eq!(self.queue.busy_of(key), None);
        }
        assert!(OPEN.with_borrow(|open| open.values().all(|open| *open == 0)));
        assert_eq!(Arc::strong_count(&self.queue), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]
    #[test]
    fn storms_keep_the_rules(steps in prop::collection::vec(step(), 1..150)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            world.look();
        }
        world.end();
    }
}
