//! Bodies on their way: the caller's to the instance, the instance's to the
//! caller.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use crate::{account::Account, headers, upstream::Exchange};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The caller's body, of which a part may have been read while the invocation waited.
#[derive(Debug, Default)]
pub struct Held {
    bytes: BytesMut,
    trailers: Option<http::HeaderMap>,
    /// What is not read yet.
    rest: Option<Incoming>,
    limit: u64,
}

/// Why a body could not be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFailure {
    TooLarge,
    /// Its chunks are none.
    Malformed,
    /// The caller broke it off.
    BrokeOff,
}

impl BodyFailure {
    fn of(error: &hyper::Error) -> Self {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
            if let Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) = kind {
                return Self::Malformed;
            }
            cause = error.source();
        }
        Self::BrokeOff
    }
}

impl Held {
    #[must_use]
    pub fn new(body: Incoming, limit: u64) -> Self {
        let rest = (!body.is_end_stream()).then_some(body);
        Self {
            bytes: BytesMut::new(),
            trailers: None,
            rest,
            limit,
        }
    }

    #[must_use]
    pub fn whole(&self) -> bool {
        self.rest.is_none()
    }

    #[must_use]
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Reads one piece more into memory and says how long it was. Nothing is lost when this is dropped.
    pub async fn read(&mut self) -> Result<u64, BodyFailure> {
        let Some(rest) = &mut self.rest else {
            return Ok(0);
        };
        let hint = rest.size_hint().exact();
        match rest.frame().await {
            Some(Ok(frame)) => {
                let mut read = 0;
                match frame.into_data() {
                    Ok(data) => {
                        read = data.len() as u64;
                        if self.len() + read > self.limit {
                            return Err(BodyFailure::TooLarge);
                        }
                        if self.bytes.is_empty() {
                            // A copy of the right size: hyper's own buffer is 8 KiB and more, however short the piece.
                            let expected = hint.unwrap_or(read).min(64 << 10);
                            self.bytes.reserve(usize::try_from(expected).unwrap_or(0));
                        }
                        self.bytes.extend_from_slice(&data);
                    }
                    Err(frame) => self.trailers = frame.into_trailers().ok(),
                }
                if self.rest.as_ref().is_some_and(Body::is_end_stream) {
                    self.rest = None;
                }
                Ok(read)
            }
            Some(Err(error)) => Err(BodyFailure::of(&error)),
            None => {
                self.rest = None;
                Ok(0)
            }
        }
    }

    #[must_use]
    pub fn outgoing(self) -> Outgoing {
        let progress = Arc::new(Progress::default());
        let remaining = self.limit.saturating_sub(self.len());
        let outgoing = Outgoing {
            held: self.bytes.freeze(),
            trailers: self.trailers,
            rest: self.rest,
            remaining,
            progress,
        };
        outgoing.note_end();
        outgoing
    }
}

/// What the exchange and the request path need to know of a body that hyper owns by now.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicBool,
    failed: OnceLock<BodyFailure>,
}

impl Progress {
    /// The last byte was handed over.
    #[must_use]
    pub fn sent(&self) -> bool {
        self.sent.load(Ordering::Acquire)
    }
    /// Why the rest did not come from the caller.
    #[must_use]
    pub fn failed(&self) -> Option<BodyFailure> {
        self.failed.get().copied()
    }
}

/// The body that the instance gets: what was held, then the rest as it comes.
#[derive(Debug)]
pub struct Outgoing {
    held: Bytes,
    trailers: Option<http::HeaderMap>,
    rest: Option<Incoming>,
    remaining: u64,
    progress: Arc<Progress>,
}

