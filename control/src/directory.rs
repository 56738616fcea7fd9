//! Intent and facts joined: one immutable view of each function, replaced
//! whole when anything about it changes.
//!
//! The directory follows the store's feed and the agents' reports, and is the
//! only writer of the map. A reader takes one view and never sees half a
//! change. After a gap in the feed everything is listed again and replaced
//! entry by entry, then what is gone is removed: the map is never cleared, so
//! traffic goes on meanwhile.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use dashmap::DashMap;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{broadcast, watch};

use crate::{
    coordination::{self, CoordinationError},
    model::{
        Account, AccountId, Deployment, DeploymentId, FunctionId, FunctionState, Instance,
        InstanceId, InstanceState, Key, KeyId, Sharing, Version, VersionId,
    },
    state::{Past, state_of},
    store::{Cursor, Event, Partition, Store, StoreError, Watch},
};

/// One version with all that is known of it.
#[derive(Clone, Debug)]
pub struct VersionView {
    pub version: Arc<Version>,
    pub deployment: Option<Arc<Deployment>>,
    /// In the order they were made.
    pub instances: Vec<Instance>,
    pub state: FunctionState,
    /// Accounts that may call it besides its own; `*` means all.
    pub shared_with: Arc<[String]>,
}

/// One function; there is one as long as it has a version.
#[derive(Clone, Debug)]
pub struct FunctionView {
    pub id: FunctionId,
    pub account: AccountId,
    /// Oldest first.
    pub versions: Vec<VersionView>,
}

impl FunctionView {
    #[must_use]
    pub fn version(&self, id: VersionId) -> Option<&VersionView> {
        self.versions.iter().find(|v| v.version.id == id)
    }
}

/// The names of records.
pub mod record {
    use super::{AccountId, FunctionId, KeyId, VersionId};

    #[must_use]
    pub fn version(function: FunctionId, version: VersionId) -> String {
        format!("{function}/version/{version}")
    }
    #[must_use]
    pub fn deployment(function: FunctionId, version: VersionId) -> String {
        format!("{function}/deployment/{version}")
    }
    /// `version` absent: of the whole function.
    #[must_use]
    pub fn sharing(function: FunctionId, version: Option<VersionId>) -> String {
        match version {
            Some(version) => format!("{function}/sharing/{version}"),
            None => format!("{function}/sharing/all"),
        }
    }
    #[must_use]
    pub fn key(key: KeyId) -> String {
        format!("key/{key}")
    }
    /// Says that an admin key with this hash was revoked; there as long as the store.
    #[must_use]
    pub fn revoked(hash: &str) -> String {
        format!("revoked/{hash}")
    }
    #[must_use]
    pub fn account(account: &AccountId) -> String {
        format!("account/{account}")
    }
}

/// A record as the store keeps it.
///
/// # Panics
/// Never: the records of the model have string keys only.
pub fn encode<T: Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).expect("records serialise").into()
}

pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value)
        .map_err(|error| StoreError::Damaged(format!("record '{key}': {error}")))
}

/// What one function is made of, before it becomes a view.
#[derive(Default)]
struct Parts {
    versions: BTreeMap<VersionId, Arc<Version>>,
    deployments: HashMap<VersionId, Arc<Deployment>>,
    sharing: HashMap<Option<VersionId>, Sharing>,
    instances: Vec<Instance>,
    /// What its deployments have been through.
    pasts: HashMap<DeploymentId, Past>,
}

impl Parts {
    /// A ready instance failed, or went without having drained.
    fn lost(&mut self, deployment: DeploymentId) {
        if let Some(past @ Past::Reached) = self.pasts.get_mut(&deployment) {
            *past = Past::Lost;
        }
    }
}

type Observer = dyn Fn(&Directory, FunctionId) + Send + Sync;

/// See the module's head.
pub struct Directory {
    views: DashMap<FunctionId, Arc<FunctionView>>,
    keys: DashMap<String, Arc<Key>>,
    accounts: DashMap<AccountId, Arc<Account>>,
    /// Written by those who follow intent and instances; a std mutex, held for one change.
    parts: Mutex<HashMap<FunctionId, Parts>>,
    changes: broadcast::Sender<FunctionId>,
    /// See [`Directory::observe`].
    observer: OnceLock<Box<Observer>>,
    applied: watch::Sender<Cursor>,
}

