//! The data listener: one acceptor deals connections to the cores, each core
//! serves its own.
//!
//! A connection goes to the core with the fewest open requests. hyper parses;
//! what it does not see of a connection is watched here: a caller that hangs
//! up while its request waits behind unread bytes, heads that never end, and
//! connections that idle.

use std::{
    convert::Infallible,
    future::poll_fn,
    net::{SocketAddr, TcpListener},
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response, StatusCode};
use hyper::{
    body::Incoming,
    service::{Service, service_fn},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{either::Either, task::TaskTracker};
use uuid::Uuid;

use crate::{
    account::Account,
    activity::{Activity, Phase, Watch},
    body::Answer,
    core::{Caller, Core, Scheme, Stopping},
    headers,
    invoke::invoke,
    metrics::Listener,
    refusal::Refusal,
    socket::{self, CallerSocket, Telling},
    target::Target,
    tls,
};

/// How many heads and bodies hyper may buffer for one connection, in bytes, unless a head may be longer.
const BUFFER: usize = 64 << 10;

/// Once the grace is over, this is left for telling those that still wait or run.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What a caller has for its first bytes once a stop has begun: it may have connected just before.
const LATE: Duration = Duration::from_secs(1);

/// A core's ear: connections come through it.
pub struct Desk {
    pub connections: mpsc::UnboundedSender<(std::net::TcpStream, SocketAddr)>,
    /// See [`Core::open`].
    pub open: Arc<AtomicUsize>,
}

/// Accepts until a stop begins, and deals.
pub async fn accept(
    listener: TcpListener,
    desks: Vec<Desk>,
    max_connections: usize,
    connections: Arc<AtomicUsize>,
    mut stopping: watch::Receiver<Stopping>,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut next = 0;
    let mut last = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = reached(&mut stopping, Stopping::Draining), if !last => {
                last = true;
                continue;
            }
            accepted = listener.accept() => accepted,
            // Those that were in the backlog when the stop began are served still.
            () = std::future::ready(()), if last => return Ok(()),
        };
        let accepted = accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer)));
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back instead of spinning. A stop waits for none.
                tracing::warn!(%error, "could not accept a connection");
                if last {
                    return Ok(());
                }
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if connections.load(Ordering::Relaxed) >= max_connections {
            // Closing is the clearest answer that costs nothing.
            continue;
        }
        // Ties go round, so that idle cores share.
        next = (next + 1) % desks.len();
        let desk = (0..desks.len())
            .map(|i| &desks[(next + i) % desks.len()])
            .min_by_key(|desk| desk.open.load(Ordering::Relaxed));
        if let Some(desk) = desk {
            _ = desk.connections.send((stream, peer));
        }
    }
}

/// Waits until a stop has come as far as `stage`.
pub async fn reached(stopping: &mut watch::Receiver<Stopping>, stage: Stopping) {
    // A sender that is gone has stopped long ago.
    _ = stopping.wait_for(|now| *now >= stage).await;
}

/// Serves the connections of one core until the stop is over. `open` has the connections of all cores: a core stays
/// as long as any is served, since what it opened to an instance may be of use to another core's request.
pub async fn serve(
    core: Arc<Core>,
    mut inbox: mpsc::UnboundedReceiver<(std::net::TcpStream, SocketAddr)>,
    open: TaskTracker,
    connections: Arc<AtomicUsize>,
) {
    let listening = open.token();
    let mut stopping = core.stopping.clone();
    // The acceptor goes when the stop begins, and the inbox ends with what it had dealt by then.
    while let Some((stream, peer)) = inbox.recv().await {
        let counted = Counted::new(&connections);
        let core = core.clone();
        open.spawn(async move {
            connection_task(core, stream, peer).await;
            drop(counted);
        });
    }
    drop(listening);
    open.close();
    tokio::select! {
        () = open.wait() => {}
        () = async {
            reached(&mut stopping, Stopping::Now).await;
            core.over.cancel();
            // For the answers that say so.
            sleep(LAST_WORDS).await;
        } => {}
    }
}

/// Counts something that is there, as long as it is.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A caller's connection, ready for HTTP.
struct Opened<S> {
    stream: S,
    hang_up: socket::HangUp,
    peer: SocketAddr,
    accepted: Instant,
    scheme: Scheme,
    http2: bool,
}

/// Each stage is boxed, so that a connection that idles holds the memory of what it is and not of all it could be.
async fn connection_task(core: Arc<Core>, stream: std::net::TcpStream, peer: SocketAddr) {
    let mut stopping = core.stopping.clone();
    let opened = tokio::select! {
        opened = timeout(core.settings.head_timeout, Box::pin(open(&core, stream, peer))) => opened,
        () = async {
            reached(&mut stopping, Stopping::Draining).await;
            sleep(LATE).await;
        } => return,
    };
    drop(stopping);
    // Two kinds of streams are two kinds of loops, so that neither asks at each read which one it is.
    match opened {
        Ok(Some(Either::Left(plain))) => serve_connection(core, plain).await,
        Ok(Some(Either::Right(tls))) => serve_connection(core, tls).await,
        Ok(None) | Err(_) => {}
    }
}

