//! The monotonic clock that queues and timers share.

use std::{sync::LazyLock, time::Duration};

use tokio::time::Instant;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Time since the process first asked. Follows tokio's clock, so tests can pause it.
#[must_use]
pub fn now() -> Duration {
    START.elapsed()
}
