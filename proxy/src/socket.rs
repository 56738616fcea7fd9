//! A caller's socket, shared between hyper, which reads and writes it, and the
//! watch that sees the caller hang up.
//!
//! hyper reads the socket no further than someone reads the body, so it does
//! not see a FIN behind a pipelined request or a body that is not read on. The
//! kernel does (`EPOLLRDHUP`) once the FIN has arrived, and tokio keeps that
//! bit apart from readability. A FIN behind bytes that no longer fit the
//! receive buffer can't arrive: that is why a waiting body is read on.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use crate::activity::{Activity, Phase};

/// hyper's half.
#[derive(Debug)]
pub struct CallerSocket {
    stream: Arc<TcpStream>,
    /// Read before hyper was there, and given to it first.
    first: First,
}

/// What a connection begins with, as far as it was read to tell one protocol from another.
#[derive(Debug, Default)]
struct First {
    bytes: [u8; PREFACE.len()],
    /// Of those, the ones not given on yet.
    left: std::ops::Range<usize>,
}

/// The watch's half.
#[derive(Debug)]
pub struct HangUp(Arc<TcpStream>);

#[must_use]
pub fn share(stream: TcpStream) -> (CallerSocket, HangUp) {
    let stream = Arc::new(stream);
    let socket = CallerSocket {
        stream: stream.clone(),
        first: First::default(),
    };
    (socket, HangUp(stream))
}

impl HangUp {
    /// Ends when the caller has closed its sending side or the connection broke.
    pub async fn seen(&self) {
        // PRIORITY waits for urgent data or for the read side's end; no HTTP caller sends the first.
        while let Ok(ready) = self.0.ready(Interest::PRIORITY).await {
            if ready.is_read_closed() {
                return;
            }
            // Urgent data: clear the bit, or this would spin.
            _ = self.0.try_io(Interest::PRIORITY, || {
                Err::<(), _>(io::ErrorKind::WouldBlock.into())
            });
        }
    }
}

/// What every HTTP/2 connection with prior knowledge begins with; no HTTP/1 head can.
const PREFACE: &[u8; 8] = b"PRI * HT";

impl HangUp {
    /// Waits for the first byte without taking it. `None`: none came.
    pub async fn first_byte(&self) -> Option<u8> {
        let mut first = [0];
        (self.0.peek(&mut first).await.ok()? > 0).then_some(first[0])
    }
}

impl AsyncRead for CallerSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let first = &mut self.first;
        if !first.left.is_empty() {
            let given = first.left.len().min(buf.remaining());
            buf.put_slice(&first.bytes[first.left.start..][..given]);
            first.left.start += given;
            // What came behind it goes along: hyper's buffer grows where a piece comes first.
            return match self.poll_socket(cx, buf) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
            };
        }
        self.poll_socket(cx, buf)
    }
}

impl CallerSocket {
    fn poll_socket(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            let wanted = room.len();
            let mut got = None;
            // A read that did not fill the buffer has emptied the socket: saying so here (as tokio's own
            // reader does) saves the read that would only find nothing.
            let outcome = self.stream.try_io(Interest::READABLE, || {
                let n = rustix::io::read(&*self.stream, &mut *room)?;
                got = Some(n);
                if 0 < n && n < wanted {
                    Err(io::ErrorKind::WouldBlock.into())
                } else {
                    Ok(())
                }
            });
            match (got, outcome) {
                (Some(n), _) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                (None, outcome) => return Poll::Ready(outcome),
            }
        }
    }

    /// Reads until it is clear whether this is HTTP/2. `None`: the caller went before.
    pub async fn http2_preface(&mut self) -> Option<bool> {
        loop {
            self.stream.readable().await.ok()?;
            let seen = self.first.left.end;
            match self.stream.try_read(&mut self.first.bytes[seen..]) {
                Ok(0) => return None,
                Ok(more) => self.first.left.end += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return None,
            }
            let seen = &self.first.bytes[self.first.left.clone()];
            if seen == PREFACE {
                return Some(true);
            }
            if !PREFACE.starts_with(seen) {
                return Some(false);
            }
        }
    }

    fn poll_io(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match write(&self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }
}

impl AsyncWrite for CallerSocket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_io(cx, |stream| stream.try_write(buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_io(cx, |stream| stream.try_write_vectored(bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

/// A connection that tells of the bytes that come and go on it, for the time limits, and answers what hyper can't
/// read. Over TLS that is above encryption: a record need not carry any byte of a head.
#[derive(Debug)]
pub struct Telling<S> {
    stream: S,
    activity: Arc<Activity>,
    /// Makes the answer to a head that hyper can't read, by its status.
    unreadable: fn(u16) -> Vec<u8>,
    /// Requests that had come when nothing was left to write and none was open.
    quiet: usize,
    /// What is left of the answer to a head that hyper can't read.
    sending: Vec<u8>,
}

impl<S> Telling<S> {
    #[must_use]
    pub fn new(stream: S, activity: Arc<Activity>, unreadable: fn(u16) -> Vec<u8>) -> Self {
        Self {
            stream,
            activity,
            unreadable,
            quiet: 0,
            sending: Vec::new(),
        }
    }

    /// The answer in place of hyper's own, where `bytes` are one. hyper answers a head that it can't read without
    /// asking anybody, and nothing else writes a head while no request is open and all answers have gone out.
    fn instead(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        if self.activity.phase() == Phase::Busy || self.activity.turns() != self.quiet {
            return None;
        }
        let status = bytes.strip_prefix(b"HTTP/1.")?.get(2..5)?;
        let status = std::str::from_utf8(status).ok()?.parse().ok()?;
        (400..500)
            .contains(&status)
            .then(|| (self.unreadable)(status))
    }

    fn told<T>(&self, written: Poll<T>) -> Poll<T> {
        self.activity.wrote(written.is_ready());
        written
    }
}

impl<S: AsyncWrite + Unpin> Telling<S> {
    /// Sends it in place of all of `bytes`, if they are hyper's own answer. `None`: they are not.
    fn poll_instead(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Option<Poll<io::Result<usize>>> {
        if self.sending.is_empty() {
            self.sending = self.instead(bytes)?;
        }
        while !self.sending.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.sending) {
                Poll::Ready(Ok(sent)) => drop(self.sending.drain(..sent)),
                other => return Some(other),
            }
        }
        Some(Poll::Ready(Ok(bytes.len())))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Telling<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.activity.bytes_came();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Telling<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(instead) = self.poll_instead(cx, buf) {
            return self.told(instead);
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.told(written)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [head] = bufs
            && let Some(instead) = self.poll_instead(cx, head)
        {
            return self.told(instead);
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.told(written)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() && self.activity.phase() != Phase::Busy {
            self.quiet = self.activity.turns();
        }
        self.told(flushed)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
