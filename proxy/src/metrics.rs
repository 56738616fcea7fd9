//! Every metric, in one place: names, help texts, and the handles that the
//! request path uses.
//!
//! A handle is looked up once and lives as long as its deployment; nothing
//! here formats a label per request. The page shows the series of what is
//! there now. A series that nothing has touched for a day is forgotten, so
//! that functions which come and go leave nothing behind.

mod lazy;
mod page;

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use metrics_process::Collector;
use metrics_util::MetricKindMask;
use weir_control::{
    model::{FunctionId, InstanceState, VersionId},
    scale::Reason,
};

use lazy::LazyHistogram;
pub use page::Series;

static METADATA: Metadata<'static> = Metadata::new("weir", Level::INFO, None);

/// What is not touched for so long is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Seconds; short answers and long generations alike, in 12 buckets.
const SECONDS: &[f64] = &[
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0,
];
/// Seconds; what the proxy or the store itself costs.
const SHORT_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0,
];

const DURATION: &str = "weir_invocation_duration_seconds";
const OVERHEAD: &str = "weir_proxy_overhead_seconds";
const QUEUE_WAIT: &str = "weir_queue_wait_seconds";
const COLD_START: &str = "weir_cold_start_seconds";
const INSTANCE_START: &str = "weir_instance_start_seconds";
const STORE_COMMIT: &str = "weir_store_commit_seconds";
const STORE_LAG: &str = "weir_store_feed_lag_seconds";

const INVOCATIONS: &str = "weir_invocations_total";
const REFUSALS: &str = "weir_refusals_total";
const CANCEL_TIMEOUTS: &str = "weir_cancel_timeouts_total";
const CONNECT_FAILURES: &str = "weir_connect_failures_total";
const RESTARTS: &str = "weir_instance_restarts_total";
const DECISIONS: &str = "weir_scale_decisions_total";
const STORE_ERRORS: &str = "weir_store_errors_total";
const LOG_DROPPED: &str = "weir_access_log_dropped_total";
const HANDSHAKES_FAILED: &str = "weir_tls_handshake_failures_total";
const TRACES_DROPPED: &str = "weir_traces_dropped_total";

const QUEUE_DEPTH: &str = "weir_queue_depth";
const QUEUE_LIMIT: &str = "weir_queue_limit";
const SLOTS: &str = "weir_slots";
const INSTANCES: &str = "weir_instances";
const CONNECTIONS: &str = "weir_connections";
const CERTIFICATE_EXPIRY: &str = "weir_tls_certificate_expiry_timestamp_seconds";
const BUILD: &str = "weir_build_info";

const STORE_CALLS: [&str; 4] = ["get", "list", "commit", "watch"];

/// Name and help.
const COUNTERS: [(&str, &str); 10] = [
    (
        INVOCATIONS,
        "Invocations by their final status code; 499: the caller left",
    ),
    (
        REFUSALS,
        "Requests that Weir answered itself, by the problem's code",
    ),
    (
        CANCEL_TIMEOUTS,
        "Cancelled requests whose instance did not close its side in time",
    ),
    (
        CONNECT_FAILURES,
        "Attempts that met an instance which took no connection",
    ),
    (
        RESTARTS,
        "Instances that ended by themselves and were started again",
    ),
    (
        DECISIONS,
        "Changes of the wanted number of instances, or of its reason, by the reason",
    ),
    (STORE_ERRORS, "Calls of the store that failed, by the call"),
    (
        LOG_DROPPED,
        "Lines that the access log lost since it could not be written fast enough",
    ),
    (
        HANDSHAKES_FAILED,
        "Connections whose TLS handshake failed, by listener",
    ),
    (
        TRACES_DROPPED,
        "Traces of sampled requests that were lost since the collector did not take them",
    ),
];