impl Outgoing {
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    fn note_end(&self) {
        if self.is_end_stream() {
            self.progress.sent.store(true, Ordering::Release);
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if !self.held.is_empty() {
            let held = std::mem::take(&mut self.held);
            self.note_end();
            return Poll::Ready(Some(Ok(Frame::data(held))));
        }
        if let Some(trailers) = self.trailers.take() {
            self.note_end();
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let Some(rest) = &mut self.rest else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(rest).poll_frame(cx));
        match &frame {
            None => self.rest = None,
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                match self.remaining.checked_sub(length) {
                    Some(remaining) => self.remaining = remaining,
                    None => {
                        _ = self.progress.failed.set(BodyFailure::TooLarge);
                        return Poll::Ready(Some(Err("the body is larger than the limit".into())));
                    }
                }
                if self.rest.as_ref().is_some_and(Body::is_end_stream) {
                    self.rest = None;
                }
            }
            Some(Err(error)) => _ = self.progress.failed.set(BodyFailure::of(error)),
        }
        self.note_end();
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.trailers.is_none() && self.rest.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let held = self.held.len() as u64;
        match &self.rest {
            None => SizeHint::with_exact(held),
            Some(rest) => {
                let rest = rest.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(held.saturating_add(rest.lower()));
                if let Some(upper) = rest.upper() {
                    hint.set_upper(held.saturating_add(upper));
                }
                hint
            }
        }
    }
}

/// The body that the caller gets.
#[derive(Debug)]
pub enum Answer {
    /// Weir's own words.
    Own(Option<Bytes>),
    /// The instance's, as it comes.
    Instance(Box<Streamed>),
}

/// An instance's answer. The exchange ends with its last byte, and is cancelled when this is dropped or the
/// request's time is over, whether the caller reads or not.
#[derive(Debug)]
pub struct Streamed {
    body: Incoming,
    stage: Arc<Mutex<Stage>>,
    /// Absent where the answer had no body.
    _limit: Option<AbortOnDropHandle<()>>,
}

#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each answer, and it is in an Arc"
)]
#[derive(Debug)]
enum Stage {
    Running(Exchange, Account),
    Over,
    /// Broken off at the limit. By now the body may look whole.
    OverTime,
}

impl Streamed {
    #[must_use]
    pub fn new(body: Incoming, exchange: Exchange, account: Account, deadline: Instant) -> Self {
        let mut stage = Stage::Running(exchange, account);
        if body.is_end_stream() {
            stage.finish();
        }
        let running = matches!(stage, Stage::Running(..));
        let stage = Arc::new(Mutex::new(stage));
        let limit = running.then(|| {
            let stage = Arc::downgrade(&stage);
            AbortOnDropHandle::new(tokio::spawn(async move {
                sleep_until(deadline).await;
                if let Some(stage) = stage.upgrade() {
                    lock(&stage).break_off();
                }
            }))
        });
        Self {
            body,
            stage,
            _limit: limit,
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut stage = lock(&self.stage);
        let account = match &mut *stage {
            Stage::Running(_, account) => account,
            Stage::Over => return Poll::Ready(None),
            Stage::OverTime => return Poll::Ready(Some(Err("the request took too long".into()))),
        };
        let mut frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &mut frame {
            Some(Ok(frame)) => {
                account.sent(frame.data_ref().map_or(0, |data| data.len() as u64));
                if let Some(trailers) = frame.trailers_mut() {
                    headers::trailers(trailers);
                }
                if self.body.is_end_stream() {
                    stage.finish();
                }
            }
            Some(Err(_)) => account.broken("instance-lost"),
            None => stage.finish(),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }
}

impl Stage {
    fn finish(&mut self) {
        if let Self::Running(exchange, mut account) = std::mem::replace(self, Self::Over) {
            account.instance_done();
            exchange.finish();
            account.complete();
        }
    }

    fn break_off(&mut self) {
        if let Self::Running(exchange, mut account) = std::mem::replace(self, Self::OverTime) {
            account.broken("instance-timeout");
            drop(exchange);
        }
    }
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Instance(streamed) => streamed.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Instance(streamed) => streamed.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Instance(streamed) => streamed.body.size_hint(),
        }
    }
}
