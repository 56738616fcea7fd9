//! The admin listener: the API, the metrics and the health checks, on a thread
//! of their own, so that a long list holds up no invocation.
//!
//! Its connections have the data plane's time limits for heads and idling, and
//! a bound of their own: they take from the same files.

use std::{
    convert::Infallible, future::poll_fn, net::TcpListener, pin::pin, sync::Arc, time::Duration,
};

use axum::Router;
use hyper::{Request, body::Incoming, service::Service, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use metrics::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    activity::{Activity, Watch},
    refusal::Refusal,
    server,
    socket::Telling,
    tls,
};

/// Open at a time; further ones are closed.
const CONNECTIONS: usize = 1000;

#[derive(Clone)]
pub struct Admin {
    pub router: Router,
    /// Where it speaks TLS.
    pub tls: Option<TlsAcceptor>,
    pub head_timeout: Duration,
    pub idle_timeout: Duration,
    pub handshakes_failed: Counter,
}

/// A request that is open, as long as it is.
struct Open(Arc<Activity>);

impl Open {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.begin();
        Self(activity.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Admin {
    /// Serves until its runtime ends.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<Infallible> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: wait for some to come back instead of spinning.
                    tracing::warn!(%error, "the admin listener could not accept a connection");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                continue;
            };
            let admin = self.clone();
            tokio::spawn(async move {
                admin.connection(stream).await;
                drop(place);
            });
        }
    }

    async fn connection(&self, mut stream: TcpStream) {
        let accepted = Instant::now();
        _ = stream.set_nodelay(true);
        let Some(acceptor) = &self.tls else {
            return self.http(stream, accepted).await;
        };
        let handshake = async {
            let mut first = [0];
            if stream.peek(&mut first).await.is_ok_and(|n| n == 1) && first[0] != tls::HANDSHAKE {
                _ = stream
                    .write_all(&server::raw(&Refusal::without_tls()))
                    .await;
                return None;
            }
            let secured = acceptor.accept(stream).await;
            if secured.is_err() {
                self.handshakes_failed.increment(1);
            }
            secured.ok()
        };
        if let Ok(Some(stream)) = timeout(self.head_timeout, handshake).await {
            self.http(stream, accepted).await;
        }
    }

    async fn http<S>(&self, stream: S, accepted: Instant)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = Arc::new(Activity::default());
        let (head, idle) = (self.head_timeout, self.idle_timeout);
        let mut watch = Watch::new(activity.clone(), accepted, head, idle);
        let stream = Telling::new(stream, activity.clone(), server::unreadable);
        let router = TowerToHyperService::new(self.router.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let open = Open::new(&activity);
            let answer = router.call(request);
            async move {
                let answer = answer.await;
                drop(open);
                answer
            }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().header_read_timeout(None);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_timeout(head);
        tokio::select! {
            _ = pin!(builder.serve_connection(TokioIo::new(stream), service)) => {}
            () = poll_fn(|cx| watch.poll(cx)) => {}
        }
    }
}