type Plain = Opened<CallerSocket>;
type Secured = Opened<Box<TlsStream<CallerSocket>>>;

/// Shakes hands where that is asked for, and finds out which protocol it is. `None`: the caller went, or can't.
async fn open(
    core: &Core,
    stream: std::net::TcpStream,
    peer: SocketAddr,
) -> Option<Either<Plain, Secured>> {
    let stream = tokio::net::TcpStream::from_std(stream).ok()?;
    _ = stream.set_nodelay(true);
    let (mut stream, hang_up) = socket::share(stream);
    let accepted = Instant::now();
    let scheme = match &core.tls {
        None => Scheme::Http,
        Some(_) if hang_up.first_byte().await? != tls::HANDSHAKE => Scheme::HttpOnTls,
        Some(tls) => {
            let Ok(stream) = tls.accept(stream).await else {
                core.metrics.handshake_failed(Listener::Data);
                return None;
            };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            return Some(Either::Right(Opened {
                stream: Box::new(stream),
                hang_up,
                peer,
                accepted,
                scheme: Scheme::Https,
                http2,
            }));
        }
    };
    let http2 = stream.http2_preface().await?;
    Some(Either::Left(Opened {
        stream,
        hang_up,
        peer,
        accepted,
        scheme,
        http2,
    }))
}

async fn serve_connection<S>(core: Arc<Core>, opened: Opened<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match opened.http2 {
        true => Box::pin(serve_http2(core, opened)).await,
        false => Box::pin(serve_http1(core, opened)).await,
    }
}

/// What hyper calls for each request of a connection.
fn service(
    core: &Arc<Core>,
    activity: &Arc<Activity>,
    peer: SocketAddr,
    scheme: Scheme,
) -> impl Service<
    Request<Incoming>,
    Response = Response<Answer>,
    Error = Infallible,
    Future = BoxFuture<'static, Result<Response<Answer>, Infallible>>,
> {
    let (core, activity) = (core.clone(), activity.clone());
    service_fn(move |request| {
        let counted = OpenRequest::new(&core, &activity);
        let core = core.clone();
        // Boxed: hyper keeps a place for it as long as the connection is there.
        async move { Ok(answer(&core, peer, scheme, request, counted).await) }.boxed()
    })
}

async fn serve_http2<S>(core: Arc<Core>, opened: Opened<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let activity = Arc::new(Activity::default());
    let settings = &core.settings;
    let (head, idle) = (settings.head_timeout, settings.idle_timeout);
    let mut watch = Watch::new(activity.clone(), opened.accepted, head, idle);
    let service = service(&core, &activity, opened.peer, opened.scheme);
    let mut stopping = core.stopping.clone();
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.h2_streams)
        .initial_stream_window_size(settings.h2_window)
        .initial_connection_window_size(settings.h2_window.max(1 << 20))
        .max_header_list_size(settings.max_head)
        .max_send_buf_size(BUFFER)
        .keep_alive_interval(Some(idle))
        .keep_alive_timeout(head);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(opened.stream), service));
    tokio::select! {
        _ = &mut connection => {}
        () = reached(&mut stopping, Stopping::Draining) => {
            connection.as_mut().graceful_shutdown();
            _ = connection.await;
        }
        // Its answer to a keep-alive PING does not make an unused connection a used one.
        () = poll_fn(|cx| watch.poll(cx)) => {
            if activity.phase() == Phase::New {
                return;
            }
            connection.as_mut().graceful_shutdown();
            // A request may have been on its way, and the end of an answer may wait for its reader.
            loop {
                tokio::select! {
                    _ = &mut connection => return,
                    () = sleep(idle) => if activity.phase() != Phase::Busy {
                        return;
                    }
                }
            }
        }
    }
}

async fn serve_http1<S>(core: Arc<Core>, opened: Opened<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let activity = Arc::new(Activity::default());
    let settings = &core.settings;
    let (head, idle) = (settings.head_timeout, settings.idle_timeout);
    let mut watch = Watch::new(activity.clone(), opened.accepted, head, idle);
    let service = service(&core, &activity, opened.peer, opened.scheme);
    let mut stopping = core.stopping.clone();
    let mut builder = hyper::server::conn::http1::Builder::new();
    let max_head = settings.max_head as usize;
    builder
        .max_buf_size(max_head.max(BUFFER))
        .max_header_size(max_head)
        .max_headers(settings.max_fields)
        .header_read_timeout(None)
        .keep_alive(true)
        .pipeline_flush(false);
    let stream = TokioIo::new(Telling::new(opened.stream, activity.clone(), unreadable));
    let mut connection = pin!(builder.serve_connection(stream, service));
    let (mut told, mut gone) = (false, false);
    loop {
        tokio::select! {
            biased;
            _ = &mut connection => return,
            // A FIN before the answer's end means that the caller left, as in nginx: dropping the connection drops
            // its request, and with that its place, its slot and its exchange.
            () = opened.hang_up.seen(), if !gone => {
                if activity.phase() == Phase::Busy {
                    return;
                }
                gone = true;
            }
            () = reached(&mut stopping, Stopping::Draining), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
            () = poll_fn(|cx| match gone && activity.phase() == Phase::Busy {
                // A further request that was sent before the FIN.
                true => Poll::Ready(()),
                false => watch.poll(cx),
            }) => return,
        }
    }
}

