//! A controller with a real agent, whose instances are endpoints of the test.

use async_trait::async_trait;
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};

use super::*;
use crate::{
    agent::AgentConfig,
    coordination::{Load, Member, Signal, local::Local, take_part},
    directory::encode,
    model::{Instance, Version},
    store::{Cursor, Position, Record, Watch, embedded::Embedded},
};

/// For what should take milliseconds.
const SOON: Duration = Duration::from_secs(20);

/// A store whose commits wait for permits, and say how many wait.
struct Slow {
    inner: Arc<dyn Store>,
    permits: Semaphore,
    waiting: watch::Sender<usize>,
}

#[async_trait]
impl Store for Slow {
    async fn get(&self, partition: Partition, key: &str) -> Result<Option<Record>, StoreError> {
        self.inner.get(partition, key).await
    }
    async fn list(
        &self,
        partition: Partition,
        prefix: &str,
    ) -> Result<(Vec<Record>, Position), StoreError> {
        self.inner.list(partition, prefix).await
    }
    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<u64, StoreError> {
        self.waiting.send_modify(|waiting| *waiting += 1);
        let permit = self.permits.acquire().await.unwrap();
        permit.forget();
        self.inner.commit(partition, changes).await
    }
    async fn watch(&self, cursor: Cursor) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(cursor).await
    }
}

/// One invocation waits, for whatever version.
struct OneWaits;

impl Load for OneWaits {
    fn sample(&self, _: VersionId) -> Option<Sample> {
        Some(Sample {
            in_system: 1,
            queued: 1,
            ..Sample::default()
        })
    }
    fn versions(&self) -> Vec<VersionId> {
        Vec::new()
    }
}

/// Nothing is ever busy.
struct Idle;

impl Slots for Idle {
    fn retire_if_idle(&self, _: VersionId, _: InstanceId) -> bool {
        true
    }
    fn drain(&self, _: VersionId, _: InstanceId) {}
}

/// A version and its deployment, deployed with these settings.
fn deployed(endpoints: &[String], extra: serde_json::Value) -> (Version, Deployment) {
    let (function, version) = (FunctionId::random(), VersionId::random());
    let now = Timestamp::now();
    let made = json!({
        "function": function, "id": version, "account": "default", "name": "a", "description": "",
        "inferenceUrl": "/", "inferencePort": null, "launch": {"endpoints": endpoints}, "tags": [],
        "rateLimit": null, "createdAt": now,
        "health": {"protocol": "HTTP", "uri": "/", "timeout": "PT5S", "expectedStatusCode": 200},
    });
    let mut deployment = json!({
        "id": DeploymentId::random(), "function": function, "version": version,
        "specifications": [{
            "id": GpuSpecificationId::random(), "gpu": "none", "instanceType": "none",
            "minInstances": 0, "maxInstances": 1, "maxRequestConcurrency": 1,
        }],
        "autoscaling": {}, "queue": {}, "routing": {}, "trafficWeight": null,
        "startTimeout": "PT10M", "drainTimeout": "PT5M", "cancelTimeout": "PT5S",
        "createdAt": now, "updatedAt": now,
    });
    if let (Some(all), serde_json::Value::Object(extra)) = (deployment.as_object_mut(), extra) {
        all.extend(extra);
    }
    (
        serde_json::from_value(made).unwrap(),
        serde_json::from_value(deployment).unwrap(),
    )
}

async fn put(store: &dyn Store, version: &Version, deployment: &Deployment) {
    let change = |key, value| Change {
        key,
        expect: Expect::Anything,
        value: Some(value),
    };
    let (function, id) = (version.function, version.id);
    let changes = vec![
        change(record::version(function, id), encode(version)),
        change(record::deployment(function, id), encode(deployment)),
    ];
    let partition = Partition::of(function);
    store.commit(partition, changes).await.unwrap();
}

/// Everything but the data plane.
struct Rig {
    directory: Arc<Directory>,
    member: Arc<dyn Member>,
    slow: Arc<Slow>,
    /// What it would signal; where this ends, so does its part.
    _own: mpsc::UnboundedSender<Signal>,
    _files: TempDir,
}

