//! Asks instances how they are. [`Probes`] while one starts: often, and
//! overlapping, so that a probe that hangs does not delay the next. [`Watch`]
//! from then on.

use std::{fmt, future::poll_fn, net::SocketAddr, pin::Pin, task::Poll, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::time::{Instant, sleep_until, timeout};

use crate::{
    dial::{DialError, Trust, connect},
    model::Health,
};

/// In flight at a time while an instance starts.
const OVERLAP: usize = 6;
/// An instance that nobody listens for any more is noticed within a second.
const WATCH_EVERY: Duration = Duration::from_millis(900);
/// Misses in a row are not counted more often.
const MISS_EVERY: Duration = Duration::from_millis(800);
const DOUBT_EVERY: Duration = Duration::from_millis(100);
/// A proxy that could not connect is waiting for this answer.
const SUSPECT_TIMEOUT: Duration = Duration::from_secs(1);
const MISSES: u32 = 3;

#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error("not asked yet")]
    NotAsked,
    #[error("connection refused")]
    Refused,
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("status {0} and not {1}")]
    Status(u16, u16),
    #[error("timed out after {0:?}")]
    TimedOut(Duration),
    /// Over TLS; says all by itself.
    #[error("{0}")]
    Tls(String),
    #[error("no HTTP answer: {0}")]
    Http(String),
    #[error("the health check is not a valid request: {0}")]
    Request(String),
}

/// One instance's health check.
#[derive(Clone, Debug)]
pub(super) struct Check {
    pub(super) address: SocketAddr,
    host: String,
    tls: Option<(Trust, ServerName<'static>)>,
    uri: String,
    expected: u16,
    timeout: Duration,
}

/// Where it asks, and what it hopes for.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.host, self.uri)
    }
}

type Probe = Pin<Box<dyn Future<Output = Result<(), ProbeError>> + Send>>;

impl Check {
    pub(super) fn new(health: &Health, address: SocketAddr, host: String) -> Self {
        Self {
            address,
            host,
            tls: None,
            uri: match health.uri.starts_with('/') {
                true => health.uri.clone(),
                false => format!("/{}", health.uri),
            },
            expected: health.expected_status_code,
            timeout: health
                .timeout
                .min(Health::MAX_TIMEOUT)
                .0
                .max(Duration::from_millis(1)),
        }
    }

    pub(super) fn over_tls(self, trust: Trust, name: ServerName<'static>) -> Self {
        Self {
            tls: Some((trust, name)),
            ..self
        }
    }

    fn probe(&self, limit: Duration) -> Probe {
        let check = self.clone();
        Box::pin(async move {
            timeout(limit, check.ask())
                .await
                .unwrap_or(Err(ProbeError::TimedOut(limit)))
        })
    }

    async fn ask(&self) -> Result<(), ProbeError> {
        let request = Request::get(&self.uri)
            .header(header::HOST, &self.host)
            .header(header::USER_AGENT, "weir-agent")
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|e| ProbeError::Request(e.to_string()))?;
        let tls = self.tls.as_ref().map(|(trust, name)| (trust, name));
        let stream = connect(self.address, tls).await.map_err(|e| match e {
            DialError::Connect(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                ProbeError::Refused
            }
            DialError::Connect(e) => ProbeError::Connect(e.to_string()),
            DialError::Tls(why) => ProbeError::Tls(why),
        })?;
        let http = |e: hyper::Error| ProbeError::Http(e.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(http)?;
        let mut connection = Box::pin(connection);
        let mut answer = Box::pin(sender.send_request(request));
        // A connection may end in the same breath as it delivers the answer.
        let mut open = true;
        let response = loop {
            tokio::select! {
                biased;
                response = &mut answer => break response.map_err(http)?,
                _ = &mut connection, if open => open = false,
            }
        };
        let status = response.status();
        // The status is the answer; the rest is read so that the server is not
        // told of a broken connection, a little of it and for a little while.
        tokio::spawn(timeout(Duration::from_secs(1), async move {
            let body = Limited::new(response.into_body(), 64 << 10).collect();
            tokio::select! {
                _ = body => (),
                _ = connection, if open => (),
            }
        }));
        if StatusCode::from_u16(self.expected).is_ok_and(|expected| expected == status) {
            Ok(())
        } else {
            Err(ProbeError::Status(status.as_u16(), self.expected))
        }
    }
}