impl Directory {
    /// Lists the whole store and starts to watch it; call [`Directory::follow`] next.
    pub async fn load(store: &dyn Store) -> Result<(Arc<Self>, Box<dyn Watch>), StoreError> {
        let directory = Arc::new(Self {
            views: DashMap::new(),
            keys: DashMap::new(),
            accounts: DashMap::new(),
            parts: Mutex::default(),
            changes: broadcast::Sender::new(4096),
            observer: OnceLock::new(),
            applied: watch::Sender::new(Cursor::default()),
        });
        let feed = directory.resync(store).await?;
        Ok((directory, feed))
    }

    /// Applies the feed for ever; ends only with an error that a new start must mend.
    pub async fn follow(
        &self,
        store: &dyn Store,
        mut feed: Box<dyn Watch>,
    ) -> Result<(), StoreError> {
        loop {
            match feed.next().await? {
                Event::Commit(commit) => {
                    for (key, value) in commit.changes.iter() {
                        self.apply(commit.partition, key, value.as_deref())?;
                    }
                    self.applied.send_modify(|cursor| {
                        cursor.0.entry(commit.partition).or_default().revision = commit.revision;
                    });
                }
                Event::FellBehind => feed = self.resync(store).await?,
            }
        }
    }

    async fn resync(&self, store: &dyn Store) -> Result<Box<dyn Watch>, StoreError> {
        let mut cursor = Cursor::default();
        for partition in Partition::all() {
            let (records, position) = store.list(partition, "").await?;
            let present: HashSet<&str> = records.iter().map(|r| r.key.as_str()).collect();
            for gone in self
                .known(partition)
                .into_iter()
                .filter(|key| !present.contains(key.as_str()))
            {
                self.apply(partition, &gone, None)?;
            }
            for record in &records {
                self.apply(partition, &record.key, Some(&record.value))?;
            }
            cursor.0.insert(partition, position);
        }
        self.applied.send_replace(cursor.clone());
        store.watch(cursor).await
    }

    /// The keys of the records of a partition that the directory holds.
    fn known(&self, partition: Partition) -> Vec<String> {
        match partition {
            Partition::Keys => self.keys.iter().map(|k| record::key(k.id)).collect(),
            Partition::Accounts => self
                .accounts
                .iter()
                .map(|a| record::account(&a.id))
                .collect(),
            Partition::Functions(_) => self
                .parts()
                .iter()
                .filter(|(function, _)| Partition::of(**function) == partition)
                .flat_map(|(function, parts)| {
                    let versions = parts
                        .versions
                        .keys()
                        .map(|v| record::version(*function, *v));
                    let deployments = parts
                        .deployments
                        .keys()
                        .map(|v| record::deployment(*function, *v));
                    let sharing = parts.sharing.keys().map(|v| record::sharing(*function, *v));
                    versions
                        .chain(deployments)
                        .chain(sharing)
                        .collect::<Vec<_>>()
                })
                .collect(),
        }
    }

