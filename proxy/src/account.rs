//! What is written down of a request when it ends, however it ends: metrics,
//! one line of the access log and, where it is sampled, its trace.
//!
//! An [`Account`] travels with the request and then with the answer's body. It
//! is closed by `complete`, or by being dropped: that is a caller who left,
//! code 499 as in nginx's log.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, request::Parts};
use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use weir_control::model::{FunctionId, VersionId};

use crate::{
    access_log::Line,
    core::{Caller, Core},
    server::OpenRequest,
    table::Deployed,
    target::Target,
    trace::{Context, Record, SpanId},
    upstream::Backend,
};

#[derive(Debug)]
pub struct Account {
    open: Option<Box<Open>>,
}

struct Open {
    /// Counts the request on its core and its connection, until it ends.
    _counted: OpenRequest,
    core: Arc<Core>,
    request_id: Uuid,
    peer: IpAddr,
    method: &'static str,
    trace: Context,
    /// Kept where the trace is sampled.
    record: Option<Box<Record>>,
    arrived: Instant,
    function: Option<FunctionId>,
    version: Option<VersionId>,
    deployed: Option<Arc<Deployed>>,
    /// From arrival to the slot.
    waited: Option<Duration>,
    dispatched: Option<Instant>,
    instance_took: Option<Duration>,
    attempts: u32,
    status: u16,
    error: Option<&'static str>,
    sent: u64,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} -> {}", self.request_id, self.status)
    }
}

/// What it took to get a slot.
#[derive(Debug, Clone, Copy)]
pub struct Waited {
    /// From the arrival.
    pub time: Duration,
    /// No instance was ready when it entered the queue.
    pub cold: bool,
}

/// The status of a request whose caller left.
const LEFT: u16 = 499;

impl Account {
    #[must_use]
    pub fn open(core: &Arc<Core>, counted: OpenRequest, caller: &Caller, head: &Parts) -> Self {
        let arrived = Instant::now();
        let trace = core.traces.begin(&head.headers);
        let method = known(&head.method);
        let record = trace.sampled().then(|| {
            Box::new(Record {
                context: trace,
                span: SpanId::random(),
                request_id: caller.request_id,
                peer: caller.peer,
                scheme: caller.scheme.spoken(),
                method,
                protocol: head.version,
                arrived: (arrived, SystemTime::now()),
                ended: arrived,
                path: None,
                version_named: false,
                function: None,
                version: None,
                status: LEFT,
                error: None,
                sent: 0,
                phases: Vec::new(),
            })
        });
        Self {
            open: Some(Box::new(Open {
                _counted: counted,
                core: core.clone(),
                request_id: caller.request_id,
                peer: caller.peer,
                method,
                trace,
                record,
                arrived,
                function: None,
                version: None,
                deployed: None,
                waited: None,
                dispatched: None,
                instance_took: None,
                attempts: 0,
                status: LEFT,
                error: None,
                sent: 0,
            })),
        }
    }

    pub fn target(&mut self, target: &Target) {
        if let Some(open) = &mut self.open {
            open.function = Some(target.function);
            open.version = target.version;
            if let Some(record) = &mut open.record {
                record.path = Some(target.path);
                record.version_named = target.version.is_some();
            }
        }
    }

    pub fn deployed(&mut self, deployed: &Arc<Deployed>) {
        if let Some(open) = &mut self.open {
            open.version = Some(deployed.version);
            open.deployed = Some(deployed.clone());
        }
    }

    /// It begins to wait for a slot.
    pub fn queued(&mut self, cold: bool) {
        if let Some(record) = self.record() {
            record.queued(cold);
        }
    }

    /// It has a slot, after a wait if it had to. The instance is told of the trace.
    pub fn dispatched(
        &mut self,
        waited: Option<Waited>,
        backend: &Backend,
        headers: &mut HeaderMap,
    ) {
        let Some(open) = &mut self.open else { return };
        open.attempts += 1;
        open.dispatched = Some(Instant::now());
        if let Some(Waited { time, cold }) = waited {
            open.waited = Some(time);
            if let Some(deployed) = &open.deployed {
                deployed.metrics.waited(time, cold);
            }
        }
        let span = SpanId::random();
        open.trace.tell(span, headers);
        if let Some(record) = &mut open.record {
            let started = backend.started.zip(backend.healthy);
            let secure = backend.name.is_some();
            record.attempt(span, (backend.instance, backend.address, secure), started);
        }
    }

