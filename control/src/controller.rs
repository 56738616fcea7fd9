//! Brings what is so towards what was asked for: how many instances each
//! deployment gets, which start, which stop.
//!
//! One task, driven by events: a change of a function, a demand signal from a
//! request path, an instance that went, and a tick for the versions that are
//! awake. The decision is [`scale::decide`], a pure function; this module
//! only carries it out. It is the single writer of instance counts.
//!
//! Scaling in never kills work: an instance is taken out of its queue only
//! while idle, under the queue's lock, and is stopped after that. What is above
//! a maximum and busy drains first: it gets no more work, and goes when idle.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::{
    sync::broadcast,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use crate::{
    agent::{Agent, Assignment},
    coordination::{self, Coordination, CoordinationError},
    directory::{Directory, VersionView, decode, record},
    model::{
        AutoscalingPolicy, Deployment, DeploymentId, FunctionId, GpuSpecification,
        GpuSpecificationId, Instance, InstanceId, InstanceState, Launch, VersionId,
    },
    scale::{self, Decision, History, Observed, Sample, Settings, Share},
    store::{Change, Expect, Partition, Store, StoreError},
};

use self::plan::{Health, Present, plan};

mod plan;
#[cfg(test)]
mod tests;

/// The slots that the data plane gives out.
pub trait Slots: Send + Sync + 'static {
    /// Takes the instance out if it is idle, under the queue's lock; true if it was, or is not there at all.
    fn retire_if_idle(&self, version: VersionId, instance: InstanceId) -> bool;

    /// The instance gets no more work, under the queue's lock; what it has goes on.
    fn drain(&self, version: VersionId, instance: InstanceId);
}

/// Decisions kept for reading back, for each version.
const KEPT: usize = 64;
/// An endpoint that takes longer to be ready, and whatever was ready and is in error for longer, fails: something else
/// is tried.
const PATIENCE: Duration = Duration::from_secs(1);
/// A graceful stop of an undeployed version is looked at this often.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// A decision and when it was made.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decided {
    pub at: Timestamp,
    #[serde(flatten)]
    pub decision: Decision,
}

type Listener = dyn Fn(VersionId, &Decision) + Send + Sync;

/// The last decisions, for those who ask why.
pub struct Decisions {
    all: Mutex<HashMap<VersionId, VecDeque<Decided>>>,
    heard: Box<Listener>,
}

