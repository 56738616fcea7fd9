//! The routing table: from a function's ID to an immutable view of it, with
//! the queues of its deployed versions.
//!
//! The directory's changes write it, one at a time and before whoever made one
//! hears that it is made; the request path reads one `Arc` and never sees half
//! a change. A queue lives as long as its
//! deployment: views come and go around it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use jiff::Timestamp;
use rustls::pki_types::ServerName;
use tokio::sync::mpsc;
use uuid::Uuid;
use weir_control::{
    coordination::Signal,
    directory::{Directory, VersionView},
    model::{
        AccountId, Deployment, DeploymentId, FunctionId, FunctionState, Instance, InstanceId,
        InstanceState, Version, VersionId,
    },
};
use weir_queue::{Limits, Queue};

use crate::{
    clock,
    metrics::{Metrics, VersionMetrics},
    upstream::{Backend, Connection},
};

/// So many starts tell how long the next one takes.
const STARTS: usize = 9;

pub type VersionQueue = Queue<Arc<Backend>, Connection>;

/// A function as the request path sees it.
pub struct Route {
    pub account: AccountId,
    /// Oldest first.
    pub versions: Vec<VersionRoute>,
}

pub struct VersionRoute {
    pub version: Arc<Version>,
    pub state: FunctionState,
    pub shared_with: Arc<[String]>,
    /// Present while it is deployed.
    pub deployed: Option<Arc<Deployed>>,
    pub deployment: Option<Arc<Deployment>>,
    pub starting: bool,
    /// How its instances fail, where one does, in words for callers of any account.
    pub failure: Option<Arc<str>>,
}

/// What lives as long as a deployment.
pub struct Deployed {
    pub function: FunctionId,
    pub version: VersionId,
    pub deployment: DeploymentId,
    pub queue: Arc<VersionQueue>,
    pub metrics: VersionMetrics,
    /// Moving average of the time an instance takes for a request, in microseconds; 0: none yet.
    service_time: AtomicU64,
    told: Mutex<Told>,
    /// How long the last starts of its instances took, the newest last.
    starts: Mutex<VecDeque<Duration>>,
    /// The start and the restarts of each instance that were counted.
    counted: Mutex<HashMap<InstanceId, (Option<Timestamp>, u32)>>,
}

/// What was told to the queue.
#[derive(Default)]
struct Told {
    /// Of each instance, as of the directory's last change.
    instances: HashMap<InstanceId, Arc<Backend>>,
    /// Out of the queue for good: what is said of them later comes too late. Whether the directory had them since.
    retired: HashMap<InstanceId, bool>,
}

