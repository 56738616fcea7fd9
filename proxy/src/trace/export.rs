//! Brings records to a collector, as OTLP over HTTP.
//!
//! A thread takes records from a bounded channel, makes spans of some hundred
//! at a time and sends them; the library tries again where that may help. What
//! comes meanwhile waits in the channel, and is dropped and counted where that
//! is full. So a collector that is slow or away costs traces and nothing else.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use http::Uri;
use metrics::Counter;
use opentelemetry::{InstrumentationScope, Key, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{Resource, error::OTelSdkResult, trace::SpanExporter as _};
use tokio::{
    runtime,
    sync::{mpsc, watch},
    time::sleep,
};

use weir_bench::https;

use super::{Record, spans::spans};

/// Records that wait to be exported.
const WAITING: usize = 16 << 10;
/// Records that are sent in one piece, each of two to some spans.
const BATCH: usize = 256;
/// After a first record it waits so long for more: one message for many, and no thread to wake for each.
const GATHER: Duration = Duration::from_millis(500);
/// A collector that takes nothing is worth a line, but not one for every batch.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// OpenTelemetry's default.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Exporter {
    records: mpsc::Sender<Box<Record>>,
    dropped: Counter,
    closing: watch::Sender<bool>,
}

impl Exporter {
    pub(super) fn start(endpoint: &str, dropped: Counter) -> anyhow::Result<Self> {
        let (records, inbox) = mpsc::channel(WAITING);
        let (closing, closed) = watch::channel(false);
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut exporter = {
            let _inside = runtime.enter();
            SpanExporter::builder()
                .with_http()
                .with_endpoint(endpoint)
                .with_http_client(client(endpoint)?)
                .build()
                .context("the exporter of traces")?
        };
        exporter.set_resource(&resource());
        let sender = Sender {
            exporter,
            collector: shown(endpoint),
            scope: InstrumentationScope::builder("weir")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            dropped: dropped.clone(),
            lost: 0,
            warned: None,
        };
        thread::Builder::new()
            .name("traces".into())
            .spawn(move || runtime.block_on(run(inbox, closed, sender)))?;
        Ok(Self {
            records,
            dropped,
            closing,
        })
    }

    pub(super) fn take(&self, record: Box<Record>) {
        if self.records.try_send(record).is_err() {
            self.dropped.increment(1);
        }
    }

    pub(super) async fn close(&self) {
        self.closing.send_replace(true);
        // The thread's end closes the channel.
        self.records.closed().await;
    }
}

/// The library's own would not know `OTEL_EXPORTER_OTLP_CERTIFICATE`. Each attempt has the time that the library gives
/// to all of them.
fn client(endpoint: &str) -> anyhow::Result<reqwest::Client> {
    let told = |names: [&'static str; 2]| {
        let mut set = names.into_iter().map(|name| (name, std::env::var(name)));
        set.find_map(|(name, value)| Some((name, value.ok().filter(|v| !v.is_empty())?)))
    };
    let certificate = told([
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CERTIFICATE",
    ]);
    let (variable, file) = certificate.unzip();
    let timeout = told([
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ]);
    let timeout = timeout.and_then(|(_, milliseconds)| milliseconds.parse().ok());
    https::builder(&[endpoint], file.as_deref().map(Path::new))
        .context(variable.unwrap_or_default())?
        .timeout(timeout.map_or(TIMEOUT, Duration::from_millis))
        .build()
        .context("the client for the collector of traces")
}

async fn run(
    mut inbox: mpsc::Receiver<Box<Record>>,
    mut closing: watch::Receiver<bool>,
    mut sender: Sender,
) {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            biased;
            record = inbox.recv() => batch.extend(record.map(|record| *record)),
            _ = closing.wait_for(|closing| *closing) => {}
        }
        tokio::select! {
            () = sleep(GATHER) => {}
            _ = closing.wait_for(|closing| *closing) => {}
        }
        loop {
            while batch.len() < BATCH
                && let Ok(record) = inbox.try_recv()
            {
                batch.push(*record);
            }
            let full = batch.len() == BATCH;
            if !batch.is_empty() {
                sender.send(&mut batch).await;
            }
            if !full {
                break;
            }
        }
        let ends = *closing.borrow() || inbox.is_closed();
        if ends && inbox.is_empty() {
            return;
        }
    }
}

struct Sender {
    exporter: SpanExporter,
    /// For people; without what may be secret in a URL.
    collector: String,
    scope: InstrumentationScope,
    dropped: Counter,
    /// Since the last warning.
    lost: usize,
    warned: Option<Instant>,
}

impl Sender {
    async fn send(&mut self, batch: &mut Vec<Record>) {
        let traces = batch.len();
        let mut made = Vec::with_capacity(traces * 3);
        for record in batch.drain(..) {
            spans(&record, &self.scope, &mut made);
        }
        let outcome: OTelSdkResult = self.exporter.export(made).await;
        let Err(error) = outcome else {
            return;
        };
        self.dropped.increment(traces as u64);
        self.lost += traces;
        if self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            let (collector, lost) = (&self.collector, self.lost);
            tracing::warn!(%collector, %error, lost, "traces were lost: the collector does not take them");
            self.lost = 0;
            self.warned = Some(Instant::now());
        }
    }
}

/// Who sends: as `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say, else `weir`.
fn resource() -> Resource {
    let named = |resource: &Resource, key: &'static str| resource.get(&Key::new(key)).is_some();
    let told = Resource::builder().build();
    let unnamed = told
        .get(&Key::new("service.name"))
        .is_none_or(|name| name.as_str().starts_with("unknown_service"));
    let mut resource = Resource::builder();
    if unnamed {
        resource = resource.with_service_name("weir");
    }
    if !named(&told, "service.version") {
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        resource = resource.with_attribute(version);
    }
    resource.build()
}

/// The URL that spans are sent to, of what the operator gave: the collector's base, to which the signal's path is
/// added, or (`whole`) the whole URL.
pub fn endpoint(given: &str, whole: bool) -> Result<String, String> {
    let uri: Uri = given.parse().map_err(|_| "it is no URL".to_owned())?;
    let Some(authority) = uri.authority() else {
        return Err("it must begin with http:// or https:// and a host".into());
    };
    if authority.as_str().contains('@') {
        return Err(
            "a password can't be part of it: put it into OTEL_EXPORTER_OTLP_HEADERS".into(),
        );
    }
    match uri.scheme_str() {
        Some("http" | "https") => {}
        _ => return Err("it must begin with http:// or https://".into()),
    }
    if whole {
        return Ok(given.to_owned());
    }
    if uri.query().is_some() {
        return Err("it can't have a query".into());
    }
    Ok(format!("{}/v1/traces", given.trim_end_matches('/')))
}

fn shown(endpoint: &str) -> String {
    let uri: Uri = endpoint.parse().unwrap_or_default();
    uri.authority().map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_base_or_whole() {
        for base in ["http://collector:4318", "http://collector:4318/"] {
            assert_eq!(
                endpoint(base, false).unwrap(),
                "http://collector:4318/v1/traces"
            );
        }
        let whole = "http://collector/in?tenant=a";
        assert_eq!(endpoint(whole, true).unwrap(), whole);
    }

    #[test]
    fn what_is_no_endpoint_is_refused_and_not_repeated() {
        for wrong in [
            "",
            "collector:4318",
            "/v1/traces",
            "ftp://collector",
            "https://collector?secret",
            "http://collector?secret",
            "http://user:secret@collector",
            "http://coll ector/secret",
        ] {
            let why = endpoint(wrong, false).unwrap_err();
            assert!(!why.contains("secret"), "{why}");
        }
    }
}
