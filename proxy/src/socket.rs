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
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use crate::activity::Activity;

/// hyper's half.
#[derive(Debug)]
pub struct CallerSocket {
    stream: Arc<TcpStream>,
}

/// The watch's half.
#[derive(Debug)]
pub struct HangUp(Arc<TcpStream>);

#[must_use]
pub fn share(stream: TcpStream) -> (CallerSocket, HangUp) {
    let stream = Arc::new(stream);
    let socket = CallerSocket {
        stream: stream.clone(),
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

    /// Waits for the first bytes without taking them: whether they begin HTTP/2. `None`: none came.
    pub async fn http2_preface(&self) -> Option<bool> {
        let mut first = [0; PREFACE.len()];
        loop {
            let seen = self.0.peek(&mut first).await.ok()?;
            match &first[..seen] {
                [] => return None,
                all if all == PREFACE => return Some(true),
                // A preface in pieces: the rest is on its way, or the head's time limit ends this.
                part if PREFACE.starts_with(part) => {
                    tokio::time::sleep(Duration::from_millis(5)).await
                }
                _ => return Some(false),
            }
        }
    }
}

impl AsyncRead for CallerSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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
}

impl CallerSocket {
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

/// A connection that tells of the bytes that come on it, for the time limits of heads. Over TLS that is after
/// decryption: a record need not carry any.
#[derive(Debug)]
pub struct Telling<S> {
    pub stream: S,
    pub activity: Arc<Activity>,
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
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