impl Decisions {
    /// `heard` is told of each decision that is kept.
    #[must_use]
    pub fn new(heard: impl Fn(VersionId, &Decision) + Send + Sync + 'static) -> Self {
        Self {
            all: Mutex::default(),
            heard: Box::new(heard),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<VersionId, VecDeque<Decided>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Newest last.
    #[must_use]
    pub fn of(&self, version: VersionId) -> Vec<Decided> {
        self.all()
            .get(&version)
            .map(|kept| kept.iter().cloned().collect())
            .unwrap_or_default()
    }

    fn keep(&self, version: VersionId, decision: Decision) {
        let mut all = self.all();
        let kept = all.entry(version).or_default();
        let news = kept.back().is_none_or(|last| {
            last.decision.desired != decision.desired || last.decision.reason != decision.reason
        });
        if news {
            (self.heard)(version, &decision);
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(Decided {
                at: Timestamp::now(),
                decision,
            });
        }
    }

    fn forget(&self, version: VersionId) {
        self.all().remove(&version);
    }
}

/// An instance that the controller asked for and that has not gone.
#[derive(Clone, Debug)]
struct Asked {
    specification: GpuSpecificationId,
    endpoint: Option<String>,
    /// What its agent was last told.
    deployment: Arc<Deployment>,
    /// Above the maximum: it gets no more work, and stops when idle.
    draining: bool,
    stopping: bool,
    /// It was published. Before that its absence says nothing.
    published: bool,
    /// Since when it is not ready.
    unready: Option<Duration>,
}

impl Asked {
    /// It counts as an instance that is wanted.
    fn stays(&self) -> bool {
        !self.draining && !self.stopping
    }

    /// What was asked for counts as starting until its agent says otherwise.
    fn health(&mut self, instance: Option<&Instance>, now: Duration) -> Health {
        let state = instance.map_or(InstanceState::Starting, |i| i.state);
        if state == InstanceState::Ready {
            self.unready = None;
            return Health::Ready;
        }
        let since = *self.unready.get_or_insert(now);
        let late = now.saturating_sub(since) >= PATIENCE;
        let was_ready = instance.is_some_and(|i| i.first_healthy_at.is_some());
        match state {
            InstanceState::Error if late || !was_ready => Health::Failing,
            // A server that is there is ready at once; a process takes the time that it has.
            _ if late && self.endpoint.is_some() => Health::Failing,
            _ => Health::Starting,
        }
    }

    fn assignment(&self, instance: InstanceId, view: &VersionView) -> Assignment {
        Assignment {
            instance,
            version: view.version.clone(),
            deployment: self.deployment.clone(),
            specification: self.specification,
            endpoint: self.endpoint.clone(),
        }
    }
}

/// What is carried from one decision on a deployment to the next.
struct Scaling {
    function: FunctionId,
    version: VersionId,
    history: History,
    state: scale::State,
    asked: BTreeMap<InstanceId, Asked>,
    /// In the order they were asked for.
    order: Vec<InstanceId>,
    next_look: Option<Instant>,
    draining_since: Option<Instant>,
    /// The drained deployment's record is being removed. Not awaited: it may take as long as a disk does.
    removal: Option<JoinHandle<()>>,
    /// Specifications of which an instance failed and none has been ready since: they are filled last.
    failed: HashSet<GpuSpecificationId>,
    /// When these were last seen to fail, without having been ready since: they are taken last.
    failed_endpoints: HashMap<String, Duration>,
    backoff: Backoff,
}

/// Between one more try of what fails and the next, beside what the agents do by themselves.
#[derive(Default)]
struct Backoff {
    tries: u32,
    last: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(300);

    /// The first try waits for nothing.
    fn is_over(&self, now: Duration) -> bool {
        let pause = match self.tries.checked_sub(1) {
            None => Duration::ZERO,
            Some(before) => Self::FIRST.saturating_mul(1 << before.min(16)),
        };
        now.saturating_sub(self.last) >= pause.min(Self::LONGEST)
    }

    fn again(&mut self, now: Duration) {
        self.tries = self.tries.saturating_add(1);
        self.last = now;
    }
}

impl Scaling {
    fn new(deployment: &Deployment, settings: &Settings) -> Self {
        Self {
            function: deployment.function,
            version: deployment.version,
            history: History::new(settings),
            state: scale::State::default(),
            asked: BTreeMap::new(),
            order: Vec::new(),
            next_look: None,
            draining_since: None,
            removal: None,
            failed: HashSet::new(),
            failed_endpoints: HashMap::new(),
            backoff: Backoff::default(),
        }
    }

    /// How the instances are that stay. Remembers what fails.
    fn present(
        &mut self,
        view: &VersionView,
        specifications: &[GpuSpecification],
        now: Duration,
    ) -> Vec<Present> {
        let mut present = Vec::new();
        for id in &self.order {
            let Some(asked) = self.asked.get_mut(id).filter(|asked| asked.stays()) else {
                continue;
            };
            let own = |s: &GpuSpecification| s.id == asked.specification;
            let Some(specification) = specifications.iter().position(own) else {
                continue;
            };
            let instance = view.instances.iter().find(|i| i.id == *id);
            let health = asked.health(instance, now);
            if let Some(endpoint) = &asked.endpoint {
                match health {
                    Health::Ready => _ = self.failed_endpoints.remove(endpoint),
                    Health::Starting => {}
                    Health::Failing => _ = self.failed_endpoints.insert(endpoint.clone(), now),
                }
            }
            present.push(Present {
                id: *id,
                specification,
                health,
            });
        }
        let any = |at: Option<usize>, health| {
            let mut these = present.iter();
            these.any(|p| p.health == health && at.is_none_or(|at| p.specification == at))
        };
        for (at, specification) in specifications.iter().enumerate() {
            if any(Some(at), Health::Ready) {
                self.failed.remove(&specification.id);
            } else if any(Some(at), Health::Failing) {
                self.failed.insert(specification.id);
            }
        }
        if any(None, Health::Ready) && !any(None, Health::Failing) {
            self.backoff = Backoff::default();
        }
        present
    }

    /// When the next of those that are not ready counts as failing, if nothing happens before.
    fn out_of_patience(&self, now: Duration) -> Option<Duration> {
        let staying = self.asked.values().filter(|asked| asked.stays());
        staying
            .filter_map(|asked| (asked.unready? + PATIENCE).checked_sub(now))
            .filter(|left| !left.is_zero())
            .min()
    }

    /// One that no instance has: the first that never failed, else the one that failed longest ago.
    fn free_endpoint(&self, endpoints: &[String]) -> Option<String> {
        let taken = |endpoint: &&String| {
            let mut all = self.asked.values();
            all.any(|asked| asked.endpoint.as_ref() == Some(*endpoint))
        };
        let free = endpoints.iter().filter(|endpoint| !taken(endpoint));
        free.min_by_key(|endpoint| self.failed_endpoints.get(*endpoint))
            .cloned()
    }
}

pub struct Controller {
    pub store: Arc<dyn Store>,
    pub directory: Arc<Directory>,
    pub coordination: Arc<dyn Coordination>,
    pub slots: Arc<dyn Slots>,
    pub agent: Agent,
    pub decisions: Arc<Decisions>,
    scalings: HashMap<DeploymentId, Scaling>,
    start: Instant,
}

impl Controller {
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        directory: Arc<Directory>,
        coordination: Arc<dyn Coordination>,
        slots: Arc<dyn Slots>,
        agent: Agent,
        decisions: Arc<Decisions>,
    ) -> Self {
        Self {
            store,
            directory,
            coordination,
            slots,
            agent,
            decisions,
            scalings: HashMap::new(),
            start: Instant::now(),
        }
    }

    /// Runs until nothing tells it of changes any more. Call it once this process leads.
    pub async fn run(mut self) -> Result<(), CoordinationError> {
        let mut changes = self.directory.subscribe();
        let mut signals = self.coordination.signals();
        let mut instances = self.coordination.watch().await?;
        let mut due: HashSet<FunctionId> =
            self.directory.views().iter().map(|view| view.id).collect();
        loop {
            for function in due.drain() {
                self.look(function);
            }
            let next = self.scalings.values().filter_map(|s| s.next_look).min();
            let tick =
                sleep_until(next.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)));
            tokio::select! {
                change = changes.recv() => match change {
                    Ok(function) => {
                        due.insert(function);
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        due.extend(self.directory.views().iter().map(|view| view.id));
                        due.extend(self.scalings.values().map(|s| s.function));
                    }
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                signal = signals.recv() => {
                    let Some(signal) = signal else { return Ok(()) };
                    due.extend(signal.demand());
                    while let Ok(signal) = signals.try_recv() {
                        due.extend(signal.demand());
                    }
                }
                event = instances.next() => self.hear(event?, &mut due),
                () = tick => {
                    let now = Instant::now();
                    due.extend(
                        self.scalings.values().filter(|s| s.next_look.is_some_and(|at| at <= now)).map(|s| s.function),
                    );
                }
            }
        }
    }