    fn apply(
        &self,
        partition: Partition,
        key: &str,
        value: Option<&[u8]>,
    ) -> Result<(), StoreError> {
        match partition {
            // What only a start asks for.
            Partition::Keys if !key.starts_with("key/") => {}
            Partition::Keys => match value {
                Some(value) => {
                    let decoded: Key = decode(key, value)?;
                    self.keys.insert(decoded.hash.clone(), Arc::new(decoded));
                }
                None => self.keys.retain(|_, k| record::key(k.id) != key),
            },
            Partition::Accounts => match value {
                Some(value) => {
                    let decoded: Account = decode(key, value)?;
                    if decoded.deleted_at.is_some() {
                        self.accounts.remove(&decoded.id);
                    } else {
                        self.accounts.insert(decoded.id.clone(), Arc::new(decoded));
                    }
                }
                None => self.accounts.retain(|id, _| record::account(id) != key),
            },
            Partition::Functions(_) => {
                let damaged = || StoreError::Damaged(format!("a record named '{key}'"));
                let mut names = key.splitn(3, '/');
                let (Some(function), Some(kind), Some(name)) =
                    (names.next(), names.next(), names.next())
                else {
                    return Err(damaged());
                };
                let function: FunctionId = function.parse().map_err(|_| damaged())?;
                let mut all = self.parts();
                let parts = all.entry(function).or_default();
                match kind {
                    "version" => {
                        let id = name.parse().map_err(|_| damaged())?;
                        match value {
                            Some(value) => parts.versions.insert(id, Arc::new(decode(key, value)?)),
                            None => parts.versions.remove(&id),
                        };
                    }
                    "deployment" => {
                        let id = name.parse().map_err(|_| damaged())?;
                        match value {
                            Some(value) => {
                                parts.deployments.insert(id, Arc::new(decode(key, value)?))
                            }
                            None => parts.deployments.remove(&id),
                        };
                    }
                    "sharing" => {
                        let id = match name {
                            "all" => None,
                            id => Some(id.parse().map_err(|_| damaged())?),
                        };
                        match value {
                            Some(value) => parts.sharing.insert(id, decode(key, value)?),
                            None => parts.sharing.remove(&id),
                        };
                    }
                    _ => return Err(damaged()),
                }
                self.publish(function, &mut all);
            }
        }
        Ok(())
    }

    /// Replaces the function's view by one of what its parts say now.
    fn publish(&self, function: FunctionId, all: &mut HashMap<FunctionId, Parts>) {
        let Some(parts) = all.get_mut(&function) else {
            return;
        };
        let empty =
            parts.deployments.is_empty() && parts.sharing.is_empty() && parts.instances.is_empty();
        if parts.versions.is_empty() {
            if empty {
                all.remove(&function);
            }
            self.views.remove(&function);
            self.announce(function);
            return;
        }
        let deployed: HashSet<_> = parts.deployments.values().map(|d| d.id).collect();
        parts
            .pasts
            .retain(|deployment, _| deployed.contains(deployment));
        let mut versions: Vec<VersionView> = parts
            .versions
            .values()
            .map(|version| {
                let deployment = parts.deployments.get(&version.id).cloned();
                let instances: Vec<Instance> = parts
                    .instances
                    .iter()
                    .filter(|i| i.function_version_id == version.id)
                    .cloned()
                    .collect();
                let past = deployment.as_ref().and_then(|d| parts.pasts.get(&d.id));
                let past = past.copied().unwrap_or_default();
                let state = state_of(&version.launch, deployment.as_deref(), &instances, past);
                let shared_with = [Some(version.id), None]
                    .iter()
                    .filter_map(|level| parts.sharing.get(level))
                    .flat_map(|sharing| sharing.accounts.iter().cloned())
                    .collect();
                VersionView {
                    version: version.clone(),
                    deployment,
                    instances,
                    state,
                    shared_with,
                }
            })
            .collect();
        versions.sort_by_key(|v| (v.version.created_at, v.version.id));
        for view in &versions {
            if let (FunctionState::Active, Some(deployment)) = (view.state, &view.deployment) {
                parts.pasts.insert(deployment.id, Past::Reached);
            }
        }
        let account = versions[0].version.account.clone();
        self.views.insert(
            function,
            Arc::new(FunctionView {
                id: function,
                account,
                versions,
            }),
        );
        self.announce(function);
    }

    fn announce(&self, function: FunctionId) {
        if let Some(observer) = self.observer.get() {
            observer(self, function);
        }
        // Nobody has to listen.
        _ = self.changes.send(function);
    }

    /// Calls `observer` for each function whose view is replaced or removed from now on, one after another and before
    /// [`Directory::applied`] answers: so whoever is told that a change is made finds it made there too. There is one
    /// observer; further ones are not called.
    pub fn observe(&self, observer: impl Fn(&Self, FunctionId) + Send + Sync + 'static) {
        _ = self.observer.set(Box::new(observer));
    }

