//! Traces: which one a request belongs to, and its spans for a collector that
//! speaks OTLP.
//!
//! A request's [`Context`] is made when its head is there, and every attempt
//! on an instance tells it on. Where a request is sampled, its account keeps a
//! [`Record`] of what happened when. Once the request is over that goes to a
//! thread of its own ([`export`]), which makes spans of it ([`spans`]); so no
//! request waits for a collector, and one that is not sampled costs a branch.
//!
//! Of what a caller sends a record holds nothing but the method and the trace's
//! IDs: paths, queries, hosts and fields may have secrets in them.

mod context;
mod export;
mod record;
mod spans;

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use metrics::Counter;
use tokio::time::timeout;

pub use context::{Context, SpanId, TraceId};
pub use export::endpoint;
pub use record::{Attempt, Phase, Queue, Record, Start};

use export::Exporter;

/// Which requests are sampled, and where their records go.
#[derive(Clone)]
pub struct Traces(Option<Arc<Open>>);

struct Open {
    /// A new trace is sampled where half its ID's lower half is less: all samplers of a ratio agree on an ID.
    threshold: u64,
    exporter: Exporter,
}

impl Traces {
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Exports to this endpoint, one that [`endpoint`] has checked. `sample` is the part of the requests without a
    /// trace of their own, 0 to 1; `dropped` counts the traces that are lost.
    pub fn to(endpoint: &str, sample: f64, dropped: Counter) -> anyhow::Result<Self> {
        Ok(Self(Some(Arc::new(Open {
            threshold: (sample * (1_u64 << 63) as f64) as u64,
            exporter: Exporter::start(endpoint, dropped)?,
        }))))
    }

    /// The trace that a request with these fields is part of.
    #[must_use]
    pub fn begin(&self, headers: &HeaderMap) -> Context {
        let threshold = self.0.as_ref().map_or(0, |open| open.threshold);
        Context::of(headers, self.0.is_some(), |TraceId(id)| {
            (id as u64) >> 1 < threshold
        })
    }

    /// A sampled request is over.
    pub fn over(&self, record: Box<Record>) {
        if let Some(open) = &self.0 {
            open.exporter.take(record);
        }
    }

    /// Returns when every record so far was exported or dropped, or the time is over. Later ones are dropped.
    pub async fn close(&self, limit: Duration) {
        if let Some(open) = &self.0 {
            // What did not get out in time is lost, and counted nowhere: the process ends.
            _ = timeout(limit, open.exporter.close()).await;
        }
    }
}