    /// Keeps what was asked for true. The directory hears the same, and tells of the functions it changed.
    fn hear(&mut self, event: coordination::Event, due: &mut HashSet<FunctionId>) {
        let (there, gone): (HashSet<InstanceId>, _) = match event {
            coordination::Event::All(all) => (all.iter().map(|i| i.id).collect(), None),
            coordination::Event::Changed(instance) => {
                if let Some(scaling) = self.scalings.get_mut(&instance.deployment_id)
                    && let Some(asked) = scaling.asked.get_mut(&instance.id)
                {
                    asked.published = true;
                }
                return;
            }
            coordination::Event::Gone(instance) => (HashSet::new(), Some(instance)),
        };
        for scaling in self.scalings.values_mut() {
            let before = scaling.asked.len();
            scaling.asked.retain(|id, asked| {
                asked.published |= there.contains(id);
                match gone {
                    Some(gone) => *id != gone,
                    None => !asked.published || there.contains(id),
                }
            });
            if scaling.asked.len() < before {
                scaling.order.retain(|id| scaling.asked.contains_key(id));
                due.insert(scaling.function);
            }
        }
    }

    /// Decides anew for every version of a function, and acts.
    fn look(&mut self, function: FunctionId) {
        let view = self.directory.view(function);
        let versions: &[VersionView] = view.as_ref().map_or(&[], |view| &view.versions);
        let current: HashSet<DeploymentId> = versions
            .iter()
            .filter_map(|v| v.deployment.as_ref().map(|d| d.id))
            .collect();
        for version in versions {
            match &version.deployment {
                Some(deployment) if deployment.undeploying => self.drain(deployment),
                Some(deployment) => self.scale(version, deployment),
                None => {}
            }
        }
        // Deployments that are gone: nothing waits there any more, their instances stop.
        for (id, scaling) in self
            .scalings
            .iter_mut()
            .filter(|(_, s)| s.function == function)
        {
            if !current.contains(id) {
                scaling.next_look = None;
                self.decisions.forget(scaling.version);
                for (instance, asked) in &mut scaling.asked {
                    if !std::mem::replace(&mut asked.stopping, true) {
                        self.agent.stop(*instance);
                    }
                }
            }
        }
        self.scalings.retain(|id, scaling| {
            scaling.function != function || current.contains(id) || !scaling.asked.is_empty()
        });
    }

