//! What one core has to serve its connections with. Cores share the routing
//! table and the queues, and nothing else that is written on the path.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, header};
use jiff::Timestamp;
use tokio::{runtime::Handle, sync::watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weir_control::{
    auth::{self, Denied},
    dial::Trust,
    directory::Directory,
    model::{FunctionId, Key},
};

use crate::{
    access_log::AccessLog, limit::Limits, metrics::ProcessMetrics, refusal::Refusal, table::Table,
    trace::Traces, upstream::Times,
};

pub struct Core {
    pub index: usize,
    pub table: Arc<Table>,
    pub keys: Keys,
    pub limits: Arc<Limits>,
    pub budget: RetryBudget,
    pub log: AccessLog,
    pub traces: Traces,
    pub metrics: Arc<ProcessMetrics>,
    pub settings: Arc<Settings>,
    /// Where the data plane speaks TLS.
    pub tls: Option<TlsAcceptor>,
    /// Whose certificates instances may show.
    pub trust: Trust,
    /// Requests that are open on this core; the acceptor gives the next connection to the core with the fewest.
    pub open: Arc<AtomicUsize>,
    pub stopping: watch::Receiver<Stopping>,
    /// Cancelled at [`Stopping::Now`], for what would be dear to watch for with each request.
    pub over: CancellationToken,
    pub runtime: Handle,
}

/// How far a stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stopping {
    No,
    /// `/readyz` says so; everything goes on.
    Announced,
    /// No new connections; what is open is served, and told to close after that.
    Draining,
    /// The grace is over: what still runs is broken off.
    Now,
}

/// What the operator allows; see the flags of `weir serve`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of one head.
    pub max_head: u32,
    /// Fields of one head.
    pub max_fields: usize,
    /// Bytes of a path and query.
    pub max_uri: u64,
    /// Bytes of one body.
    pub max_body: u64,
    /// From accept, or from a later head's first byte, to the head's end.
    pub head_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
    /// Of connections to instances.
    pub instances: Times,
    /// From the slot to the answer's last byte; the wait before has limits of its own.
    pub request_timeout: Duration,
    /// Open at a time on one HTTP/2 connection.
    pub h2_streams: u32,
    /// Bytes that may be on their way on one HTTP/2 stream.
    pub h2_window: u32,
}

/// Who sent a request, before anything is known of what it says.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    pub request_id: Uuid,
    pub peer: IpAddr,
    pub scheme: Scheme,
}

/// How a caller speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
    /// HTTP where TLS is asked for: it is told so.
    HttpOnTls,
}

impl Scheme {
    /// As URLs have it.
    #[must_use]
    pub fn spoken(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http | Self::HttpOnTls => "http",
        }
    }
}

impl Core {
    /// Runs something small beside the requests, on this core.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }
}

/// Which keys are good, and for what.
#[derive(Clone)]
pub struct Keys {
    pub directory: Arc<Directory>,
    /// The key of `WEIR_ADMIN_KEY`, where there is one.
    pub admin: Option<Arc<Key>>,
    /// Set by `--auth none`: everyone is this key.
    pub open: Option<Arc<Key>>,
}

impl Keys {
    pub fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Key>, Refusal> {
        if let Some(open) = &self.open {
            return Ok(open.clone());
        }
        let credential = headers.get(header::AUTHORIZATION);
        auth::authenticate(
            &self.directory,
            self.admin.as_ref(),
            credential,
            Timestamp::now(),
        )
        .map_err(|denied| {
            Refusal::Unauthenticated(match denied {
                Denied::Missing => "There is no key.",
                Denied::Unknown => "The key is unknown or revoked.",
                Denied::Expired => "The key has expired.",
            })
        })
    }

    /// To be asked once it is clear that the key's account may know of the function.
    pub fn may_invoke(&self, key: &Key, function: FunctionId) -> Result<(), Refusal> {
        if !auth::allows(key, "invoke_function") {
            return Err(Refusal::Forbidden(
                "The key lacks the scope invoke_function. Use one that has it.".into(),
            ));
        }
        match &key.functions {
            Some(functions) if !functions.contains(&function) => Err(Refusal::Forbidden(
                "The key is for other functions. Use one that may name this function.".into(),
            )),
            _ => Ok(()),
        }
    }
}

/// Retries may be a fifth of the requests, and ten more: what keeps a broken fleet from doubling its own load
/// (as in linkerd).
#[derive(Debug)]
pub struct RetryBudget(AtomicI64);

const RETRY: i64 = 5;
const MOST: i64 = 100 * RETRY;

impl Default for RetryBudget {
    fn default() -> Self {
        Self(AtomicI64::new(10 * RETRY))
    }
}

impl RetryBudget {
    pub fn deposit(&self) {
        if self.0.load(Ordering::Relaxed) < MOST {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[must_use]
    pub fn withdraw(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                (left >= RETRY).then_some(left - RETRY)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_fifth_of_the_requests_and_ten_more() {
        let budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10);
        for _ in 0..50 {
            budget.deposit();
        }
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10);
    }
}
