//! Every metric, in one place: names, help texts, and the handles that the
//! request path uses. A handle is looked up once and lives as long as its
//! deployment; nothing here formats a label per request.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use weir_control::model::{FunctionId, VersionId};

static METADATA: Metadata<'static> = Metadata::new("weir", Level::INFO, None);

/// Seconds; short answers and long generations alike, in 12 buckets.
const SECONDS: &[f64] = &[
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0,
];
/// Seconds; what the proxy itself costs.
const OVERHEAD: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0,
];

/// Counters by status code, made when a code is first seen.
type ByCode = RwLock<Vec<(u16, Counter)>>;

pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

/// Histograms are by function alone.
pub struct FunctionMetrics {
    duration: Histogram,
    overhead: Histogram,
    queue_wait: Histogram,
}

pub struct VersionMetrics {
    metrics: Arc<Metrics>,
    function: Arc<FunctionMetrics>,
    labels: Vec<Label>,
    invocations: ByCode,
    queue_depth: Gauge,
    busy: Gauge,
    free: Gauge,
    pub cancel_timeouts: Counter,
}

impl Metrics {
    pub fn new() -> anyhow::Result<Arc<Self>> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(
                Matcher::Full("weir_proxy_overhead_seconds".into()),
                OVERHEAD,
            )?
            .set_buckets(SECONDS)?
            .build_recorder();
        let handle = recorder.handle();
        let described = [
            (
                "weir_invocations_total",
                "Invocations by their final status code; 499: the caller left",
            ),
            (
                "weir_cancel_timeouts_total",
                "Cancelled requests whose instance did not close its side in time",
            ),
        ];
        for (name, help) in described {
            recorder.describe_counter(name.into(), None, help.into());
        }
        for (name, help) in [
            (
                "weir_invocation_duration_seconds",
                "From the head's arrival to the answer's last byte",
            ),
            (
                "weir_proxy_overhead_seconds",
                "The duration less the time an instance had the request",
            ),
            (
                "weir_queue_wait_seconds",
                "From arrival to the slot, where there was a wait",
            ),
        ] {
            recorder.describe_histogram(name.into(), Some(Unit::Seconds), help.into());
        }
        recorder.describe_gauge(
            "weir_queue_depth".into(),
            None,
            "Invocations that wait for a slot".into(),
        );
        recorder.describe_gauge(
            "weir_slots".into(),
            None,
            "Slots of the ready instances, busy and free".into(),
        );
        recorder.describe_gauge("weir_instances".into(), None, "Instances by state".into());
        Ok(Arc::new(Self { recorder, handle }))
    }

    #[must_use]
    pub fn function(&self, function: FunctionId) -> Arc<FunctionMetrics> {
        let labels = vec![Label::new("function", function.to_string())];
        let histogram = |name: &'static str| {
            self.recorder
                .register_histogram(&Key::from_parts(name, labels.clone()), &METADATA)
        };
        Arc::new(FunctionMetrics {
            duration: histogram("weir_invocation_duration_seconds"),
            overhead: histogram("weir_proxy_overhead_seconds"),
            queue_wait: histogram("weir_queue_wait_seconds"),
        })
    }

    #[must_use]
    pub fn version(
        self: &Arc<Self>,
        function: FunctionId,
        version: VersionId,
        per_function: Arc<FunctionMetrics>,
    ) -> VersionMetrics {
        let labels = vec![
            Label::new("function", function.to_string()),
            Label::new("version", version.to_string()),
        ];
        VersionMetrics {
            metrics: self.clone(),
            function: per_function,
            invocations: ByCode::default(),
            queue_depth: self.gauge("weir_queue_depth", &labels, None),
            busy: self.gauge("weir_slots", &labels, Some(("state", "busy"))),
            free: self.gauge("weir_slots", &labels, Some(("state", "free"))),
            cancel_timeouts: self.recorder.register_counter(
                &Key::from_parts("weir_cancel_timeouts_total", labels.clone()),
                &METADATA,
            ),
            labels,
        }
    }

    fn gauge(
        &self,
        name: &'static str,
        labels: &[Label],
        more: Option<(&'static str, &'static str)>,
    ) -> Gauge {
        let mut labels = labels.to_vec();
        labels.extend(more.map(|(name, value)| Label::new(name, value)));
        self.recorder
            .register_gauge(&Key::from_parts(name, labels), &METADATA)
    }

    /// The instances of a version, by state.
    pub fn instances(
        &self,
        function: FunctionId,
        version: VersionId,
        counts: [(&'static str, usize); 4],
    ) {
        let labels = [
            Label::new("function", function.to_string()),
            Label::new("version", version.to_string()),
        ];
        for (state, count) in counts {
            self.gauge("weir_instances", &labels, Some(("state", state)))
                .set(count as f64);
        }
    }

    /// The page that Prometheus scrapes.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds histogram samples together; without it they pile up until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

impl VersionMetrics {
    pub fn invocation(&self, code: u16, duration: Duration, overhead: Duration) {
        self.function.duration.record(duration.as_secs_f64());
        self.function.overhead.record(overhead.as_secs_f64());
        let counted = {
            let seen = self
                .invocations
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            seen.iter()
                .find(|(known, _)| *known == code)
                .map(|(_, counter)| counter.increment(1))
                .is_some()
        };
        if !counted {
            let mut labels = self.labels.clone();
            labels.push(Label::new("code", code.to_string()));
            let key = Key::from_parts("weir_invocations_total", labels);
            let counter = self.metrics.recorder.register_counter(&key, &METADATA);
            counter.increment(1);
            self.invocations
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .push((code, counter));
        }
    }

    pub fn waited(&self, wait: Duration) {
        self.function.queue_wait.record(wait.as_secs_f64());
    }

    pub fn load(&self, queued: usize, busy: usize, capacity: usize) {
        self.queue_depth.set(queued as f64);
        self.busy.set(busy as f64);
        self.free.set(capacity.saturating_sub(busy) as f64);
    }
}