    fn scale(&mut self, view: &VersionView, deployment: &Arc<Deployment>) {
        let settings = settings_of(deployment);
        let scaling = self
            .scalings
            .entry(deployment.id)
            .or_insert_with(|| Scaling::new(deployment, &settings));
        let now = self.start.elapsed();
        scaling.history.fit(&settings);
        let sample = self
            .coordination
            .load(deployment.version)
            .map(|sample| Sample { at: now, ..sample });
        if let Some(sample) = sample {
            scaling.history.push(sample);
        }
        let specifications = &deployment.specifications;
        let present = scaling.present(view, specifications, now);
        let observed = observe(&present);
        let (decision, state) = scale::decide(
            &settings,
            &scaling.history,
            observed,
            std::mem::take(&mut scaling.state),
            now,
        );
        scaling.state = state;
        let desired = decision.desired;
        self.decisions.keep(deployment.version, decision);

        for (instance, asked) in &mut scaling.asked {
            if asked.draining
                && !asked.stopping
                && self.slots.retire_if_idle(deployment.version, *instance)
            {
                asked.stopping = true;
                self.agent.stop(*instance);
            }
        }
        // A changed deployment reaches the instances that run.
        for (instance, asked) in &mut scaling.asked {
            if !Arc::ptr_eq(&asked.deployment, deployment) {
                asked.deployment = deployment.clone();
                self.agent.run(asked.assignment(*instance, view));
            }
        }

        let shares: Vec<Share> = specifications
            .iter()
            .map(|s| Share {
                min: s.min_instances,
                max: s.max_instances,
                failed: scaling.failed.contains(&s.id),
            })
            .collect();
        let may_retry = scaling.backoff.is_over(now);
        let mut retried = false;
        for (specification, step) in specifications.iter().zip(plan(desired, &shares, &present)) {
            let go = |scaling: &mut Scaling, id: InstanceId| {
                let idle = self.slots.retire_if_idle(deployment.version, id);
                if idle && let Some(asked) = scaling.asked.get_mut(&id) {
                    asked.stopping = true;
                    self.agent.stop(id);
                }
                idle
            };
            let mut failing = step.failing.iter().copied();
            for _ in 0..step.failed {
                if !failing.any(|id| go(scaling, id)) {
                    break;
                }
            }
            let mut busy = Vec::new();
            let mut left = step.surplus;
            for id in step.healthy {
                if left == 0 {
                    break;
                }
                if go(scaling, id) {
                    left -= 1;
                } else {
                    busy.push(id);
                }
            }
            // A saturated one is never idle by itself.
            let above = step.above.saturating_sub(step.surplus - left);
            for id in busy.into_iter().take(above) {
                if let Some(asked) = scaling.asked.get_mut(&id) {
                    asked.draining = true;
                }
                self.slots.drain(deployment.version, id);
                // For everyone else, and for as long as it is there.
                self.agent.drain(id);
            }

            for started in 0..step.start + step.instead {
                let beside = started < step.start;
                let endpoint = match &view.version.launch {
                    // Its agent tries again what fails; a second beside it is for what only that one has.
                    Launch::Process(_) if !beside => break,
                    Launch::Process(_) => {
                        retried |= !step.failing.is_empty();
                        None
                    }
                    Launch::Endpoints(endpoints) => {
                        let Some(endpoint) = scaling.free_endpoint(endpoints) else {
                            break;
                        };
                        retried |= scaling.failed_endpoints.contains_key(&endpoint);
                        Some(endpoint)
                    }
                };
                if retried && !may_retry {
                    retried = false;
                    break;
                }
                if !beside && !failing.any(|id| go(scaling, id)) {
                    break;
                }
                let instance = InstanceId::random();
                tracing::debug!(version = %deployment.version, %instance, "an instance is to start");
                let asked = Asked {
                    specification: specification.id,
                    endpoint,
                    deployment: deployment.clone(),
                    draining: false,
                    stopping: false,
                    published: false,
                    unready: Some(now),
                };
                self.agent.run(asked.assignment(instance, view));
                scaling.order.push(instance);
                scaling.asked.insert(instance, asked);
            }
        }
        if retried {
            scaling.backoff.again(now);
        }
        let asleep =
            scaling.asked.is_empty() && desired == 0 && sample.is_none_or(|s| s.in_system == 0);
        let soon = scaling.out_of_patience(now);
        let tick = scale::next_tick(&settings);
        let wait = soon.map_or(tick, |soon| tick.min(soon));
        scaling.next_look = (!asleep).then(|| Instant::now() + wait);
    }

