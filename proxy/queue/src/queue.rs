//! The queue: every change to a version's slots and waiters, each one a
//! closure run in the frame [`Queue::change`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use slab::Slab;

use crate::line::{Line, Place};
use crate::pick::{self, Candidate, Crowd, pick};
use crate::seat::{Idle, InstanceKey, Seat, SeatInfo};
use crate::slot::{Entered, Grant, Refused, Slot, Waiting};
use crate::sync::{Lock, seed};

/// The time since any fixed moment; it never goes back.
pub type Clock = fn() -> Duration;

/// What the line holds at most. A lowered limit sends nobody away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_requests: usize,
    /// Of the bodies read while their requests wait.
    pub max_bytes: u64,
}

/// Which free instance a request would rather have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preference {
    /// The one with the lowest share of its capacity busy.
    LeastLoaded,
    /// The same one for the same number, unless it has more than its part.
    Hash(u64),
    /// The first of these with a free slot, else the least loaded.
    Ranked(Box<[InstanceKey]>),
}

/// A request for a slot.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The request's id, for [`Queue::position`].
    pub request: u128,
    /// 0, the most urgent, to 9; more counts as 9.
    pub priority: u8,
    /// Accounts of one priority take turns.
    pub account: u64,
    /// By the queue's [`Clock`]; a re-queued request keeps its old one.
    pub arrival: Duration,
    pub preference: Preference,
    /// The core it runs on: a connection last used there is preferred.
    pub home: usize,
}

/// A queue's sums at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub queued: usize,
    pub queued_bytes: u64,
    /// Slots given out, those of lost instances included.
    pub busy: usize,
    /// Of the ready instances.
    pub capacity: usize,
    /// Neither ejected, draining nor lost, with a capacity above 0.
    pub ready_instances: usize,
    /// The integral of busy + queued, in request seconds: the difference of
    /// two readings over that of their clocks is the mean concurrency.
    pub busy_area: f64,
    /// How many entered, the refused included; a re-queued one counts again.
    pub arrivals: u64,
    /// When this was read.
    pub clock: Duration,
}

/// For how long, in total, the queue has had a ready instance, and for how
/// long none. A waiter compares two readings with its time-outs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phase {
    pub warm: Duration,
    pub cold: Duration,
}

/// One version's waiting line and slots.
///
/// `T` is what to dial, cloned into each slot (an `Arc`, so that the clone
/// under the lock is cheap); `C` an idle connection that travels with a slot.
pub struct Queue<T: Clone, C> {
    clock: Clock,
    state: Lock<State<T, C>>,
}

struct State<T, C> {
    limits: Limits,
    /// Set once, by `close`.
    closed: Option<Arc<str>>,

    /// Lost instances included, until their last slot is back.
    seats: Slab<Seat<T, C>>,
    keys: BTreeMap<InstanceKey, usize>,
    /// The seats that may be granted now.
    free: BTreeSet<usize>,
    /// Of all seats.
    busy: usize,
    ready: usize,
    /// Of the ready ones.
    crowd: Crowd,

    line: Line,
    entries: Slab<Entry<T, C>>,
    /// Those in line, by request id; a request may stand twice.
    requests: BTreeSet<(u128, usize)>,
    queued_bytes: u64,

    arrivals: u64,
    /// Breaks ties between equal instances.
    random: u64,
    meter: Meter,
}

/// One [`Waiting`]'s part; only it takes the entry out.
struct Entry<T, C> {
    request: u128,
    preference: Preference,
    home: usize,
    bytes: u64,
    stage: Stage<T, C>,
}

enum Stage<T, C> {
    /// In the line; the waker is that of the last poll.
    Line(Place, Option<Waker>),
    /// A slot is set aside for it.
    Granted(Grant<T, C>),
    Refused(Refused),
}

/// The clocks and integrals, right up to `at`.
#[derive(Default)]
struct Meter {
    at: Duration,
    busy_area: f64,
    phase: Phase,
}

/// What a change leaves to be done without the lock, since it runs foreign
/// code that may come back here.
struct After<T, C> {
    wake: Vec<Waker>,
    dropped_connections: Vec<Idle<C>>,
    dropped_targets: Vec<T>,
    dropped_entry: Option<Entry<T, C>>,
}