/// The answer to a head of HTTP/1 that can't be read, after which the connection closes.
pub fn unreadable(status: u16) -> Vec<u8> {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    raw(&Refusal::Unreadable(status))
}

/// A refusal as it goes over the wire where no request is served, after which the connection closes.
#[must_use]
pub fn raw(refusal: &Refusal) -> Vec<u8> {
    let (status, request_id) = (refusal.status(), Uuid::now_v7());
    let mut response = refusal.response(request_id);
    headers::mark(response.headers_mut(), request_id, status, false);
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n",
        response.body().len()
    )
    .into_bytes();
    for (name, value) in response.headers() {
        answer.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    answer.extend(b"\r\n");
    answer.extend(response.body());
    answer
}

/// A request that is open on a connection and on its core, until its answer's last byte.
pub struct OpenRequest {
    core: Arc<AtomicUsize>,
    activity: Arc<Activity>,
}

impl OpenRequest {
    fn new(core: &Core, activity: &Arc<Activity>) -> Self {
        core.open.fetch_add(1, Ordering::Relaxed);
        activity.begin();
        Self {
            core: core.open.clone(),
            activity: activity.clone(),
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.core.fetch_sub(1, Ordering::Relaxed);
        self.activity.end();
    }
}

/// From a request to its answer, whatever happens: the one place where refusals become answers.
async fn answer(
    core: &Arc<Core>,
    peer: SocketAddr,
    scheme: Scheme,
    request: Request<Incoming>,
    counted: OpenRequest,
) -> Response<Answer> {
    let caller = Caller {
        request_id: Uuid::now_v7(),
        peer: peer.ip(),
        scheme,
    };
    let (head, body) = request.into_parts();
    let mut account = Account::open(core, counted, &caller, &head);
    let target = match secured(scheme)
        .and_then(|()| headers::check(&head))
        .and_then(|()| headers::within(&head, &core.settings))
        .and_then(|()| Target::of(&head))
    {
        Ok(Some(target)) => target,
        Ok(None) => {
            let outcome = unidentified(core, head.uri.path());
            return own(core, outcome, caller, false, account);
        }
        Err(refusal) => return own(core, Err(refusal), caller, false, account),
    };
    account.target(&target);
    let request = Request::from_parts(head, body);
    // A panic costs its own request; what the request held is given back by its guards.
    let invoked = {
        let invoked = AssertUnwindSafe(invoke(core, &caller, target, request, &mut account));
        // Pinned here: given away it would have a second place.
        let invoked = pin!(invoked.catch_unwind());
        core.over.run_until_cancelled(invoked).await
    };
    let invoked = match invoked {
        Some(Ok(outcome)) => outcome,
        Some(Err(_)) => {
            tracing::error!(request_id = %caller.request_id, "an invocation panicked");
            Err(Refusal::Internal)
        }
        None => Err(Refusal::Draining),
    };
    match invoked {
        Ok(mut response) => {
            let status = response.status();
            headers::mark(response.headers_mut(), caller.request_id, status, true);
            response
        }
        Err(refusal) => own(core, Err(refusal), caller, true, account),
    }
}

/// Refuses what came without the TLS that is asked for.
fn secured(scheme: Scheme) -> Result<(), Refusal> {
    match scheme {
        Scheme::Http | Scheme::Https => Ok(()),
        Scheme::HttpOnTls => Err(Refusal::without_tls()),
    }
}

fn own(
    core: &Core,
    outcome: Result<Response<Bytes>, Refusal>,
    caller: Caller,
    identified: bool,
    mut account: Account,
) -> Response<Answer> {
    let left = matches!(outcome, Err(Refusal::BodyBrokeOff));
    let (mut response, error) = match outcome {
        Ok(response) => (response, None),
        Err(refusal) => (refusal.response(caller.request_id), Some(refusal.code())),
    };
    let status = response.status();
    if left {
        // Nobody reads what follows; the account says that by being dropped.
        drop(account);
    } else {
        if let Some(error) = error {
            core.metrics.refused(error);
        }
        account.answered(status, error);
        account.own(response.body().len() as u64);
    }
    headers::mark(
        response.headers_mut(),
        caller.request_id,
        status,
        identified,
    );
    response.map(|body| Answer::Own(Some(body)))
}

/// What names no function: Weir's own health, or nothing.
fn unidentified(core: &Core, path: &str) -> Result<Response<Bytes>, Refusal> {
    match path {
        "/healthz" => Ok(Response::new(Bytes::from_static(b"ok\n"))),
        "/readyz" => {
            let mut response = Response::new(Bytes::from_static(b"ready\n"));
            if *core.stopping.borrow() > Stopping::No {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                *response.body_mut() = Bytes::from_static(b"stopping\n");
            }
            Ok(response)
        }
        _ => Err(Refusal::NoFunction),
    }
}