    /// A graceful undeploy: no new work comes; when nothing waits or runs, or the time is over, the record goes.
    fn drain(&mut self, deployment: &Arc<Deployment>) {
        let settings = settings_of(deployment);
        let scaling = self
            .scalings
            .entry(deployment.id)
            .or_insert_with(|| Scaling::new(deployment, &settings));
        let since = *scaling.draining_since.get_or_insert_with(Instant::now);
        let load = self
            .coordination
            .load(deployment.version)
            .map_or(0, |sample| sample.in_system);
        if load > 0 && since.elapsed() < deployment.drain_timeout.0 {
            scaling.next_look = Some(Instant::now() + DRAIN_LOOK);
            return;
        }
        // Where the removal fails, another look comes in a second.
        scaling.next_look = Some(Instant::now() + Duration::from_secs(1));
        if scaling.removal.as_ref().is_none_or(JoinHandle::is_finished) {
            let (store, deployment) = (self.store.clone(), deployment.clone());
            scaling.removal = Some(tokio::spawn(async move {
                if let Err(error) = remove_drained(&*store, &deployment).await {
                    tracing::warn!(version = %deployment.version, %error, "a drained deployment could not be removed");
                }
            }));
        }
    }
}

/// Removes the record of this deployment, and of no other that the version got meanwhile.
async fn remove_drained(store: &dyn Store, drained: &Deployment) -> Result<(), StoreError> {
    let key = record::deployment(drained.function, drained.version);
    let partition = Partition::of(drained.function);
    let Some(found) = store.get(partition, &key).await? else {
        return Ok(());
    };
    let stored: Deployment = decode(&key, &found.value)?;
    if stored.id != drained.id {
        return Ok(());
    }
    let expect = Expect::Revision(found.revision);
    let value = None;
    let removal = Change { key, expect, value };
    store.commit(partition, vec![removal]).await.map(drop)
}

fn settings_of(deployment: &Deployment) -> Settings {
    let autoscaling = &deployment.autoscaling;
    Settings {
        policy: match autoscaling.policy {
            AutoscalingPolicy::Concurrency => scale::Policy::Concurrency,
            AutoscalingPolicy::NvcfStep => {
                scale::Policy::NvcfStep(scale::Steps::of(&deployment.autoscaling_configuration()))
            }
        },
        target_utilization: autoscaling.target_utilization,
        stable_window: autoscaling.stable_window.0,
        panic_window: autoscaling.panic_window.0,
        scale_in_delay: autoscaling.scale_in_delay.0,
        idle_timeout: autoscaling.idle_timeout.0,
        min: deployment.min_instances(),
        max: deployment.max_instances(),
        concurrency: deployment
            .specifications
            .iter()
            .map(|s| s.max_request_concurrency)
            .min()
            .unwrap_or(1),
    }
}

fn observe(present: &[Present]) -> Observed {
    let count = |health| present.iter().filter(|p| p.health == health).count() as u32;
    Observed {
        ready: count(Health::Ready),
        starting: count(Health::Starting),
        error: count(Health::Failing),
    }
}