/// Time between probes, so long after the start: an instance that becomes
/// ready is noticed within 20 ms in the first 10 s, then within 2% of the time
/// since its start, and within a second at most.
fn interval(since: Duration) -> Duration {
    if since < Duration::from_secs(10) {
        return Duration::from_millis(10);
    }
    since
        .mul_f64(0.015)
        .clamp(Duration::from_millis(10), Duration::from_millis(900))
}

/// Which probe to give up for a new one, of these starts in order. The oldest
/// stays (it is first in a queue that has formed), and so do others at growing
/// distances, so that one that takes long has its chance too.
fn victim(starts: &[Instant], now: Instant) -> usize {
    let age = |at: usize| now.saturating_duration_since(starts[at]).as_secs_f64() + 1e-6;
    (1..starts.len().saturating_sub(1))
        .min_by(|&a, &b| (age(a - 1) / age(a + 1)).total_cmp(&(age(b - 1) / age(b + 1))))
        .unwrap_or(0)
}

/// Probes of an instance that starts.
pub(super) struct Probes {
    pub(super) check: Check,
    started: Instant,
    next: Instant,
    flight: Vec<(Instant, Probe)>,
    pub(super) last: ProbeError,
}

impl Probes {
    pub(super) fn new(check: Check, started: Instant) -> Self {
        Self {
            check,
            started,
            next: started,
            flight: Vec::new(),
            last: ProbeError::NotAsked,
        }
    }

    /// Ends when one passes. May be dropped and called again.
    pub(super) async fn passed(&mut self) {
        loop {
            let landed = poll_fn(|cx| {
                for at in 0..self.flight.len() {
                    if let Poll::Ready(result) = self.flight[at].1.as_mut().poll(cx) {
                        drop(self.flight.remove(at));
                        return Poll::Ready(result);
                    }
                }
                Poll::Pending
            });
            tokio::select! {
                biased;
                result = landed => match result {
                    Ok(()) => return self.clear(),
                    Err(error) => self.last = error,
                },
                () = sleep_until(self.next) => self.launch(),
            }
        }
    }

    /// Gives up what is in flight: a connection nobody attends to could hold
    /// up a server that serves one at a time.
    pub(super) fn clear(&mut self) {
        self.flight.clear();
    }

    fn launch(&mut self) {
        let now = Instant::now();
        self.next = now + interval(now - self.started);
        if self.flight.len() >= OVERLAP {
            let starts: Vec<Instant> = self.flight.iter().map(|(at, _)| *at).collect();
            drop(self.flight.remove(victim(&starts, now)));
            self.last = ProbeError::TimedOut(now - starts[0]);
        }
        self.flight
            .push((now, self.check.probe(self.check.timeout)));
    }
}

/// What a [`Watch`] says.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    Well,
    /// A proxy's suspicion is right, or nobody listens.
    Doubtful(ProbeError),
    /// Failed several times in a row.
    Ill(ProbeError),
}

/// A question to a watched instance.
struct Asked {
    /// By a proxy's suspicion.
    suspected: bool,
    answer: Probe,
}

/// Asks an instance that was ready, about every second, whether it still
/// hangs on an earlier question or not.
pub(super) struct Watch {
    check: Check,
    next: Instant,
    flight: Vec<Asked>,
    misses: u32,
    /// When the last miss was counted.
    missed: Option<Instant>,
}

impl Watch {
    pub(super) fn new(check: Check) -> Self {
        Self {
            check,
            next: Instant::now() + WATCH_EVERY,
            flight: Vec::new(),
            misses: 0,
            missed: None,
        }
    }

    /// A proxy could not connect: ask now.
    pub(super) fn suspect(&mut self) {
        if !self.flight.iter().any(|asked| asked.suspected) {
            let limit = self.check.timeout.min(SUSPECT_TIMEOUT);
            self.ask(true, limit);
        }
    }

    fn ask(&mut self, suspected: bool, limit: Duration) {
        let answer = self.check.probe(limit);
        self.flight.push(Asked { suspected, answer });
    }