impl Deployed {
    fn new(deployment: &Deployment, limits: Limits, metrics: &Arc<Metrics>) -> Self {
        let (function, version) = (deployment.function, deployment.version);
        Self {
            function,
            version,
            deployment: deployment.id,
            queue: Queue::new(limits, clock::now),
            metrics: metrics.version(function, version),
            service_time: AtomicU64::new(0),
            told: Mutex::default(),
            starts: Mutex::default(),
            counted: Mutex::default(),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the instance out for good, if it has no work; true if it is out, or was never in.
    pub fn retire_if_idle(&self, instance: InstanceId) -> bool {
        let key = instance.0.as_u128();
        // With this lock no report of it comes in between.
        let mut told = self.told();
        let out = self.queue.busy_of(key).is_none() || self.queue.retire_if_idle(key);
        if out {
            told.retired.insert(instance, false);
        }
        out
    }

    /// Remembers how long an instance's start took.
    fn started(&self, took: Duration) {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        if starts.len() == STARTS {
            starts.pop_front();
        }
        starts.push_back(took);
    }

    /// The median of the last starts, also of instances that are gone by now; `None` before the first.
    #[must_use]
    pub fn start_time(&self) -> Option<Duration> {
        let starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<Duration> = starts.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    pub fn served(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let average = self.service_time.load(Ordering::Relaxed);
        let next = if average == 0 {
            took
        } else {
            average - average / 8 + took / 8
        };
        // Two that race lose one sample of an average: harmless.
        self.service_time.store(next.max(1), Ordering::Relaxed);
    }

    /// When a place may be free again: `queue / capacity × mean service time`, or a start where no instance is ready.
    #[must_use]
    pub fn retry_after(&self) -> Duration {
        let load = self.queue.load();
        if load.ready_instances == 0 {
            return self.start_time().unwrap_or_default();
        }
        let mean = Duration::from_micros(self.service_time.load(Ordering::Relaxed));
        mean.mul_f64(load.queued as f64 / load.capacity.max(1) as f64)
    }
}

pub struct Table {
    routes: DashMap<FunctionId, Arc<Route>>,
    deployed: DashMap<VersionId, Arc<Deployed>>,
    metrics: Arc<Metrics>,
    signals: mpsc::UnboundedSender<Signal>,
}

impl Table {
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, signals: mpsc::UnboundedSender<Signal>) -> Arc<Self> {
        Arc::new(Self {
            routes: DashMap::new(),
            deployed: DashMap::new(),
            metrics,
            signals,
        })
    }

    /// The one reader of the request path.
    #[must_use]
    pub fn view(&self, function: FunctionId) -> Option<Arc<Route>> {
        self.routes
            .get(&function)
            .map(|route| route.value().clone())
    }

    #[must_use]
    pub fn deployed(&self, version: VersionId) -> Option<Arc<Deployed>> {
        self.deployed
            .get(&version)
            .map(|deployed| deployed.value().clone())
    }

    #[must_use]
    pub fn all_deployed(&self) -> Vec<Arc<Deployed>> {
        self.deployed
            .iter()
            .map(|deployed| deployed.value().clone())
            .collect()
    }

    pub fn signal(&self, signal: Signal) {
        // Without a listener Weir is stopping.
        _ = self.signals.send(signal);
    }

    /// Where a waiting request stands.
    #[must_use]
    pub fn position(&self, request: Uuid) -> Option<(FunctionId, VersionId, usize)> {
        self.all_deployed().iter().find_map(|deployed| {
            let position = deployed.queue.position(request.as_u128())?;
            Some((deployed.function, deployed.version, position))
        })
    }

    /// Takes what the directory has, and each change from now on before its author hears that it is made.
    pub fn follow(self: &Arc<Self>, directory: &Directory) {
        let table = self.clone();
        directory.observe(move |directory, function| table.apply(directory, function));
        for view in directory.views() {
            self.apply(directory, view.id);
        }
    }

    /// Brings one function's route up to what the directory says.
    fn apply(&self, directory: &Directory, function: FunctionId) {
        let before = self.view(function);
        let view = directory.view(function);
        let versions: Vec<VersionRoute> = match &view {
            Some(view) => {
                let versions = view.versions.iter();
                versions.map(|version| self.route(version)).collect()
            }
            None => Vec::new(),
        };
        let kept: Vec<DeploymentId> = versions
            .iter()
            .filter_map(|v| v.deployed.as_ref().map(|d| d.deployment))
            .collect();
        match view {
            Some(view) => {
                self.routes.insert(
                    function,
                    Arc::new(Route {
                        account: view.account.clone(),
                        versions,
                    }),
                );
            }
            None => {
                self.routes.remove(&function);
            }
        }
        for old in before
            .iter()
            .flat_map(|route| &route.versions)
            .filter_map(|v| v.deployed.as_ref())
        {
            if !kept.contains(&old.deployment) {
                self.deployed
                    .remove_if(&old.version, |_, now| now.deployment == old.deployment);
                old.queue.close("the deployment was removed".into());
            }
        }
    }

    fn route(&self, view: &VersionView) -> VersionRoute {
        let deployed = view.deployment.as_ref().map(|deployment| {
            let limits = Limits {
                max_requests: usize::try_from(deployment.queue.max_requests).unwrap_or(usize::MAX),
                max_bytes: deployment.queue.max_bytes,
            };
            let known = self
                .deployed(view.version.id)
                .filter(|known| known.deployment == deployment.id);
            let deployed = known.unwrap_or_else(|| {
                let deployed = Arc::new(Deployed::new(deployment, limits, &self.metrics));
                self.deployed.insert(view.version.id, deployed.clone());
                deployed
            });
            deployed.queue.set_limits(limits);
            tell_instances(&deployed, &view.instances, deployment.cancel_timeout.0);
            count_starts(&deployed, &view.instances);
            deployed
        });
        let failure: Option<Arc<str>> = view
            .instances
            .iter()
            .find_map(|i| i.failure.as_deref())
            .map(|kind| format!("its instance failed: {kind}").into());
        if let (Some(deployed), FunctionState::Error) = (&deployed, view.state) {
            let why = failure
                .clone()
                .unwrap_or_else(|| "its instances fail".into());
            deployed.queue.fail_waiters(why);
        }
        VersionRoute {
            version: view.version.clone(),
            state: view.state,
            shared_with: view.shared_with.clone(),
            deployed,
            deployment: view.deployment.clone(),
            // DEPLOYING: one that no agent has told of yet is under way too.
            starting: view.state == FunctionState::Deploying
                || view
                    .instances
                    .iter()
                    .any(|i| i.state == InstanceState::Starting),
            failure,
        }
    }
}

/// Tells the queue what changed about the instances since it was last told.
fn tell_instances(deployed: &Deployed, instances: &[Instance], cancel_timeout: Duration) {
    let mut told = deployed.told();
    let told = &mut *told;
    told.retired.retain(|id, there| {
        let now = instances.iter().any(|instance| instance.id == *id);
        let gone = *there && !now;
        *there |= now;
        !gone
    });
    let mut dialled: HashMap<InstanceId, Arc<Backend>> = HashMap::new();
    for instance in instances {
        let Some(address) = instance.address else {
            continue;
        };
        let name = instance.server_name.clone().map(ServerName::try_from);
        // Its agent has read it as a name already; never without TLS where it is asked for.
        let Ok(name) = name.transpose() else {
            continue;
        };
        let backend = Arc::new(Backend {
            instance: instance.id,
            address,
            name,
            capacity: instance.capacity,
            draining: instance.state == InstanceState::Draining,
            started: instance.spawned_at,
            healthy: instance.first_healthy_at,
            cancel_timeout,
        });
        let key = instance.id.0.as_u128();
        match instance.state {
            _ if told.retired.contains_key(&instance.id) => {}
            InstanceState::Ready | InstanceState::Draining => {
                let known = told.instances.get(&instance.id);
                if known.is_none_or(|known| **known != *backend) {
                    if known.is_some_and(|known| {
                        (known.address, &known.name, known.started)
                            != (backend.address, &backend.name, backend.started)
                    }) {
                        // Restarted: connections to the old process are of no use.
                        deployed.queue.remove_instance(key);
                    }
                    if backend.draining {
                        deployed.queue.drain_instance(key);
                    } else {
                        deployed.queue.put_instance(
                            key,
                            backend.clone(),
                            backend.capacity as usize,
                        );
                    }
                }
                dialled.insert(instance.id, backend);
            }
            InstanceState::Starting | InstanceState::Error => {}
        }
    }
    let before = told.instances.keys();
    for gone in before.filter(|id| !dialled.contains_key(id)) {
        deployed.queue.remove_instance(gone.0.as_u128());
    }
    told.instances = dialled;
}

/// From its last spawn to its first healthy answer.
fn start_time(instance: &Instance) -> Option<Duration> {
    let healthy = instance.first_healthy_at?;
    healthy.duration_since(instance.spawned_at?).try_into().ok()
}

/// Counts each start that came to a healthy answer and each restart, once.
fn count_starts(deployed: &Deployed, instances: &[Instance]) {
    let mut counted = deployed
        .counted
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let before = std::mem::take(&mut *counted);
    for instance in instances {
        let (start, restarts) = before.get(&instance.id).copied().unwrap_or_default();
        if instance.first_healthy_at != start
            && let Some(took) = start_time(instance)
        {
            deployed.metrics.started(took);
            deployed.started(took);
        }
        let more = instance.restarts.saturating_sub(restarts);
        deployed.metrics.restarted(more);
        counted.insert(instance.id, (instance.first_healthy_at, instance.restarts));
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use weir_control::model::{
        Autoscaling, GpuSpecificationId, IsoDuration, QueueSettings, Routing,
    };

    use super::*;

    const LIMITS: Limits = Limits {
        max_requests: 1,
        max_bytes: 1,
    };

    fn deployed_and_instance() -> (Deployed, Instance) {
        let now = Timestamp::now();
        let deployment = Deployment {
            id: DeploymentId::random(),
            function: FunctionId::random(),
            version: VersionId::random(),
            specifications: Vec::new(),
            autoscaling: Autoscaling::default(),
            queue: QueueSettings::default(),
            routing: Routing::default(),
            traffic_weight: None,
            start_timeout: IsoDuration::secs(1),
            drain_timeout: IsoDuration::secs(1),
            cancel_timeout: IsoDuration::secs(1),
            created_at: now,
            updated_at: now,
            undeploying: false,
        };
        let metrics = Metrics::new().unwrap();
        let instance = Instance {
            id: InstanceId::random(),
            function_id: deployment.function,
            function_version_id: deployment.version,
            deployment_id: deployment.id,
            gpu_specification_id: GpuSpecificationId::random(),
            node: "local".into(),
            state: InstanceState::Ready,
            address: Some(([127, 0, 0, 1], 1).into()),
            server_name: None,
            capacity: 1,
            pid: None,
            created_at: now,
            spawned_at: Some(now),
            first_healthy_at: None,
            restarts: 0,
            error: None,
            failure: None,
            last_log_line: None,
            gpus: Vec::new(),
        };
        (Deployed::new(&deployment, LIMITS, &metrics), instance)
    }

    #[test]
    fn a_restart_ends_the_time_that_an_instance_is_set_aside() {
        let (deployed, mut instance) = deployed_and_instance();
        let tell = |instance: &Instance| {
            tell_instances(&deployed, std::slice::from_ref(instance), Duration::ZERO);
            deployed.queue.load().ready_instances
        };
        assert_eq!(tell(&instance), 1);
        deployed.queue.eject(instance.id.0.as_u128());
        assert_eq!(tell(&instance), 0);
        // The same ID and address, and another process.
        instance.spawned_at = Some(Timestamp::now() + SignedDuration::from_secs(1));
        assert_eq!(tell(&instance), 1);
    }

    #[test]
    fn a_retired_instance_does_not_come_back() {
        let (deployed, mut instance) = deployed_and_instance();
        let tell = |instances: &[Instance]| {
            tell_instances(&deployed, instances, Duration::ZERO);
            deployed.queue.load().ready_instances
        };
        // Retired while it starts: that it became ready is on its way.
        assert!(deployed.retire_if_idle(instance.id));
        assert_eq!(tell(std::slice::from_ref(&instance)), 0);
        assert_eq!(tell(&[]), 0);
        assert!(deployed.told().retired.is_empty());

        instance.id = InstanceId::random();
        assert_eq!(tell(std::slice::from_ref(&instance)), 1);
        assert!(deployed.retire_if_idle(instance.id));
        instance.capacity += 1;
        assert_eq!(tell(std::slice::from_ref(&instance)), 0);
    }

    #[test]
    fn the_start_time_is_the_median_of_the_last_starts_also_of_instances_that_went() {
        let (deployed, mut instance) = deployed_and_instance();
        let spawned = instance.spawned_at.unwrap();
        assert_eq!(deployed.start_time(), None);
        let mut start = |seconds: i64| {
            instance.id = InstanceId::random();
            instance.first_healthy_at = Some(spawned + SignedDuration::from_secs(seconds));
            // Twice: a start counts once.
            count_starts(&deployed, std::slice::from_ref(&instance));
            count_starts(&deployed, std::slice::from_ref(&instance));
            count_starts(&deployed, &[]);
            deployed.start_time().map(|time| time.as_secs())
        };
        assert_eq!(start(1), Some(1));
        assert_eq!(start(7), Some(7));
        assert_eq!(start(3), Some(3));
        for _ in 0..STARTS {
            start(20);
        }
        assert_eq!(deployed.start_time(), Some(Duration::from_secs(20)));
    }
}
