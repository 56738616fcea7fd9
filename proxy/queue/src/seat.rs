//! An instance as the queue sees it: places, and idle connections.
//!
//! The rules of a single instance are here; that sums and indices follow a
//! change is the queue's part.

/// Names an instance, for good.
pub type InstanceKey = u128;

/// What the queue holds of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeatInfo<T> {
    pub key: InstanceKey,
    pub target: T,
    /// Slots given out, those granted and not yet received included.
    pub busy: usize,
    /// May be below `busy` after it was lowered.
    pub capacity: usize,
    pub idle_connections: usize,
    /// A connect failed; ended by `put_instance` or `restore`.
    pub ejected: bool,
    /// On its way out; ended by `put_instance` alone.
    pub draining: bool,
}

#[derive(Debug)]
pub(crate) struct Seat<T, C> {
    pub(crate) key: InstanceKey,
    pub(crate) target: T,
    pub(crate) capacity: usize,
    pub(crate) busy: usize,
    pub(crate) ejected: bool,
    pub(crate) draining: bool,
    /// Removed; the record waits for the last slot.
    pub(crate) lost: bool,
    /// Oldest first.
    idle: Vec<Idle<C>>,
}

/// A connection without a request, and the core that used it last.
#[derive(Debug)]
pub(crate) struct Idle<C> {
    pub(crate) connection: C,
    pub(crate) home: usize,
}

impl<T, C> Seat<T, C> {
    pub(crate) fn new(key: InstanceKey, target: T, capacity: usize) -> Self {
        Self {
            key,
            target,
            capacity,
            busy: 0,
            ejected: false,
            draining: false,
            lost: false,
            idle: Vec::new(),
        }
    }

    /// Could be granted, if not now then when a slot is released.
    pub(crate) fn ready(&self) -> bool {
        self.capacity > 0 && !self.ejected && !self.draining && !self.lost
    }

    pub(crate) fn has_free(&self) -> bool {
        self.ready() && self.busy < self.capacity
    }

    /// Nothing is left to keep the record for.
    pub(crate) fn over(&self) -> bool {
        self.lost && self.busy == 0
    }

    /// Takes one place and, where it should, a connection: the last used on
    /// this core; none while the instance may have one more (a connection is
    /// best used on the core that made it); else the last used anywhere.
    pub(crate) fn take(&mut self, home: usize) -> Option<Idle<C>> {
        let full = self.idle.len() + self.busy >= self.capacity;
        self.busy += 1;
        match self.idle.iter().rposition(|idle| idle.home == home) {
            Some(at) => Some(self.idle.remove(at)),
            None if full => self.idle.pop(),
            None => None,
        }
    }

    pub(crate) fn give_back(&mut self, connection: Option<Idle<C>>) {
        self.busy -= 1;
        self.idle.extend(connection);
    }

    /// The connections it may keep no longer, the longest idle first.
    pub(crate) fn surplus(&mut self) -> std::vec::Drain<'_, Idle<C>> {
        let room = if self.ready() {
            self.capacity.saturating_sub(self.busy)
        } else {
            0
        };
        let surplus = self.idle.len().saturating_sub(room);
        self.idle.drain(..surplus)
    }
}

impl<T: Clone, C> Seat<T, C> {
    pub(crate) fn info(&self) -> SeatInfo<T> {
        SeatInfo {
            key: self.key,
            target: self.target.clone(),
            busy: self.busy,
            capacity: self.capacity,
            idle_connections: self.idle.len(),
            ejected: self.ejected,
            draining: self.draining,
        }
    }
}
