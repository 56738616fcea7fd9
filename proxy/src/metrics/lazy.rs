//! Histograms that are there once they are used.
//!
//! The recorder can be told to keep an unused counter or gauge by adding 0 to
//! it; a histogram has no such thing. One that was not used for long may have
//! been forgotten, and its handle would go nowhere. So it is looked up again.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicU64, Ordering},
};

use metrics::{Histogram, Key, Label};

use super::{FORGOTTEN_AFTER, Metrics};
use crate::clock;

pub(super) struct LazyHistogram {
    metrics: Arc<Metrics>,
    key: Key,
    /// The second of the last use, from 1 on; 0: never.
    used: AtomicU64,
    handle: RwLock<Histogram>,
}

impl LazyHistogram {
    pub(super) fn new(metrics: &Arc<Metrics>, name: &'static str, labels: Vec<Label>) -> Self {
        Self {
            metrics: metrics.clone(),
            key: Key::from_parts(name, labels),
            used: AtomicU64::new(0),
            handle: RwLock::new(Histogram::noop()),
        }
    }

    pub(super) fn record(&self, value: f64) {
        let now = clock::now().as_secs() + 1;
        let used = self.used.load(Ordering::Acquire);
        if used == 0 || now.saturating_sub(used) > FORGOTTEN_AFTER.as_secs() / 2 {
            // Two at once get the same one.
            let found = self.metrics.histogram(&self.key);
            *self.handle.write().unwrap_or_else(PoisonError::into_inner) = found;
        }
        self.handle
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .record(value);
        if now != used {
            self.used.store(now, Ordering::Release);
        }
    }
}
