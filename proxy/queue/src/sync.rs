//! The one lock, which the model checker can take the place of.
//!
//! With the feature `shuttle` each lock is a point where the checker may run
//! another thread, and the tie-breaking seed is fixed so that a schedule can
//! be replayed. Nothing else differs.

#[cfg(not(feature = "shuttle"))]
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(feature = "shuttle")]
use shuttle::sync::{Mutex, MutexGuard};
#[cfg(feature = "shuttle")]
use std::sync::PoisonError;

#[derive(Debug)]
pub(crate) struct Lock<S>(Mutex<S>);

impl<S> Lock<S> {
    pub(crate) fn new(state: S) -> Self {
        Self(Mutex::new(state))
    }

    /// A panic under the lock is a bug, and its test fails; but in service the
    /// other requests' slots must still be given back, so poison is ignored.
    pub(crate) fn lock(&self) -> MutexGuard<'_, S> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the tie-breaking numbers start: proxies that agreed here would all
/// send to the same instance.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn seed() -> u64 {
    rand::random()
}

#[cfg(feature = "shuttle")]
pub(crate) fn seed() -> u64 {
    1
}
