//! The function to try things with: `weir sample-function`.
//!
//! It counts the requests it has in flight by a guard that lives in the
//! response's body, so that a caller who leaves is seen: hyper drops the body
//! (or the handler) when the connection closes or the stream is reset. Looks
//! from outside (`/health`, `/v2/health/ready`, `/stats`) are not counted.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

type Inner = UnsyncBoxBody<Bytes, hyper::Error>;

/// More than anyone asks for by a slip of the keyboard is refused.
const MAX_BYTES: usize = 1 << 30;

#[derive(Clone, Debug, clap::Args)]
pub struct SampleArgs {
    /// Port on 127.0.0.1 (0: any free one)
    #[arg(long, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Listen only after so many milliseconds, as a model that loads does
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub start_delay_ms: u64,
    /// Exit with 1 at once
    #[arg(long)]
    pub fail_start: bool,
    /// Answer health checks with 500
    #[arg(long)]
    pub fail_health: bool,
    /// Abort the process on the N-th request (health checks are not counted)
    #[arg(long, value_name = "N")]
    pub fail_after: Option<u64>,
    /// Answer this share of requests with 500
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = ratio)]
    pub fail_ratio: f64,
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("must be a number from 0 to 1".into()),
    }
}

/// Serves until SIGTERM or SIGINT, then lets what is in flight end.
pub async fn serve(args: SampleArgs) -> anyhow::Result<()> {
    if args.fail_start {
        anyhow::bail!("--fail-start: not starting, as told");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(stop);
    tokio::select! {
        () = tokio::time::sleep(Duration::from_millis(args.start_delay_ms)) => {}
        () = &mut stop => return Ok(()),
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
    // Before it: what the system takes meanwhile is not the instance's start.
    let listening = jiff::Timestamp::now();
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("could not listen on {address}"))?;
    let instance = std::env::var("WEIR_INSTANCE_ID").unwrap_or_default();
    serve_on(listener, listening, args, &instance, stop).await
}

async fn serve_on(
    listener: TcpListener,
    listening: jiff::Timestamp,
    args: SampleArgs,
    instance: &str,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let sample = Arc::new(Sample {
        instance: HeaderValue::from_str(instance).context("WEIR_INSTANCE_ID is no header value")?,
        pid: HeaderValue::from(std::process::id()),
        listening: precise(listening),
        args,
        load: Arc::default(),
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // Out of file descriptors, most likely: let some close.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = &mut stop => break,
        };
        // Without it answers only come a little later.
        let _ = stream.set_nodelay(true);
        let sample = Arc::clone(&sample);
        let service = service_fn(move |request| {
            // Counted here, not in the future: the head has arrived.
            let arrival = sample.arrive(&request);
            let sample = Arc::clone(&sample);
            async move { Ok::<_, Infallible>(sample.answer(request, arrival).await) }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            // A caller that left is counted by the guards.
            let _ = connection.await;
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

struct Sample {
    args: SampleArgs,
    instance: HeaderValue,
    pid: HeaderValue,
    listening: HeaderValue,
    load: Arc<Load>,
}

#[derive(Default)]
struct Load {
    arrived: AtomicU64,
    in_flight: AtomicUsize,
    max_concurrency: AtomicUsize,
    served: AtomicU64,
    cancelled: AtomicU64,
}

/// What is known of a request when its head has arrived.
struct Arrival {
    at: jiff::Timestamp,
    started: Instant,
    /// Requests in flight including this one.
    concurrency: usize,
    /// The how-manieth counted request this is.
    number: u64,
    /// `None` for those that are not counted.
    guard: Option<InFlight>,
}

/// One request in flight. Ends by `finish` (served) or by being dropped
/// (cancelled).
struct InFlight {
    load: Arc<Load>,
    served: bool,
}

impl InFlight {
    fn finish(mut self) {
        self.served = true;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Ordering::SeqCst);
        let ended = if self.served {
            &self.load.served
        } else {
            &self.load.cancelled
        };
        ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Sample {
    fn arrive(&self, request: &Request<Incoming>) -> Arrival {
        let load = &self.load;
        let counted = !matches!(
            request.uri().path(),
            "/health" | "/v2/health/ready" | "/stats"
        );
        let (concurrency, number, guard) = if counted {
            let concurrency = load.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            load.max_concurrency
                .fetch_max(concurrency, Ordering::SeqCst);
            let number = load.arrived.fetch_add(1, Ordering::SeqCst) + 1;
            let guard = InFlight {
                load: Arc::clone(load),
                served: false,
            };
            (concurrency, number, Some(guard))
        } else {
            (load.in_flight.load(Ordering::SeqCst), 0, None)
        };
        Arrival {
            at: jiff::Timestamp::now(),
            started: Instant::now(),
            concurrency,
            number,
            guard,
        }
    }

    async fn answer(&self, request: Request<Incoming>, arrival: Arrival) -> Response<Counted> {
        let Arrival {
            at,
            started,
            concurrency,
            number,
            guard,
        } = arrival;
        if guard.is_some() && self.args.fail_after.is_some_and(|n| number >= n) {
            eprintln!("--fail-after: aborting on request {number}, as told");
            std::process::abort();
        }
        let head = request.method() == Method::HEAD;
        let response = if guard.is_some() && rand::random_bool(self.args.fail_ratio) {
            text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "failed by --fail-ratio\n",
            )
        } else {
            self.route(request, started).await
        };
        let mut response = response.map(|inner| Counted::new(inner, guard, head));
        let headers = response.headers_mut();
        headers.insert("x-instance", self.instance.clone());
        headers.insert("x-pid", self.pid.clone());
        headers.insert("x-concurrency", HeaderValue::from(concurrency));
        headers.insert("x-listening-since", self.listening.clone());
        headers.insert("x-received-at", precise(at));
        response
    }

    async fn route(&self, request: Request<Incoming>, started: Instant) -> Response<Inner> {
        match request.uri().path() {
            "/health" | "/v2/health/ready" if self.args.fail_health => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "failed by --fail-health\n",
            ),
            "/health" | "/v2/health/ready" => text(StatusCode::OK, "ok\n"),
            "/stats" => self.stats(),
            "/echo" => echo(request),
            "/infer" => infer(request, started).await,
            "/stream" => events(request.uri().query()),
            _ => text(StatusCode::NOT_FOUND, "no such path\n"),
        }
    }

    fn stats(&self) -> Response<Inner> {
        let stats = serde_json::json!({
            "served": self.load.served.load(Ordering::SeqCst),
            "cancelled": self.load.cancelled.load(Ordering::SeqCst),
            "maxConcurrency": self.load.max_concurrency.load(Ordering::SeqCst),
            "listeningSince": self.listening.to_str().unwrap_or_default(),
        });
        full(StatusCode::OK, "application/json", stats.to_string())
    }
}

fn echo(request: Request<Incoming>) -> Response<Inner> {
    let (head, body) = request.into_parts();
    let mut response = Response::new(body.boxed_unsync());
    if let Some(kind) = head.headers.get(CONTENT_TYPE) {
        response.headers_mut().insert(CONTENT_TYPE, kind.clone());
    }
    response
}

async fn infer(request: Request<Incoming>, started: Instant) -> Response<Inner> {
    let query = request.uri().query();
    let asked = parameter(query, "ms", 0.0f64)
        .and_then(|ms| {
            Duration::try_from_secs_f64(ms / 1e3).map_err(|error| format!("ms: {error}\n"))
        })
        .and_then(|work| Ok((work, parameter(query, "bytes", 0usize)?)));
    let (work, bytes) = match asked {
        Ok((work, bytes)) if bytes <= MAX_BYTES => (work, bytes),
        Ok(_) => return text(StatusCode::BAD_REQUEST, "bytes: at most 1 GiB\n"),
        Err(why) => return full(StatusCode::BAD_REQUEST, "text/plain", why),
    };
    // Hyper only sees a caller leave once the request's body was read.
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return text(StatusCode::BAD_REQUEST, "the request's body broke off\n");
        }
    }
    tokio::time::sleep_until(started + work).await;
    full(StatusCode::OK, "application/json", filler(bytes))
}

/// JSON of exactly so many bytes, or the least that is JSON.
fn filler(bytes: usize) -> String {
    const FRAME: usize = r#"{"output":""}"#.len();
    match bytes {
        0 | 1 => "0".into(),
        2..FRAME => format!("{{{:1$}}}", "", bytes - 2),
        _ => format!(r#"{{"output":"{}"}}"#, "x".repeat(bytes - FRAME)),
    }
}

fn events(query: Option<&str>) -> Response<Inner> {
    let asked = parameter(query, "n", 10u64)
        .and_then(|n| Ok((n, parameter(query, "interval_ms", 100u64)?)));
    let (n, interval) = match asked {
        Ok((n, ms)) => (n, Duration::from_millis(ms)),
        Err(why) => return full(StatusCode::BAD_REQUEST, "text/plain", why),
    };
    let events = stream::unfold(0, move |i| async move {
        if i == n {
            return None;
        }
        if i > 0 {
            tokio::time::sleep(interval).await;
        }
        let event = Bytes::from(format!("id: {i}\ndata: {{\"i\":{i}}}\n\n"));
        Some((Ok(Frame::data(event)), i + 1))
    });
    let mut response = Response::new(StreamBody::new(events).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn parameter<T: std::str::FromStr>(
    query: Option<&str>,
    name: &str,
    absent: T,
) -> Result<T, String> {
    let value = query
        .unwrap_or_default()
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    match value {
        None => Ok(absent),
        Some(value) => value
            .parse()
            .map_err(|_| format!("{name}: not a number of the right kind: {value}\n")),
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Inner> {
    full(status, "text/plain", text)
}

fn full(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Inner> {
    let body = Full::new(body.into())
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A body that holds its request's guard until just before its last byte is
/// handed to hyper: a caller that has the whole answer and calls again must
/// not find itself counted twice.
struct Counted {
    inner: Inner,
    guard: Option<InFlight>,
}

impl Counted {
    fn new(inner: Inner, guard: Option<InFlight>, head: bool) -> Self {
        let mut counted = Self { inner, guard };
        // Hyper does not poll these.
        if head || counted.inner.is_end_stream() {
            counted.finish();
        }
        counted
    }

    fn finish(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.finish();
        }
    }
}

impl Body for Counted {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            None => self.finish(),
            Some(Ok(_)) if self.inner.is_end_stream() => self.finish(),
            Some(Ok(_)) => {}
            // The request's body broke off: cancelled.
            Some(Err(_)) => self.guard = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Microseconds.
fn precise(at: jiff::Timestamp) -> HeaderValue {
    HeaderValue::from_str(&format!("{at:.6}")).expect("a timestamp is visible ASCII")
}

/// When the instance that gave this answer had its request's head.
pub(crate) fn received_at(headers: &HeaderMap) -> Option<jiff::Timestamp> {
    time_of(headers, "x-received-at")
}

/// When it began to listen, by the same clock.
pub(crate) fn listening_since(headers: &HeaderMap) -> Option<jiff::Timestamp> {
    time_of(headers, "x-listening-since")
}

fn time_of(headers: &HeaderMap, name: &str) -> Option<jiff::Timestamp> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