    /// The instance took no connection.
    pub fn not_sent(&mut self) {
        if let Some(attempt) = self.record().and_then(Record::running) {
            attempt.refused = true;
            attempt.to = Some(Instant::now());
        }
    }

    fn record(&mut self) -> Option<&mut Record> {
        self.open.as_mut()?.record.as_deref_mut()
    }

    pub fn instance_done(&mut self) {
        if let Some(open) = &mut self.open
            && let (Some(dispatched), None) = (open.dispatched, open.instance_took)
        {
            let took = dispatched.elapsed();
            open.instance_took = Some(took);
            if let Some(deployed) = &open.deployed {
                deployed.served(took);
            }
            if let Some(attempt) = self.record().and_then(Record::running) {
                attempt.to = Some(Instant::now());
            }
        }
    }

    /// The head of the answer is decided.
    pub fn answered(&mut self, status: http::StatusCode, error: Option<&'static str>) {
        if let Some(open) = &mut self.open {
            open.status = status.as_u16();
            open.error = error;
            if let Some(attempt) = open.record.as_deref_mut().and_then(Record::running)
                && error.is_none()
            {
                attempt.status = Some(open.status);
            }
        }
    }

    pub fn sent(&mut self, bytes: u64) {
        if let Some(open) = &mut self.open {
            open.sent += bytes;
        }
    }

    /// Weir's own answer is ready, and so the request is over. Nobody asks for the body of an answer to HEAD.
    pub fn own(mut self, bytes: u64) {
        if let Some(open) = &mut self.open
            && open.method != "HEAD"
        {
            open.sent = bytes;
        }
        self.complete();
    }

    /// The instance's answer broke off, and why.
    pub fn broken(&mut self, why: &'static str) {
        if let Some(open) = &mut self.open {
            open.error = Some(why);
        }
        self.instance_done();
        self.complete();
    }

    /// Moves it to the answer's body; what is left writes nothing.
    #[must_use]
    pub fn take(&mut self) -> Self {
        Self {
            open: self.open.take(),
        }
    }

    /// The last byte is with hyper.
    pub fn complete(&mut self) {
        if let Some(open) = self.open.take() {
            open.close();
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some(mut open) = self.open.take() {
            open.status = LEFT;
            open.close();
        }
    }
}

impl Open {
    fn close(self: Box<Self>) {
        let duration = self.arrived.elapsed();
        if let Some(deployed) = &self.deployed {
            let instance = self
                .instance_took
                .or_else(|| self.dispatched.map(|at| at.elapsed()))
                .unwrap_or_default();
            let waited = self.waited.unwrap_or_default();
            let overhead = duration.saturating_sub(instance).saturating_sub(waited);
            deployed.metrics.invocation(self.status, duration, overhead);
        }
        self.core.log.write(|| Line {
            time: Timestamp::now(),
            status: self.status,
            method: self.method,
            duration,
            function: self.function,
            version: self.version,
            error: self.error,
            wait: self.waited,
            instance: self.instance_took,
            bytes: self.sent,
            attempts: self.attempts,
            peer: self.peer,
            request_id: self.request_id,
            trace_id: self.trace.trace,
        });
        // What names no function is no invocation.
        if let Some(mut record) = self.record
            && self.function.is_some()
        {
            record.ended = self.arrived + duration;
            record.function = self.function;
            record.version = self.version;
            record.status = self.status;
            record.error = self.error;
            record.sent = self.sent;
            self.core.traces.over(record);
        }
    }
}

/// A method's name, unless the caller made it up: such a one may say anything.
fn known(method: &http::Method) -> &'static str {
    [
        "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE",
    ]
    .into_iter()
    .find(|known| method.as_str() == *known)
    .unwrap_or("_OTHER")
}