impl<T: Clone, C> Queue<T, C> {
    pub fn new(limits: Limits, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            clock,
            state: Lock::new(State {
                limits,
                closed: None,
                seats: Slab::new(),
                keys: BTreeMap::new(),
                free: BTreeSet::new(),
                busy: 0,
                ready: 0,
                crowd: Crowd::default(),
                line: Line::default(),
                entries: Slab::new(),
                requests: BTreeSet::new(),
                queued_bytes: 0,
                arrivals: 0,
                random: seed(),
                meter: Meter {
                    at: clock(),
                    ..Meter::default()
                },
            }),
        })
    }

    /// Takes a slot, or a place in the line.
    pub fn enter(self: &Arc<Self>, ask: Ask) -> Entered<T, C> {
        enum Outcome<G> {
            Granted(G),
            Joined {
                entry: usize,
                cold: bool,
                first: bool,
            },
            Refused(Refused),
        }
        let outcome = self.change(|state, after| {
            state.arrivals += 1;
            if let Some(why) = &state.closed {
                return Outcome::Refused(Refused::Closed(Arc::clone(why)));
            }
            // Nobody waits while anything is free, so this overtakes nobody.
            if let Some(grant) = state.grant(&ask.preference, ask.home, after) {
                return Outcome::Granted(grant);
            }
            if state.line.len() >= state.limits.max_requests {
                return Outcome::Refused(Refused::Full {
                    requests: true,
                    limit: state.limits.max_requests as u64,
                });
            }
            let cold = state.ready == 0;
            let first = state.line.is_empty();
            Outcome::Joined {
                entry: state.join(ask),
                cold,
                first,
            }
        });
        match outcome {
            Outcome::Granted(grant) => Entered::Slot(Slot::new(Arc::clone(self), grant, false)),
            Outcome::Joined { entry, cold, first } => {
                Entered::Waiting(Waiting::new(Arc::clone(self), entry, cold, first))
            }
            Outcome::Refused(refused) => Entered::Refused(refused),
        }
    }

    /// Binds whoever enters from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.change(|state, _| state.limits = limits);
    }

    /// Adds an instance, or updates it: slots given out from now on have the
    /// new target and keep to the new capacity. Ends an ejection, a draining
    /// and a loss; work that outlasted the loss still counts.
    pub fn put_instance(&self, key: InstanceKey, target: T, capacity: usize) {
        self.change(|state, after| {
            let Some(&seat) = state.keys.get(&key) else {
                let seat = state.seats.insert(Seat::new(key, target, 0));
                state.keys.insert(key, seat);
                state.alter(seat, after, |seat| seat.capacity = capacity);
                return;
            };
            let old = state.alter(seat, after, |seat| {
                seat.capacity = capacity;
                seat.ejected = false;
                seat.draining = false;
                seat.lost = false;
                std::mem::replace(&mut seat.target, target)
            });
            after.dropped_targets.push(old);
        });
    }

    /// The instance is lost: no new grants, and its idle connections go. Held
    /// slots stay valid until they are dropped.
    pub fn remove_instance(&self, key: InstanceKey) {
        self.alter(key, |seat| seat.lost = true);
    }

    /// No new grants; work in flight goes on.
    pub fn drain_instance(&self, key: InstanceKey) {
        self.alter(key, |seat| seat.draining = true);
    }

    /// Removes the instance if it has no work, and says whether it did. From
    /// then on it gets none, so it may be stopped. An unknown one is `false`.
    pub fn retire_if_idle(&self, key: InstanceKey) -> bool {
        self.change(|state, after| {
            let Some(&seat) = state.keys.get(&key) else {
                return false;
            };
            let idle = state.seats[seat].busy == 0;
            if idle {
                state.alter(seat, after, |seat| seat.lost = true);
            }
            idle
        })
    }

    /// After a connect failure: no grants until `put_instance` or `restore`.
    /// Its idle connections go, as they would likely fail too.
    pub fn eject(&self, key: InstanceKey) {
        self.alter(key, |seat| seat.ejected = true);
    }

    /// Ends an ejection, and nothing else.
    pub fn restore(&self, key: InstanceKey) {
        self.alter(key, |seat| seat.ejected = false);
    }

    /// Refuses every waiter and everyone who enters later. The first reason
    /// stands. Slots already granted stay good.
    pub fn close(&self, why: Arc<str>) {
        self.change(|state, after| {
            let why = Arc::clone(state.closed.get_or_insert(why));
            state.refuse_line(&why, after);
        });
    }

    /// Refuses those who wait now; the queue goes on.
    pub fn fail_waiters(&self, why: Arc<str>) {
        self.change(|state, after| state.refuse_line(&why, after));
    }

    pub fn load(&self) -> Load {
        self.change(|state, _| Load {
            queued: state.line.len(),
            queued_bytes: state.queued_bytes,
            busy: state.busy,
            capacity: state.crowd.capacity,
            ready_instances: state.ready,
            busy_area: state.meter.busy_area,
            arrivals: state.arrivals,
            clock: state.meter.at,
        })
    }

    pub fn phase(&self) -> Phase {
        self.change(|state, _| state.meter.phase)
    }

    /// By key; lost ones are not among them.
    pub fn instances(&self) -> Vec<SeatInfo<T>> {
        let state = self.state.lock();
        state
            .keys
            .values()
            .map(|&seat| &state.seats[seat])
            .filter(|seat| !seat.lost)
            .map(Seat::info)
            .collect()
    }

    /// The slots given out on this instance; of a lost one, those still held,
    /// and `None` after the last.
    pub fn busy_of(&self, key: InstanceKey) -> Option<usize> {
        let state = self.state.lock();
        let seat = *state.keys.get(&key)?;
        Some(state.seats[seat].busy)
    }

    /// How many waiters stand before this request by priority and arrival
    /// (turns and the eighth grant may change who is next). `None` when it
    /// does not wait.
    pub fn position(&self, request: u128) -> Option<usize> {
        let state = self.state.lock();
        let (_, entry) = state
            .requests
            .range((request, 0)..=(request, usize::MAX))
            .next()?;
        match &state.entries[*entry].stage {
            Stage::Line(place, _) => Some(state.line.rank(place)),
            Stage::Granted(_) | Stage::Refused(_) => None,
        }
    }

    /// Gives a slot back.
    pub(crate) fn release(&self, seat: usize, connection: Option<Idle<C>>) {
        self.change(|state, after| {
            state.alter(seat, after, |seat| seat.give_back(connection));
        });
    }

    pub(crate) fn poll_entry(
        &self,
        entry: usize,
        waker: &Waker,
    ) -> Poll<Result<Grant<T, C>, Refused>> {
        // Cloned before the lock and the old one dropped after: both are
        // foreign code.
        let mut new = Some(waker.clone());
        let mut state = self.state.lock();
        let polled = if let Stage::Line(_, waker) = &mut state.entries[entry].stage {
            std::mem::swap(waker, &mut new);
            Poll::Pending
        } else {
            Poll::Ready(state.entries.remove(entry).stage)
        };
        drop(state);
        drop(new);
        polled.map(|stage| match stage {
            Stage::Granted(grant) => Ok(grant),
            Stage::Refused(refused) => Err(refused),
            Stage::Line(..) => unreachable!("one in line is pending"),
        })
    }

    /// A waiter goes, whatever its stage.
    pub(crate) fn leave(&self, entry: usize) {
        self.change(|state, after| {
            let mut gone = state.entries.remove(entry);
            match &mut gone.stage {
                Stage::Line(place, _) => {
                    state.line.leave(*place);
                    state.left_line(gone.request, entry, gone.bytes);
                }
                Stage::Granted(grant) => {
                    let connection = grant.connection.take();
                    state.alter(grant.seat, after, |seat| seat.give_back(connection));
                }
                Stage::Refused(_) => {}
            }
            after.dropped_entry = Some(gone);
        });
    }

    pub(crate) fn add_bytes(&self, entry: usize, n: u64) -> Result<(), Refused> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let entry = &mut state.entries[entry];
        match &entry.stage {
            Stage::Line(..) => {
                let limit = state.limits.max_bytes;
                match state.queued_bytes.checked_add(n) {
                    Some(sum) if sum <= limit => {
                        state.queued_bytes = sum;
                        entry.bytes += n;
                        Ok(())
                    }
                    _ => Err(Refused::Full {
                        requests: false,
                        limit,
                    }),
                }
            }
            Stage::Granted(_) => Ok(()),
            Stage::Refused(refused) => Err(refused.clone()),
        }
    }

    pub(crate) fn spare_bytes(&self) -> u64 {
        let state = self.state.lock();
        state.limits.max_bytes.saturating_sub(state.queued_bytes)
    }

    fn alter(&self, key: InstanceKey, change: impl FnOnce(&mut Seat<T, C>)) {
        self.change(|state, after| {
            if let Some(&seat) = state.keys.get(&key) {
                state.alter(seat, after, change);
            }
        });
    }

    /// The frame of every change: clocks, the change, settling, unlocking,
    /// and then what must not happen under the lock. What `change` returns
    /// leaves the lock too.
    fn change<R>(&self, change: impl FnOnce(&mut State<T, C>, &mut After<T, C>) -> R) -> R {
        let mut after = After::new();
        let result = {
            let mut state = self.state.lock();
            state.advance((self.clock)());
            let result = change(&mut state, &mut after);
            state.settle(&mut after);
            result
        };
        after.carry_out();
        result
    }
}