/// Name, buckets and help; all in seconds.
const HISTOGRAMS: [(&str, &[f64], &str); 7] = [
    (
        DURATION,
        SECONDS,
        "From the head's arrival to the answer's last byte",
    ),
    (
        OVERHEAD,
        SHORT_SECONDS,
        "The duration less the wait and the time an instance had the request",
    ),
    (
        QUEUE_WAIT,
        SECONDS,
        "From arrival to the slot, where there was a wait",
    ),
    (
        COLD_START,
        SECONDS,
        "From arrival to the slot, where no instance was ready at arrival",
    ),
    (
        INSTANCE_START,
        SECONDS,
        "From an instance's spawn to its first healthy answer",
    ),
    (
        STORE_COMMIT,
        SHORT_SECONDS,
        "From a commit's call to its answer, when it is durable",
    ),
    (
        STORE_LAG,
        SHORT_SECONDS,
        "From a commit's answer to its arrival in the feed",
    ),
];

/// Name and help.
const GAUGES: [(&str, &str); 7] = [
    (QUEUE_DEPTH, "Invocations that wait for a slot"),
    (QUEUE_LIMIT, "Invocations that may wait: queue.maxRequests"),
    (SLOTS, "Slots of the ready instances, busy and free"),
    (INSTANCES, "Instances by state"),
    (CONNECTIONS, "Open connections of callers"),
    (
        CERTIFICATE_EXPIRY,
        "When the first of a listener's certificates expires, in seconds since 1970",
    ),
    (BUILD, "1; the label tells the version of Weir"),
];

/// Counters by one label whose values are few, each made when its value is first seen.
struct Family<V> {
    metrics: Arc<Metrics>,
    name: &'static str,
    labels: Vec<Label>,
    label: &'static str,
    seen: RwLock<Vec<(V, Counter)>>,
}

impl<V: Copy + PartialEq + ToString> Family<V> {
    fn new(
        metrics: &Arc<Metrics>,
        name: &'static str,
        labels: &[Label],
        label: &'static str,
    ) -> Self {
        Self {
            metrics: metrics.clone(),
            name,
            labels: labels.to_vec(),
            label,
            seen: RwLock::default(),
        }
    }

    fn increment(&self, value: V) {
        let counted = {
            let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
            let known = seen.iter().find(|(known, _)| *known == value);
            known.map(|(_, counter)| counter.increment(1)).is_some()
        };
        if !counted {
            let more = Label::new(self.label, value.to_string());
            let counter = self.metrics.counter(self.name, &self.labels, Some(more));
            counter.increment(1);
            let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
            seen.push((value, counter));
        }
    }

    /// Shows these at 0 before they are first seen: a series that begins at 1 has no increase.
    fn expecting(self, values: &[V]) -> Self {
        for value in values {
            let more = Label::new(self.label, value.to_string());
            let counter = self.metrics.counter(self.name, &self.labels, Some(more));
            let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
            seen.push((*value, counter));
        }
        self
    }

    fn touch(&self) {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.iter().for_each(|(_, counter)| counter.increment(0));
    }
}

pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    process: Collector,
}

impl Metrics {
    pub fn new() -> anyhow::Result<Arc<Self>> {
        let mut builder =
            PrometheusBuilder::new().idle_timeout(MetricKindMask::ALL, Some(FORGOTTEN_AFTER));
        for (name, buckets, _) in HISTOGRAMS {
            builder = builder.set_buckets_for_metric(Matcher::Full(name.into()), buckets)?;
        }
        let recorder = builder.build_recorder();
        for (name, help) in COUNTERS {
            recorder.describe_counter(name.into(), None, help.into());
        }
        for (name, _, help) in HISTOGRAMS {
            recorder.describe_histogram(name.into(), Some(Unit::Seconds), help.into());
        }
        for (name, help) in GAUGES {
            recorder.describe_gauge(name.into(), None, help.into());
        }
        let process = Collector::default();
        metrics::with_local_recorder(&recorder, || process.describe());
        let handle = recorder.handle();
        Ok(Arc::new(Self {
            recorder,
            handle,
            process,
        }))
    }

