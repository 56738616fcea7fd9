//! One attempt on one instance: a slot goes in, an answer and an [`Exchange`]
//! come out.
//!
//! The exchange owns the slot until the instance is done, and not merely until
//! Weir is: finished, the slot is free and keeps the connection; dropped
//! earlier, the connection's own task shuts the write side down, reads and
//! drops until the instance closes its side too (or `cancelTimeout` passes),
//! and only then is the slot free. An instance that ends work when its
//! connection closes so never has more requests than slots.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use metrics::Counter;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::{Instant, timeout},
};
use weir_control::{
    dial::{self, DialError, Link, Trust},
    model::InstanceId,
};
use weir_queue::Slot;

use crate::body::{Outgoing, Progress};

/// The most that is read ahead of a caller who reads slowly, and so the longest head of an answer; in bytes.
const BUFFER: usize = 64 << 10;
/// What an instance has to close its side of a connection that nobody needs any more.
const CLOSING: Duration = Duration::from_secs(5);

/// Where an instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    pub instance: InstanceId,
    pub address: SocketAddr,
    /// What its certificate has to be for, where it is called over TLS.
    pub name: Option<ServerName<'static>>,
    pub capacity: u32,
    pub draining: bool,
    /// When its process started: another one at the same address is another one.
    pub started: Option<Timestamp>,
    /// When that process first was healthy.
    pub healthy: Option<Timestamp>,
    /// Longest time a cancelled request may keep its slot.
    pub cancel_timeout: Duration,
}

pub type InstanceSlot = Slot<Arc<Backend>, Connection>;

/// An open connection to an instance; it belongs to a slot and travels with it.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Outgoing>,
    abandon: oneshot::Sender<Abandoned>,
    /// Written by the socket: whether what was written waits for the instance to read.
    blocked: Arc<AtomicBool>,
    /// When it was last of use.
    used: Instant,
}

/// What an attempt may take.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub connect: Duration,
    /// A connection that idled for longer is not used again: the instance may be closing it just now.
    pub idle: Duration,
}

/// What the connection's task gets when its exchange was dropped unfinished.
#[derive(Debug)]
struct Abandoned {
    /// Held until the instance has closed its side.
    slot: InstanceSlot,
    cancel_timeouts: Counter,
}

/// Why an attempt has no answer.
#[derive(Debug)]
pub enum Failure {
    /// Nothing was sent; the request is whole and may go elsewhere. The slot is still held, where nothing else
    /// holds it: mark the instance first, or the next waiter gets the same refusal.
    NotSent(Box<Request<Outgoing>>, Option<InstanceSlot>),
    /// Weir itself lacks what a connection takes, such as a file descriptor: nothing was sent, and the instance is
    /// not to blame.
    Short(std::io::Error),
    /// It was sent, in part at least, and may have had an effect.
    Lost,
}

/// A request that an instance has. See the module's head.
#[derive(Debug)]
pub struct Exchange {
    /// Taken by `finish` or by `drop`.
    inner: Option<(InstanceSlot, Connection)>,
    /// Of the request's body.
    progress: Arc<Progress>,
    cancel_timeouts: Counter,
}

/// Sends the request on the slot's connection, or on a new one.
pub async fn send(
    mut slot: InstanceSlot,
    mut request: Request<Outgoing>,
    times: Times,
    trust: &Trust,
    cancel_timeouts: &Counter,
) -> Result<(Response<Incoming>, Exchange), Failure> {
    loop {
        let (connection, reused) = match slot.take_connection() {
            Some(mut connection) if connection.used.elapsed() < times.idle => {
                // It is, unless the instance answered before it had read all of the last request.
                match timeout(times.connect, connection.sender.ready()).await {
                    Ok(Ok(())) => (connection, true),
                    Ok(Err(_)) | Err(_) => continue,
                }
            }
            Some(_) => continue,
            None => match connect(slot.target(), trust, times.connect).await {
                Ok(connection) => (connection, false),
                Err(Unconnected::Short(error)) => return Err(Failure::Short(error)),
                Err(Unconnected::Refused) => {
                    return Err(Failure::NotSent(Box::new(request), Some(slot)));
                }
            },
        };
        let progress = request.body().progress();
        let mut exchange = Exchange {
            inner: Some((slot, connection)),
            progress,
            cancel_timeouts: cancel_timeouts.clone(),
        };
        let Some((_, connection)) = &mut exchange.inner else {
            return Err(Failure::Lost);
        };
        match connection.sender.try_send_request(request).await {
            Ok(response) => return Ok((response, exchange)),
            Err(mut error) => match (error.take_message(), reused) {
                // The instance had closed the idle connection: the slot is still good.
                (Some(unsent), true) => {
                    request = unsent;
                    let Some((kept, _)) = exchange.inner.take() else {
                        return Err(Failure::Lost);
                    };
                    slot = kept;
                }
                (Some(unsent), false) => return Err(Failure::NotSent(Box::new(unsent), None)),
                (None, _) => return Err(Failure::Lost),
            },
        }
    }
}