    /// Applies what is so of the instances, for ever; ends only when it can't be heard any more.
    pub async fn follow_instances(
        &self,
        mut watch: Box<dyn coordination::Watch>,
    ) -> Result<Infallible, CoordinationError> {
        loop {
            match watch.next().await? {
                coordination::Event::All(all) => {
                    let there: HashSet<InstanceId> = all.iter().map(|i| i.id).collect();
                    let gone: Vec<InstanceId> = self
                        .parts()
                        .values()
                        .flat_map(|parts| &parts.instances)
                        .map(|i| i.id)
                        .filter(|id| !there.contains(id))
                        .collect();
                    gone.into_iter().for_each(|id| self.remove_instance(id));
                    all.into_iter().for_each(|i| self.put_instance(i));
                }
                coordination::Event::Changed(instance) => self.put_instance(instance),
                coordination::Event::Gone(instance) => self.remove_instance(instance),
            }
        }
    }

    /// The instance is as given.
    pub fn put_instance(&self, instance: Instance) {
        let function = instance.function_id;
        let mut all = self.parts();
        let parts = all.entry(function).or_default();
        match parts.instances.iter_mut().find(|i| i.id == instance.id) {
            Some(known) => {
                let fails = matches!(
                    instance.state,
                    InstanceState::Starting | InstanceState::Error
                );
                let deployment = known.deployment_id;
                let before = std::mem::replace(known, instance).state;
                if before == InstanceState::Ready && fails {
                    parts.lost(deployment);
                }
            }
            None => parts.instances.push(instance),
        }
        self.publish(function, &mut all);
    }

    fn remove_instance(&self, id: InstanceId) {
        let mut all = self.parts();
        let function = all
            .iter()
            .find_map(|(f, parts)| parts.instances.iter().any(|i| i.id == id).then_some(*f));
        if let Some(function) = function {
            if let Some(parts) = all.get_mut(&function)
                && let Some(at) = parts.instances.iter().position(|i| i.id == id)
            {
                let gone = parts.instances.remove(at);
                if gone.state == InstanceState::Ready {
                    parts.lost(gone.deployment_id);
                }
            }
            self.publish(function, &mut all);
        }
    }

    fn parts(&self) -> MutexGuard<'_, HashMap<FunctionId, Parts>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === Readers ===

    #[must_use]
    pub fn view(&self, function: FunctionId) -> Option<Arc<FunctionView>> {
        self.views.get(&function).map(|view| view.value().clone())
    }

    #[must_use]
    pub fn views(&self) -> Vec<Arc<FunctionView>> {
        self.views.iter().map(|view| view.value().clone()).collect()
    }

    /// The key whose secret has this SHA-256 (hexadecimal).
    #[must_use]
    pub fn key_by_hash(&self, hash: &str) -> Option<Arc<Key>> {
        self.keys.get(hash).map(|key| key.value().clone())
    }

    #[must_use]
    pub fn key(&self, id: KeyId) -> Option<Arc<Key>> {
        self.keys
            .iter()
            .find(|key| key.id == id)
            .map(|key| key.value().clone())
    }

    #[must_use]
    pub fn keys(&self) -> Vec<Arc<Key>> {
        self.keys.iter().map(|key| key.value().clone()).collect()
    }

    #[must_use]
    pub fn account(&self, id: &AccountId) -> Option<Arc<Account>> {
        self.accounts.get(id).map(|account| account.value().clone())
    }

    #[must_use]
    pub fn accounts(&self) -> Vec<Arc<Account>> {
        self.accounts
            .iter()
            .map(|account| account.value().clone())
            .collect()
    }

    /// Functions whose view was replaced or removed. One that lags must look at all of them.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<FunctionId> {
        self.changes.subscribe()
    }

    /// Waits until the commit with this revision is in the views, so that its author reads his own write.
    pub async fn applied(&self, partition: Partition, revision: u64) {
        let mut applied = self.applied.subscribe();
        // The sender lives as long as `self`.
        _ = applied
            .wait_for(|cursor| {
                cursor
                    .0
                    .get(&partition)
                    .is_some_and(|at| at.revision >= revision)
            })
            .await;
    }
}