    fn counter(&self, name: &'static str, labels: &[Label], more: Option<Label>) -> Counter {
        let labels: Vec<Label> = labels.iter().cloned().chain(more).collect();
        self.recorder
            .register_counter(&Key::from_parts(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[Label], more: Option<Label>) -> Gauge {
        let labels: Vec<Label> = labels.iter().cloned().chain(more).collect();
        self.recorder
            .register_gauge(&Key::from_parts(name, labels), &METADATA)
    }

    fn histogram(&self, key: &Key) -> Histogram {
        self.recorder.register_histogram(key, &METADATA)
    }

    #[must_use]
    pub fn version(self: &Arc<Self>, function: FunctionId, version: VersionId) -> VersionMetrics {
        let function = Label::new("function", function.to_string());
        let histogram = |name| LazyHistogram::new(self, name, vec![function.clone()]);
        let version = Label::new("version", version.to_string());
        let labels = [function.clone(), version];
        let state = |name, state| self.gauge(name, &labels, Some(Label::new("state", state)));
        VersionMetrics {
            duration: histogram(DURATION),
            overhead: histogram(OVERHEAD),
            queue_wait: histogram(QUEUE_WAIT),
            cold_start: histogram(COLD_START),
            instance_start: histogram(INSTANCE_START),
            invocations: Family::new(self, INVOCATIONS, &labels, "code"),
            decisions: Family::new(self, DECISIONS, &labels, "reason"),
            cancel_timeouts: self.counter(CANCEL_TIMEOUTS, &labels, None),
            connect_failures: self.counter(CONNECT_FAILURES, &labels, None),
            restarts: self.counter(RESTARTS, &labels, None),
            queue_depth: self.gauge(QUEUE_DEPTH, &labels, None),
            queue_limit: self.gauge(QUEUE_LIMIT, &labels, None),
            busy: state(SLOTS, "busy"),
            free: state(SLOTS, "free"),
            instances: InstanceState::ALL.map(|kind| (kind, state(INSTANCES, kind.as_str()))),
        }
    }

    #[must_use]
    pub fn process(self: &Arc<Self>) -> ProcessMetrics {
        let build = Label::new("version", env!("CARGO_PKG_VERSION"));
        ProcessMetrics {
            refusals: Family::new(self, REFUSALS, &[], "code"),
            store_errors: Family::new(self, STORE_ERRORS, &[], "call").expecting(&STORE_CALLS),
            store_commit: LazyHistogram::new(self, STORE_COMMIT, Vec::new()),
            store_lag: LazyHistogram::new(self, STORE_LAG, Vec::new()),
            log_dropped: self.counter(LOG_DROPPED, &[], None),
            traces_dropped: self.counter(TRACES_DROPPED, &[], None),
            connections: self.gauge(CONNECTIONS, &[], None),
            build: self.gauge(BUILD, &[], Some(build)),
            handshakes_failed: Listener::ALL
                .map(|listener| self.counter(HANDSHAKES_FAILED, &[], Some(listener.label()))),
        }
    }

    /// Of a listener that speaks TLS.
    pub fn certificate_expiry(&self, listener: Listener) -> Gauge {
        self.gauge(CERTIFICATE_EXPIRY, &[], Some(listener.label()))
    }

    /// The page that Prometheus scrapes, without the series that `lives` denies.
    #[must_use]
    pub fn page(&self, lives: impl Fn(&Series<'_>) -> bool) -> String {
        metrics::with_local_recorder(&self.recorder, || self.process.collect());
        page::retain(&self.handle.render(), lives)
    }

    /// Folds histogram samples together; without it they pile up until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Lets go of what nothing has touched for a day. Takes as long as a page does.
    pub fn forget(&self) {
        drop(self.handle.render());
    }
}

/// Whether a series is shown only while its version is deployed.
#[must_use]
pub fn needs_deployment(name: &str) -> bool {
    [QUEUE_DEPTH, QUEUE_LIMIT, SLOTS, INSTANCES].contains(&name)
}

/// The metrics of one deployed version. Histograms are by function alone.
pub struct VersionMetrics {
    duration: LazyHistogram,
    overhead: LazyHistogram,
    queue_wait: LazyHistogram,
    cold_start: LazyHistogram,
    instance_start: LazyHistogram,
    invocations: Family<u16>,
    decisions: Family<Reason>,
    pub cancel_timeouts: Counter,
    pub connect_failures: Counter,
    restarts: Counter,
    queue_depth: Gauge,
    queue_limit: Gauge,
    busy: Gauge,
    free: Gauge,
    instances: [(InstanceState, Gauge); 4],
}

impl VersionMetrics {
    pub fn invocation(&self, code: u16, duration: Duration, overhead: Duration) {
        self.duration.record(duration.as_secs_f64());
        self.overhead.record(overhead.as_secs_f64());
        self.invocations.increment(code);
    }

    /// `cold`: no instance was ready when the invocation came.
    pub fn waited(&self, wait: Duration, cold: bool) {
        self.queue_wait.record(wait.as_secs_f64());
        if cold {
            self.cold_start.record(wait.as_secs_f64());
        }
    }

    pub fn started(&self, took: Duration) {
        self.instance_start.record(took.as_secs_f64());
    }

    pub fn restarted(&self, times: u32) {
        self.restarts.increment(times.into());
    }

    pub fn decided(&self, reason: Reason) {
        self.decisions.increment(reason);
    }

    pub fn load(&self, queued: usize, limit: u64, busy: usize, capacity: usize) {
        self.queue_depth.set(queued as f64);
        self.queue_limit.set(limit as f64);
        self.busy.set(busy as f64);
        self.free.set(capacity.saturating_sub(busy) as f64);
    }

    pub fn instances(&self, count: impl Fn(InstanceState) -> usize) {
        for (state, gauge) in &self.instances {
            gauge.set(count(*state) as f64);
        }
    }

    /// Keeps what does not change from being forgotten; gauges are set anyway.
    pub fn touch(&self) {
        self.invocations.touch();
        self.decisions.touch();
        for counter in [
            &self.cancel_timeouts,
            &self.connect_failures,
            &self.restarts,
        ] {
            counter.increment(0);
        }
    }
}

/// The two listeners, as a label tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    Data,
    Admin,
}

impl Listener {
    const ALL: [Self; 2] = [Self::Data, Self::Admin];

    fn label(self) -> Label {
        let name = match self {
            Self::Data => "data",
            Self::Admin => "admin",
        };
        Label::new("listener", name)
    }
}

/// The metrics of the process as a whole.
pub struct ProcessMetrics {
    refusals: Family<&'static str>,
    store_errors: Family<&'static str>,
    store_commit: LazyHistogram,
    store_lag: LazyHistogram,
    pub log_dropped: Counter,
    pub traces_dropped: Counter,
    connections: Gauge,
    build: Gauge,
    handshakes_failed: [Counter; 2],
}

impl ProcessMetrics {
    pub fn refused(&self, code: &'static str) {
        self.refusals.increment(code);
    }

    pub fn store_failed(&self, call: &'static str) {
        self.store_errors.increment(call);
    }

    pub fn committed(&self, took: Duration) {
        self.store_commit.record(took.as_secs_f64());
    }

    pub fn heard(&self, after: Duration) {
        self.store_lag.record(after.as_secs_f64());
    }

    pub fn handshake_failed(&self, listener: Listener) {
        self.handshakes_failed(listener).increment(1);
    }

    pub fn handshakes_failed(&self, listener: Listener) -> &Counter {
        &self.handshakes_failed[listener as usize]
    }

    /// Sets what is looked at and not counted, and keeps the rest from being forgotten.
    pub fn touch(&self, connections: usize) {
        self.connections.set(connections as f64);
        self.build.set(1.0);
        self.refusals.touch();
        self.store_errors.touch();
        self.log_dropped.increment(0);
        for failed in &self.handshakes_failed {
            failed.increment(0);
        }
        self.traces_dropped.increment(0);
    }
}