    /// May be dropped and called again.
    pub(super) async fn verdict(&mut self) -> Verdict {
        loop {
            // What could not be the last miss in a row is not asked: so many hang at a time at most.
            let may_ask = self.flight.len() < MISSES as usize;
            let landed = poll_fn(|cx| {
                for at in 0..self.flight.len() {
                    if let Poll::Ready(result) = self.flight[at].answer.as_mut().poll(cx) {
                        return Poll::Ready((self.flight.remove(at).suspected, result));
                    }
                }
                Poll::Pending
            });
            let (suspected, result) = tokio::select! {
                biased;
                landed = landed => landed,
                () = sleep_until(self.next), if may_ask => {
                    self.next = Instant::now() + WATCH_EVERY;
                    self.ask(false, self.check.timeout);
                    continue;
                }
            };
            let now = Instant::now();
            let Err(error) = result else {
                // Whatever was asked before hangs for another reason, or on its way.
                self.flight.clear();
                (self.misses, self.missed) = (0, None);
                self.next = now + WATCH_EVERY;
                return Verdict::Well;
            };
            // Not each of many refusals in a second: what starts anew has a moment for it.
            if self.missed.is_none_or(|last| now - last >= MISS_EVERY) {
                self.misses += 1;
                self.missed = Some(now);
            }
            if self.misses >= MISSES {
                return Verdict::Ill(error);
            }
            // Nobody listens there, and so nobody is to be sent there.
            if suspected || matches!(error, ProbeError::Refused) {
                self.next = self.next.min(now + DOUBT_EVERY);
                return Verdict::Doubtful(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_come_often_enough() {
        let mut since = Duration::ZERO;
        while since < Duration::from_secs(600) {
            let gap = interval(since);
            let bound = match since < Duration::from_secs(10) {
                true => Duration::from_millis(20),
                false => since.mul_f64(0.02).min(Duration::from_secs(1)),
            };
            assert!(gap < bound, "{since:?}: {gap:?}");
            since += gap;
        }
    }

    fn check(address: SocketAddr, timeout: u64) -> Check {
        let health = Health {
            protocol: crate::model::HealthProtocol::HTTP,
            uri: "/".into(),
            port: None,
            timeout: crate::model::IsoDuration::secs(timeout),
            expected_status_code: 200,
        };
        Check::new(&health, address, "x".into())
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_is_given_up_after_one_timeout_not_three() {
        // The kernel takes the connections, and nobody ever answers.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let began = Instant::now();
        let mut watch = Watch::new(check(listener.local_addr().unwrap(), 10));
        let Verdict::Ill(error) = watch.verdict().await else {
            panic!("neither well nor doubtful");
        };
        assert!(matches!(error, ProbeError::TimedOut(_)), "{error}");
        assert_eq!(
            began.elapsed().as_secs(),
            12,
            "of a clock that stands still"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_timeout_has_a_bound() {
        let check = check("127.0.0.1:1".parse().unwrap(), 360_000);
        assert_eq!(check.timeout, Health::MAX_TIMEOUT.0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_listens_for_is_doubtful_at_once() {
        // Bound, and not listening.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let began = Instant::now();
        let mut watch = Watch::new(check(socket.local_addr().unwrap(), 10));
        let first = watch.verdict().await;
        assert!(matches!(first, Verdict::Doubtful(ProbeError::Refused)));
        assert!(began.elapsed() < Duration::from_secs(1));
        // Three misses, and not three of the many in one second.
        let mut doubts = 1;
        while !matches!(watch.verdict().await, Verdict::Ill(ProbeError::Refused)) {
            doubts += 1;
        }
        assert!(doubts > 10, "{doubts}");
        // It is back.
        drop(watch);
        let listener = socket.listen(8).unwrap();
        let mut watch = Watch::new(check(listener.local_addr().unwrap(), 10));
        let answering = async {
            use tokio::io::AsyncWriteExt as _;
            let (hangs, _) = listener.accept().await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            let well = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(well).await.unwrap();
            (hangs, stream)
        };
        let (verdict, _open) = tokio::join!(watch.verdict(), answering);
        assert!(matches!(verdict, Verdict::Well), "{verdict:?}");
        assert!(watch.flight.is_empty());
    }

    #[test]
    fn old_probes_thin_out_and_some_live_long() {
        let zero = Instant::now();
        let mut starts = Vec::new();
        for n in 0..200_u32 {
            let now = zero + Duration::from_millis(10) * n;
            if starts.len() >= OVERLAP {
                starts.remove(victim(&starts, now));
            }
            starts.push(now);
        }
        assert_eq!(starts[0], zero);
        let ages: Vec<_> = starts.iter().map(|s| starts[OVERLAP - 1] - *s).collect();
        // Someone between a twentieth and four fifths of the oldest's age.
        assert!(
            ages.iter().any(|a| (100..1600).contains(&a.as_millis())),
            "{ages:?}"
        );
    }
}
