//! The two rights a request can hold: a place in the line, and a slot.
//!
//! Both are given by the queue alone and given back by dropping them.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::queue::Queue;
use crate::seat::{Idle, InstanceKey};

/// What became of an [`Ask`](crate::Ask).
pub enum Entered<T: Clone, C> {
    /// There was a free slot.
    Slot(Slot<T, C>),
    /// There was none; await it.
    Waiting(Waiting<T, C>),
    Refused(Refused),
}

impl<T: Clone, C> fmt::Debug for Entered<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(slot) => slot.fmt(f),
            Self::Waiting(waiting) => waiting.fmt(f),
            Self::Refused(refused) => refused.fmt(f),
        }
    }
}

/// Why a request can't wait here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The line is at its limit of requests, or else of bytes.
    Full { requests: bool, limit: u64 },
    /// No slot will come, and why.
    Closed(Arc<str>),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full {
                requests: true,
                limit,
            } => write!(f, "the queue holds its limit of {limit} requests"),
            Self::Full {
                requests: false,
                limit,
            } => write!(f, "the queue holds its limit of {limit} bytes"),
            Self::Closed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Refused {}

/// The right to have one request in flight on one instance.
///
/// Dropping it frees the place. Keep it until the *instance* is done with the
/// request, not until the caller is.
#[must_use = "a slot that is dropped is free again"]
pub struct Slot<T: Clone, C> {
    queue: Arc<Queue<T, C>>,
    /// The seat's index, which stays its own while the seat is busy.
    seat: usize,
    instance: InstanceKey,
    target: T,
    /// The asker's core.
    home: usize,
    connection: Option<Idle<C>>,
    was_queued: bool,
}

/// What a grant puts down for the asker to make a [`Slot`] of.
#[derive(Debug)]
pub(crate) struct Grant<T, C> {
    pub(crate) seat: usize,
    pub(crate) instance: InstanceKey,
    pub(crate) target: T,
    pub(crate) home: usize,
    pub(crate) connection: Option<Idle<C>>,
}

impl<T: Clone, C> Slot<T, C> {
    pub(crate) fn new(queue: Arc<Queue<T, C>>, grant: Grant<T, C>, was_queued: bool) -> Self {
        Self {
            queue,
            seat: grant.seat,
            instance: grant.instance,
            target: grant.target,
            home: grant.home,
            connection: grant.connection,
            was_queued,
        }
    }

    /// What to dial when no connection came along.
    pub fn target(&self) -> &T {
        &self.target
    }

    pub fn instance(&self) -> InstanceKey {
        self.instance
    }

    /// The idle connection that came with the slot. Once: who takes it owns
    /// it, and must close it or hand it to [`release_with`](Self::release_with)
    /// before the slot goes.
    pub fn take_connection(&mut self) -> Option<C> {
        self.connection.take().map(|idle| idle.connection)
    }

    /// Frees the place and leaves `connection` for the next, under this
    /// slot's core. It is dropped instead where the instance may not keep it.
    pub fn release_with(mut self, connection: C) {
        // The earlier one, if it was not taken, goes first: a slot owns one.
        self.connection = None;
        self.connection = Some(Idle {
            connection,
            home: self.home,
        });
    }

    /// Whether its request stood in the line.
    pub fn was_queued(&self) -> bool {
        self.was_queued
    }
}

/// A connection that was never taken is as idle as before, and stays.
impl<T: Clone, C> Drop for Slot<T, C> {
    fn drop(&mut self) {
        self.queue.release(self.seat, self.connection.take());
    }
}

impl<T: Clone, C> fmt::Debug for Slot<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("instance", &self.instance)
            .field("home", &self.home)
            .field("connection", &self.connection.is_some())
            .field("was_queued", &self.was_queued)
            .finish_non_exhaustive()
    }
}

/// A place in the line, to be awaited.
///
/// Dropping it leaves the line or, when the slot was granted and not yet
/// received, gives the slot to the next.
#[must_use = "a place in the line that is dropped is lost"]
pub struct Waiting<T: Clone, C> {
    queue: Arc<Queue<T, C>>,
    /// The entry in the queue; `None` once the outcome was received.
    entry: Option<usize>,
    cold: bool,
    first: bool,
}

impl<T: Clone, C> Waiting<T, C> {
    pub(crate) fn new(queue: Arc<Queue<T, C>>, entry: usize, cold: bool, first: bool) -> Self {
        Self {
            queue,
            entry: Some(entry),
            cold,
            first,
        }
    }

    /// Counts `n` more bytes held for this request while it waits. They stop
    /// counting when it is granted, refused or dropped.
    ///
    /// # Errors
    ///
    /// `Full`, and nothing is counted, when the line would hold more than its
    /// limit; `Closed` when the wait has ended that way.
    pub fn add_bytes(&mut self, n: u64) -> Result<(), Refused> {
        self.entry
            .map_or(Ok(()), |entry| self.queue.add_bytes(entry, n))
    }

    /// How many more bytes the line would hold now.
    pub fn spare_bytes(&self) -> u64 {
        self.queue.spare_bytes()
    }

    /// No instance was ready when it came.
    pub fn cold(&self) -> bool {
        self.cold
    }

    /// Nobody waited when it came.
    pub fn first(&self) -> bool {
        self.first
    }
}

impl<T: Clone, C> Future for Waiting<T, C> {
    type Output = Result<Slot<T, C>, Refused>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let entry = self.entry.expect("a wait is not polled after its outcome");
        let outcome = std::task::ready!(self.queue.poll_entry(entry, context.waker()));
        self.entry = None;
        Poll::Ready(outcome.map(|grant| Slot::new(Arc::clone(&self.queue), grant, true)))
    }
}

impl<T: Clone, C> Drop for Waiting<T, C> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.queue.leave(entry);
        }
    }
}

impl<T: Clone, C> fmt::Debug for Waiting<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("cold", &self.cold)
            .field("first", &self.first)
            .finish_non_exhaustive()
    }
}