impl Rig {
    /// With these in the store, whose further commits get no permit.
    async fn new(load: Arc<dyn Load>, there: &[(Version, Deployment)]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let inner: Arc<dyn Store> = Embedded::open(&files.path().join("store")).unwrap();
        for (version, deployment) in there {
            put(&*inner, version, deployment).await;
        }
        let slow = Arc::new(Slow {
            inner,
            permits: Semaphore::new(0),
            waiting: watch::Sender::new(0),
        });
        let (directory, feed) = Directory::load(&*slow).await.unwrap();
        let coordination: Arc<dyn Coordination> = Arc::new(Local::default());
        let member: Arc<dyn Member> = coordination.join("a", load).await.unwrap().into();
        let (report_sender, reports) = mpsc::unbounded_channel();
        let agent = Agent::start(
            AgentConfig {
                node: "a".into(),
                data_dir: files.path().join("agent"),
                ports: 1..=1,
                user: None,
                gpus: Vec::new(),
                forbidden: Vec::new(),
                kill_after: SOON,
                open_files: None,
                trust: crate::dial::Trust::default(),
            },
            report_sender,
        )
        .unwrap();
        let (own, signals) = mpsc::unbounded_channel();
        let controller = Controller::new(
            slow.clone(),
            directory.clone(),
            coordination.clone(),
            Arc::new(Idle),
            agent.clone(),
            Arc::new(Decisions::new(|_, _| ())),
        );
        {
            let (directory, store) = (directory.clone(), slow.clone());
            tokio::spawn(async move { directory.follow(&*store, feed).await });
        }
        {
            let (directory, watch) = (directory.clone(), coordination.watch().await.unwrap());
            tokio::spawn(async move { directory.follow_instances(watch).await });
        }
        let heard = coordination.signals();
        tokio::spawn(take_part(member.clone(), agent, reports, signals, heard));
        tokio::spawn(controller.run());
        Self {
            directory,
            member,
            slow,
            _own: own,
            _files: files,
        }
    }

    /// Waits until the version's instances are as wanted.
    async fn until(&self, of: &Version, wanted: impl Fn(&[Instance]) -> bool) {
        let mut changes = self.directory.subscribe();
        let holds = || {
            let view = self.directory.view(of.function);
            view.is_some_and(|view| view.version(of.id).is_some_and(|v| wanted(&v.instances)))
        };
        timeout(SOON, async {
            while !holds() {
                changes.recv().await.unwrap();
            }
        })
        .await
        .expect("its instances become so");
    }
}

/// An endpoint that says it is well.
async fn well() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = || async { "well" };
    let router = axum::Router::new().route("/", axum::routing::get(answer));
    tokio::spawn(axum::serve(listener, router).into_future());
    format!("http://{address}")
}

#[tokio::test]
async fn a_cold_start_does_not_wait_for_the_store() {
    let endpoint = well().await;
    let cold = deployed(&[endpoint], json!({}));
    let going = deployed(&[], json!({"undeploying": true, "drainTimeout": "PT0S"}));
    let rig = Rig::new(Arc::new(OneWaits), &[cold.clone(), going.clone()]).await;
    let mut commits = rig.slow.waiting.subscribe();
    let waits = timeout(SOON, commits.wait_for(|waiting| *waiting == 1));
    waits
        .await
        .expect("the removal of what is drained")
        .unwrap();

    let (function, version) = (cold.0.function, cold.0.id);
    rig.member.signal(Signal::Demand(function, version));
    rig.until(&cold.0, |all| {
        all.iter().any(|i| i.state == InstanceState::Ready)
    })
    .await;
    assert_eq!(*rig.slow.waiting.borrow(), 1, "one removal is in flight");
    rig.slow.permits.add_permits(1);
    let gone = || {
        let view = rig.directory.view(going.0.function).unwrap();
        view.versions[0].deployment.is_none()
    };
    let mut changes = rig.directory.subscribe();
    timeout(SOON, async {
        while !gone() {
            changes.recv().await.unwrap();
        }
    })
    .await
    .expect("the drained deployment goes");
}

#[tokio::test]
async fn only_the_deployment_that_drained_is_removed() {
    let files = tempfile::tempdir().unwrap();
    let store = Embedded::open(&files.path().join("store")).unwrap();
    let (version, drained) = deployed(&[], json!({"undeploying": true}));
    let anew = Deployment {
        id: DeploymentId::random(),
        undeploying: false,
        ..drained.clone()
    };
    put(&*store, &version, &anew).await;
    let partition = Partition::of(version.function);
    let key = record::deployment(version.function, version.id);
    remove_drained(&*store, &drained).await.unwrap();
    let stored = store.get(partition, &key).await.unwrap().unwrap();
    assert_eq!(decode::<Deployment>(&key, &stored.value).unwrap(), anew);
    remove_drained(&*store, &anew).await.unwrap();
    assert_eq!(store.get(partition, &key).await.unwrap(), None);
    remove_drained(&*store, &anew).await.unwrap();
}
