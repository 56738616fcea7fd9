//! What is written down of a request when it ends, however it ends: metrics
//! and one line of the access log.
//!
//! An [`Account`] travels with the request and then with the answer's body. It
//! is closed by `complete`, or by being dropped: that is a caller who left,
//! code 499 as in nginx's log.

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use weir_control::model::{FunctionId, VersionId};

use crate::{
    access_log::{AccessLog, Line},
    server::OpenRequest,
    table::Deployed,
};

#[derive(Debug)]
pub struct Account {
    open: Option<Box<Open>>,
}

struct Open {
    /// Counts the request on its core and its connection, until it ends.
    _counted: OpenRequest,
    log: AccessLog,
    request_id: Uuid,
    peer: IpAddr,
    method: &'static str,
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
    pub fn open(
        log: AccessLog,
        counted: OpenRequest,
        request_id: Uuid,
        peer: IpAddr,
        method: &http::Method,
        arrived: Instant,
    ) -> Self {
        Self {
            open: Some(Box::new(Open {
                _counted: counted,
                log,
                request_id,
                peer,
                method: known(method),
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

    pub fn target(&mut self, function: FunctionId, version: Option<VersionId>) {
        if let Some(open) = &mut self.open {
            open.function = Some(function);
            open.version = version;
        }
    }

    pub fn deployed(&mut self, deployed: &Arc<Deployed>) {
        if let Some(open) = &mut self.open {
            open.version = Some(deployed.version);
            open.deployed = Some(deployed.clone());
        }
    }

    /// It has a slot, after a wait if it had to.
    pub fn dispatched(&mut self, waited: Option<Waited>) {
        if let Some(open) = &mut self.open {
            open.attempts += 1;
            open.dispatched = Some(Instant::now());
            if let Some(Waited { time, cold }) = waited {
                open.waited = Some(time);
                if let Some(deployed) = &open.deployed {
                    deployed.metrics.waited(time, cold);
                }
            }
        }
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
        }
    }

    /// The head of the answer is decided.
    pub fn answered(&mut self, status: http::StatusCode, error: Option<&'static str>) {
        if let Some(open) = &mut self.open {
            open.status = status.as_u16();
            open.error = error;
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
        self.log.write(|| Line {
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
        });
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
