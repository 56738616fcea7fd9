//! What a caller's connection is doing, and how long it may go on with that.
//!
//! hyper knows one time limit for a head, which would also end connections
//! that idle. Here the two are told apart: the socket says when bytes come
//! between requests, the requests say when they begin and end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Written by the socket and by the requests of one connection, read by its [`Watch`].
#[derive(Debug, Default)]
pub struct Activity {
    /// Requests that are open now.
    open: AtomicUsize,
    /// Requests that ever came.
    turns: AtomicUsize,
    /// Bytes came while none was open: a head has begun.
    head: AtomicBool,
    /// The caller reads more slowly than its answer comes: what is written waits.
    blocked: AtomicBool,
    /// How often a write that had waited went on.
    unblocked: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// No request has come on it.
    New,
    /// At least one request is open.
    Busy,
    /// The last answer is with hyper, and its end is not with the socket yet.
    Writing,
    /// Between requests.
    Idle,
    /// A further head has begun.
    Head,
}

impl Activity {
    pub fn begin(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.head.store(false, Ordering::Relaxed);
    }

    pub fn end(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// Requests that ever came.
    #[must_use]
    pub fn turns(&self) -> usize {
        self.turns.load(Ordering::Relaxed)
    }

    pub fn bytes_came(&self) {
        if self.phase() == Phase::Idle {
            self.head.store(true, Ordering::Relaxed);
        }
    }

    /// A write was tried: whether it went on, or has to wait for the caller.
    pub fn wrote(&self, went_on: bool) {
        if !went_on {
            self.blocked.store(true, Ordering::Relaxed);
        } else if self.blocked.swap(false, Ordering::Relaxed) {
            self.unblocked.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.open.load(Ordering::Relaxed) > 0 {
            Phase::Busy
        } else if self.blocked.load(Ordering::Relaxed) {
            Phase::Writing
        } else if self.turns.load(Ordering::Relaxed) == 0 {
            Phase::New
        } else if self.head.load(Ordering::Relaxed) {
            Phase::Head
        } else {
            Phase::Idle
        }
    }
}

/// Ends when the connection has been in a phase for longer than it may.
#[derive(Debug)]
pub struct Watch {
    activity: Arc<Activity>,
    seen: (usize, usize, Phase),
    limit: Pin<Box<Sleep>>,
    head: Duration,
    idle: Duration,
}

impl Watch {
    /// `accepted` is when the first head's time began.
    #[must_use]
    pub fn new(activity: Arc<Activity>, accepted: Instant, head: Duration, idle: Duration) -> Self {
        Self {
            activity,
            seen: (0, 0, Phase::New),
            limit: Box::pin(sleep_until(accepted + head)),
            head,
            idle,
        }
    }

    /// To be polled after whatever changes the activity on the same task; changes elsewhere show with the next
    /// limit.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let now = (
                self.activity.turns.load(Ordering::Relaxed),
                self.activity.unblocked.load(Ordering::Relaxed),
                self.activity.phase(),
            );
            // Requests have limits of their own, so the timer is left alone while one is open.
            if now != self.seen && now.2 != Phase::Busy {
                self.restart(now.2);
            }
            self.seen = now;
            ready!(self.limit.as_mut().poll(cx));
            if now.2 != Phase::Busy {
                return Poll::Ready(());
            }
            self.restart(Phase::Idle);
        }
    }

    fn restart(&mut self, phase: Phase) {
        let limit = match phase {
            Phase::New | Phase::Head => self.head,
            Phase::Busy | Phase::Writing | Phase::Idle => self.idle,
        };
        self.limit.as_mut().reset(Instant::now() + limit);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{advance, timeout};

    use super::*;

    const HEAD: Duration = Duration::from_secs(10);
    const IDLE: Duration = Duration::from_secs(75);

    fn watched() -> (Arc<Activity>, Watch) {
        let activity = Arc::new(Activity::default());
        let watch = Watch::new(activity.clone(), Instant::now(), HEAD, IDLE);
        (activity, watch)
    }

    /// How long it takes to end.
    async fn ends(watch: &mut Watch) -> Duration {
        let start = Instant::now();
        poll_fn(|cx| watch.poll(cx)).await;
        // Timers are true to a millisecond.
        Duration::from_secs(start.elapsed().as_secs())
    }

    async fn looks(watch: &mut Watch) {
        assert!(
            timeout(Duration::ZERO, poll_fn(|cx| watch.poll(cx)))
                .await
                .is_err()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_head_has_its_time_from_the_accept() {
        let (activity, mut watch) = watched();
        advance(HEAD / 2).await;
        activity.bytes_came();
        assert_eq!(ends(&mut watch).await, HEAD / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_has_the_idle_time() {
        let (activity, mut watch) = watched();
        activity.begin();
        looks(&mut watch).await;
        activity.end();
        assert_eq!(ends(&mut watch).await, IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_head_that_has_begun_must_be_whole_in_time() {
        let (activity, mut watch) = watched();
        activity.begin();
        activity.end();
        looks(&mut watch).await;
        advance(IDLE / 2).await;
        activity.bytes_came();
        looks(&mut watch).await;
        advance(HEAD / 2).await;
        // More bytes are not more time.
        activity.bytes_came();
        assert_eq!(ends(&mut watch).await, HEAD / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_read_slowly_goes_on_as_long_as_it_does() {
        let (activity, mut watch) = watched();
        activity.begin();
        activity.wrote(false);
        activity.end();
        for _ in 0..10 {
            looks(&mut watch).await;
            advance(IDLE / 2).await;
            activity.wrote(true);
            activity.wrote(false);
        }
        looks(&mut watch).await;
        assert_eq!(ends(&mut watch).await, IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn writes_that_do_not_wait_are_no_news() {
        let (activity, mut watch) = watched();
        activity.begin();
        activity.end();
        looks(&mut watch).await;
        advance(IDLE / 3).await;
        activity.wrote(true);
        looks(&mut watch).await;
        assert_eq!(ends(&mut watch).await, IDLE / 3 * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_request_is_not_ended() {
        let (activity, mut watch) = watched();
        activity.begin();
        activity.bytes_came();
        assert!(
            timeout(IDLE * 10, poll_fn(|cx| watch.poll(cx)))
                .await
                .is_err()
        );
        activity.end();
        assert_eq!(ends(&mut watch).await, IDLE);
    }
}