enum Unconnected {
    /// Or not taken in time.
    Refused,
    Short(std::io::Error),
}

async fn connect(to: &Backend, trust: &Trust, limit: Duration) -> Result<Connection, Unconnected> {
    let tls = to.name.as_ref().map(|name| (trust, name));
    let stream = match timeout(limit, dial::connect(to.address, tls)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(DialError::Connect(error))) if is_own_shortage(&error) => {
            return Err(Unconnected::Short(error));
        }
        // What is wrong with its TLS, its health check tells.
        Ok(Err(_)) | Err(_) => return Err(Unconnected::Refused),
    };
    let blocked = Arc::new(AtomicBool::new(false));
    let stream = Noting {
        stream,
        blocked: blocked.clone(),
    };
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(BUFFER)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Unconnected::Refused)?;
    let (abandon, abandoned) = oneshot::channel();
    tokio::spawn(drive(connection, abandoned));
    Ok(Connection {
        sender,
        abandon,
        blocked,
        used: Instant::now(),
    })
}

/// Descriptors, ports or memory that ran out here.
fn is_own_shortage(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let short = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::ADDRNOTAVAIL,
        Errno::NOBUFS,
        Errno::NOMEM,
    ];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}

/// A connection that notes whether what was written waits. TLS takes more than the socket does, and a flush waits then.
#[derive(Debug)]
struct Noting {
    stream: Link,
    blocked: Arc<AtomicBool>,
}

impl Noting {
    fn noted<T>(&self, written: Poll<T>) -> Poll<T> {
        let waits = written.is_pending() || self.stream.holds_back();
        self.blocked.store(waits, Ordering::Release);
        written
    }
}

impl AsyncRead for Noting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Noting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.noted(written)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.noted(written)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.noted(flushed)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Drives one connection until it ends or its exchange is abandoned, then sees the instance off.
async fn drive(
    mut connection: http1::Connection<TokioIo<Noting>, Outgoing>,
    mut abandoned: oneshot::Receiver<Abandoned>,
) {
    let early = {
        let mut driven = std::pin::pin!(std::future::poll_fn(
            |cx| connection.poll_without_shutdown(cx)
        ));
        tokio::select! {
            _ = &mut driven => None,
            taken = &mut abandoned => match taken {
                Ok(taken) => Some(taken),
                // The sender is gone without an abandoned exchange: an idle connection was dropped. What is left to
                // be written may never be read.
                Err(_) => {
                    _ = timeout(CLOSING, driven).await;
                    None
                }
            },
        }
    };
    // From here on a slot that comes is held until this task ends.
    let mut stream = connection.into_parts().io.into_inner().stream;
    let limit = |a: &Abandoned| a.slot.target().cancel_timeout;
    let (held, closed) = match early {
        Some(held) => {
            let closed = timeout(limit(&held), see_off(&mut stream)).await.is_ok();
            (Some(held), closed)
        }
        None => {
            let closed = timeout(CLOSING, see_off(&mut stream)).await.is_ok();
            (abandoned.try_recv().ok(), closed)
        }
    };
    if !closed {
        if let Some(held) = &held {
            held.cancel_timeouts.increment(1);
        }
        // The instance keeps its side open: break the connection rather than leave it half closed.
        _ = socket2::SockRef::from(stream.socket()).set_linger(Some(Duration::ZERO));
    }
    drop(stream);
    drop(held);
}

/// Shuts the write side down, and reads and drops until the instance closes its side too. Over TLS its side is the
/// socket's: some libraries answer a close_notify by themselves, whatever goes on above them. What comes is read
/// meanwhile and not decrypted, since what is still to be written may wait for an instance that writes.
async fn see_off(stream: &mut Link) {
    let mut shut = false;
    let mut sink = [0_u8; 4096];
    std::future::poll_fn(|cx| {
        shut = shut || Pin::new(&mut *stream).poll_shutdown(cx).is_ready();
        loop {
            let mut dropped = ReadBuf::new(&mut sink);
            match ready!(Pin::new(stream.socket_mut()).poll_read(cx, &mut dropped)) {
                Ok(()) if !dropped.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    })
    .await;
}

impl Exchange {
    /// The answer's last byte has come: the slot is free, and keeps the connection if the request went out whole.
    pub fn finish(mut self) {
        let Some((slot, mut connection)) = self.inner.take() else {
            return;
        };
        // An instance may answer before it has read everything: what it did not read stands before the next request.
        let out = self.progress.sent() && !connection.blocked.load(Ordering::Acquire);
        if out && !connection.sender.is_closed() {
            connection.used = Instant::now();
            slot.release_with(connection);
        } else {
            self.inner = Some((slot, connection));
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some((slot, connection)) = self.inner.take() {
            let abandoned = Abandoned {
                slot,
                cancel_timeouts: self.cancel_timeouts.clone(),
            };
            // Where the task has ended, the instance has closed its side, and the slot is free at once.
            _ = connection.abandon.send(abandoned);
        }
    }
}
