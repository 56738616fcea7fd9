//! What the admin listener shows of the running process: `/metrics`,
//! `/healthz` and `/readyz`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ::metrics::Gauge;
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use weir_control::{
    directory::Directory,
    model::{FunctionId, Instance, VersionId},
};

use crate::{
    core::Stopping,
    limit::Limits,
    metrics::{self, Metrics, ProcessMetrics, Series},
    table::Table,
    tls::Certificates,
};

/// What gauges are read from.
pub struct Observed {
    pub metrics: Arc<Metrics>,
    pub process: Arc<ProcessMetrics>,
    pub table: Arc<Table>,
    pub directory: Arc<Directory>,
    /// Of callers.
    pub connections: Arc<AtomicUsize>,
    /// Of the listeners that speak TLS, and where their end is shown.
    pub certificates: Vec<(Gauge, Arc<Certificates>)>,
}

impl Observed {
    /// Sets every gauge, and keeps what lives from being forgotten.
    fn look(&self) {
        for deployed in self.table.all_deployed() {
            let load = deployed.queue.load();
            let view = self.directory.view(deployed.function);
            let version = view
                .as_ref()
                .and_then(|view| view.version(deployed.version));
            let limit = version
                .and_then(|version| version.deployment.as_ref())
                .map_or(0, |deployment| deployment.queue.max_requests);
            deployed
                .metrics
                .load(load.queued, limit, load.busy, load.capacity);
            let instances: &[Instance] = version.map_or(&[], |version| &version.instances);
            deployed
                .metrics
                .instances(|state| instances.iter().filter(|i| i.state == state).count());
            deployed.metrics.touch();
        }
        for (expiry, certificates) in &self.certificates {
            expiry.set(certificates.expires() as f64);
        }
        self.process.touch(self.connections.load(Ordering::Relaxed));
    }

    fn lives(&self, series: &Series<'_>) -> bool {
        let Some(function) = series.function else {
            return true;
        };
        let Some(view) = self.directory.view(FunctionId(function)) else {
            return false;
        };
        series.version.is_none_or(|version| {
            let version = VersionId(version);
            if metrics::needs_deployment(series.name) {
                self.table.deployed(version).is_some()
            } else {
                view.version(version).is_some()
            }
        })
    }

    fn page(&self) -> String {
        self.look();
        self.metrics.page(|series| self.lives(series))
    }
}

/// Keeps gauges true and histograms folded, scraped or not.
pub async fn upkeep(observed: Arc<Observed>, limits: Arc<Limits>) {
    const FORGETS_EVERY: u32 = 720;
    let mut ticks = interval(Duration::from_secs(5));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for tick in (0..FORGETS_EVERY).cycle() {
        ticks.tick().await;
        observed.look();
        observed.metrics.upkeep();
        limits.keep(|version| observed.table.deployed(version).is_some());
        if tick + 1 == FORGETS_EVERY {
            let observed = observed.clone();
            // Only that it has ended counts.
            _ = spawn_blocking(move || observed.metrics.forget()).await;
        }
    }
}

pub fn health_routes(observed: Arc<Observed>, stopping: watch::Receiver<Stopping>) -> Router {
    let ready = async move || match *stopping.borrow() {
        Stopping::No => (StatusCode::OK, "ready\n"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
    };
    let page = async move || {
        // With thousands of functions it takes a while.
        match spawn_blocking(move || observed.page()).await {
            Ok(page) => {
                let headers = [("content-type", "text/plain; version=0.0.4; charset=utf-8")];
                (headers, page).into_response()
            }
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    };
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(page))
}
