//! A store whose calls are measured.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;
use weir_control::store::{
    Change, Cursor, Event, Partition, Position, Record, Store, StoreError, Watch,
};

use crate::metrics::ProcessMetrics;

pub struct Measured {
    store: Arc<dyn Store>,
    gauge: Arc<Gauge>,
}

struct Gauge {
    metrics: Arc<ProcessMetrics>,
    partitions: Mutex<HashMap<Partition, Revisions>>,
}

#[derive(Default)]
struct Revisions {
    /// The last that came through the feed.
    heard: u64,
    /// When those that did not were answered.
    answered: BTreeMap<u64, Instant>,
}

impl Measured {
    #[must_use]
    pub fn new(store: Arc<dyn Store>, metrics: Arc<ProcessMetrics>) -> Self {
        let gauge = Arc::new(Gauge {
            metrics,
            partitions: Mutex::default(),
        });
        Self { store, gauge }
    }
}

impl Gauge {
    fn outcome<T>(
        &self,
        call: &'static str,
        outcome: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match &outcome {
            // Another writer was first: that is what compare-and-set is for.
            Ok(_) | Err(StoreError::Conflict { .. }) => {}
            Err(_) => self.metrics.store_failed(call),
        }
        outcome
    }

    fn answered(&self, partition: Partition, revision: u64) {
        let mut all = self
            .partitions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let revisions = all.entry(partition).or_default();
        if revision > revisions.heard {
            revisions.answered.insert(revision, Instant::now());
        } else {
            self.metrics.heard(Duration::ZERO);
        }
    }

    fn heard(&self, partition: Partition, revision: u64) {
        let mut all = self
            .partitions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let revisions = all.entry(partition).or_default();
        revisions.heard = revisions.heard.max(revision);
        let later = revisions.answered.split_off(&(revision + 1));
        for at in std::mem::replace(&mut revisions.answered, later).values() {
            self.metrics.heard(at.elapsed());
        }
    }
}

#[async_trait]
impl Store for Measured {
    async fn get(&self, partition: Partition, key: &str) -> Result<Option<Record>, StoreError> {
        self.gauge
            .outcome("get", self.store.get(partition, key).await)
    }

    async fn list(
        &self,
        partition: Partition,
        prefix: &str,
    ) -> Result<(Vec<Record>, Position), StoreError> {
        self.gauge
            .outcome("list", self.store.list(partition, prefix).await)
    }

    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<u64, StoreError> {
        let start = Instant::now();
        let outcome = self.store.commit(partition, changes).await;
        if let Ok(revision) = outcome {
            self.gauge.metrics.committed(start.elapsed());
            self.gauge.answered(partition, revision);
        }
        self.gauge.outcome("commit", outcome)
    }

    async fn watch(&self, cursor: Cursor) -> Result<Box<dyn Watch>, StoreError> {
        let watch = self
            .gauge
            .outcome("watch", self.store.watch(cursor).await)?;
        Ok(Box::new(MeasuredWatch {
            watch,
            gauge: self.gauge.clone(),
        }))
    }
}

struct MeasuredWatch {
    watch: Box<dyn Watch>,
    gauge: Arc<Gauge>,
}

#[async_trait]
impl Watch for MeasuredWatch {
    async fn next(&mut self) -> Result<Event, StoreError> {
        let event = self.gauge.outcome("watch", self.watch.next().await)?;
        if let Event::Commit(commit) = &event {
            self.gauge.heard(commit.partition, commit.revision);
        }
        Ok(event)
    }
}