impl<T: Clone, C> State<T, C> {
    /// Counts the time since the last change, in which all stood as it does.
    fn advance(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.meter.at);
        self.meter.at += passed;
        let present = self.busy + self.line.len();
        self.meter.busy_area += present as f64 * passed.as_secs_f64();
        if self.ready > 0 {
            self.meter.phase.warm += passed;
        } else {
            self.meter.phase.cold += passed;
        }
    }

    /// Changes a seat; sums, the free index and idle connections follow, and
    /// the record goes when it is over.
    fn alter<R>(
        &mut self,
        id: usize,
        after: &mut After<T, C>,
        change: impl FnOnce(&mut Seat<T, C>) -> R,
    ) -> R {
        let seat = &mut self.seats[id];
        self.busy -= seat.busy;
        if seat.ready() {
            self.ready -= 1;
            self.crowd.busy -= seat.busy;
            self.crowd.capacity -= seat.capacity;
        }
        let result = change(seat);
        after.dropped_connections.extend(seat.surplus());
        self.busy += seat.busy;
        if seat.ready() {
            self.ready += 1;
            self.crowd.busy += seat.busy;
            self.crowd.capacity += seat.capacity;
        }
        if seat.has_free() {
            self.free.insert(id);
        } else {
            self.free.remove(&id);
        }
        if seat.over() {
            let seat = self.seats.remove(id);
            self.keys.remove(&seat.key);
            after.dropped_targets.push(seat.target);
        }
        result
    }

    /// Takes a free slot, the preferred one if it is free.
    fn grant(
        &mut self,
        preference: &Preference,
        home: usize,
        after: &mut After<T, C>,
    ) -> Option<Grant<T, C>> {
        if self.free.is_empty() {
            return None;
        }
        self.random = self.random.wrapping_add(1);
        let candidates = self.free.iter().map(|&id| {
            let seat = &self.seats[id];
            Candidate {
                id,
                key: seat.key,
                busy: seat.busy,
                capacity: seat.capacity,
            }
        });
        let find = |key| {
            let id = *self.keys.get(&key)?;
            self.free.contains(&id).then_some(id)
        };
        let id = pick(
            preference,
            candidates,
            find,
            self.crowd,
            pick::mix(self.random),
        )?;
        let connection = self.alter(id, after, |seat| seat.take(home));
        let seat = &self.seats[id];
        Some(Grant {
            seat: id,
            instance: seat.key,
            target: seat.target.clone(),
            home,
            connection,
        })
    }

    fn join(&mut self, ask: Ask) -> usize {
        let vacant = self.entries.vacant_entry();
        let id = vacant.key();
        let place = self.line.join(id, ask.priority, ask.account, ask.arrival);
        self.requests.insert((ask.request, id));
        vacant.insert(Entry {
            request: ask.request,
            preference: ask.preference,
            home: ask.home,
            bytes: 0,
            stage: Stage::Line(place, None),
        });
        id
    }

    /// Grants until nobody waits or nothing is free.
    fn settle(&mut self, after: &mut After<T, C>) {
        while !self.free.is_empty() {
            let Some(id) = self.line.next() else { return };
            let entry = &mut self.entries[id];
            let preference = std::mem::replace(&mut entry.preference, Preference::LeastLoaded);
            let home = entry.home;
            let grant = self
                .grant(&preference, home, after)
                .expect("a free seat can be picked");
            self.end_wait(id, Stage::Granted(grant), after);
        }
    }

    fn refuse_line(&mut self, why: &Arc<str>, after: &mut After<T, C>) {
        for id in self.line.drain() {
            let refused = Refused::Closed(Arc::clone(why));
            self.end_wait(id, Stage::Refused(refused), after);
        }
    }

    /// One taken out of the line gets its outcome.
    fn end_wait(&mut self, id: usize, outcome: Stage<T, C>, after: &mut After<T, C>) {
        let entry = &mut self.entries[id];
        if let Stage::Line(_, waker) = std::mem::replace(&mut entry.stage, outcome) {
            after.wake.extend(waker);
        }
        let (request, bytes) = (entry.request, std::mem::take(&mut entry.bytes));
        self.left_line(request, id, bytes);
    }

    fn left_line(&mut self, request: u128, id: usize, bytes: u64) {
        self.requests.remove(&(request, id));
        self.queued_bytes -= bytes;
    }
}

impl<T, C> After<T, C> {
    fn new() -> Self {
        Self {
            wake: Vec::new(),
            dropped_connections: Vec::new(),
            dropped_targets: Vec::new(),
            dropped_entry: None,
        }
    }

    fn carry_out(self) {
        for waker in self.wake {
            waker.wake();
        }
    }
}

impl<T: Clone, C> fmt::Debug for Queue<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

// The model checker's lock works inside its runs alone.
#[cfg(not(feature = "shuttle"))]
#[cfg(test)]
mod tests;
