//! Facts: what is so now, told by those who know it and gone with them.
//!
//! A process that takes part is a [`Member`]. What it publishes lives as long
//! as its lease, which the implementation renews: a member that dies takes its
//! instances, its load, its slots and its leadership with it. Nothing here is
//! durable and nothing waits for a disk; after a restart everything is
//! published anew.
//!
//! The promises are written so that Redis Cluster can hold them too: an
//! instance and its slots can share a hash tag, nothing is atomic over two
//! instances, and a watcher that missed something is given everything again.

pub mod contract;
pub mod local;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::{
    agent::{Agent, Report},
    model::{FunctionId, Instance, InstanceId, VersionId},
    scale::Sample,
};

/// What a request path tells all the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// An invocation had to wait, or found no instance.
    Demand(FunctionId, VersionId),
    /// An instance did not take a connection.
    Suspect(InstanceId),
}

impl Signal {
    /// The function that is in demand.
    #[must_use]
    pub fn demand(self) -> Option<FunctionId> {
        match self {
            Self::Demand(function, _) => Some(function),
            Self::Suspect(_) => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CoordinationError {
    /// Whether the call had an effect may be unknown; what it would have given is not the caller's.
    #[error("the other processes can't be reached: {0}")]
    Unavailable(String),
    /// The member's lease ended: what it published and held is no longer its own. Join anew.
    #[error("this process was taken for dead by the others and must join anew")]
    Expired,
}

/// A member's load, asked for when a decision needs it.
pub trait Load: Send + Sync + 'static {
    /// The load of a deployed version on this member, now; `None` where the version is not deployed.
    fn sample(&self, version: VersionId) -> Option<Sample>;
    /// The versions that have a load, for those who can only send it ahead.
    fn versions(&self) -> Vec<VersionId>;
}

/// For a member that takes no invocations.
impl Load for () {
    fn sample(&self, _: VersionId) -> Option<Sample> {
        None
    }
    fn versions(&self) -> Vec<VersionId> {
        Vec::new()
    }
}

/// What a watcher of the instances hears.
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every event is the large one"
)]
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Every instance there is, in the order of their IDs; one that is not among them is gone.
    /// The first event of a watch, and the next one after a gap.
    All(Vec<Instance>),
    Changed(Instance),
    Gone(InstanceId),
}

/// A running watch. Dropping it ends it.
#[async_trait]
pub trait Watch: Send {
    /// The next event: for each instance in the order of its publications. States in between may be left out,
    /// the last one never is. The future may be dropped without losing an event.
    async fn next(&mut self) -> Result<Event, CoordinationError>;
}

/// A leadership: greater than every one before it, so that a write which carries it can be refused once
/// another member leads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Term(pub u64);

/// What all processes know of each other.
#[async_trait]
pub trait Coordination: Send + Sync + 'static {
    /// Takes part under a name (for people; it need not be unique). Dropping the member ends it.
    async fn join(
        &self,
        name: &str,
        load: Arc<dyn Load>,
    ) -> Result<Box<dyn Member>, CoordinationError>;

    async fn watch(&self) -> Result<Box<dyn Watch>, CoordinationError>;

    /// The signals of all members from now on, each once, those of one member in order. Best effort: a signal
    /// only hurries what the next look at the load would find.
    fn signals(&self) -> UnboundedReceiver<Signal>;

    /// The load of a version over all members, as far as it is known here. Never waits.
    fn load(&self, version: VersionId) -> Option<Sample>;
}

/// One process among those that take part.
#[async_trait]
pub trait Member: Send + Sync + 'static {
    /// Says how an instance is. Never waits: what can't be told now is told when it can be. An instance belongs
    /// to the member that published it last.
    fn publish(&self, instance: Instance);

    /// Says that an instance of this member is gone, and its slots with it. One that nobody published is announced
    /// as gone too, for whoever asked for it.
    fn withdraw(&self, instance: InstanceId);

    /// Tells all listeners at once. Never waits.
    fn signal(&self, signal: Signal);

    /// Waits until this member leads, which one at a time does, and answers at once where it leads already.
    /// Dropping the future withdraws the candidacy.
    async fn lead(&self) -> Result<Term, CoordinationError>;

    /// Takes up to `wanted` slots of an instance and answers how many it got. All members together never hold
    /// more than the instance's capacity; a lowered capacity takes nothing back, but gives nothing out until
    /// enough came back. An instance that is not published, or not ready, gives none.
    async fn claim(&self, instance: InstanceId, wanted: u32) -> Result<u32, CoordinationError>;

    /// Gives slots back; more than it holds gives back what it holds.
    async fn release(&self, instance: InstanceId, slots: u32) -> Result<(), CoordinationError>;

    /// How many slots of an instance all members hold; an instance without any is drained.
    async fn held(&self, instance: InstanceId) -> Result<u32, CoordinationError>;
}

/// Tells the others what this process's agent reports and its request path signals, and its agent what is suspected
/// anywhere. Ends when one of them does.
pub async fn take_part(
    member: Arc<dyn Member>,
    agent: Agent,
    mut reports: UnboundedReceiver<Report>,
    mut own: UnboundedReceiver<Signal>,
    mut all: UnboundedReceiver<Signal>,
) {
    loop {
        tokio::select! {
            report = reports.recv() => match report {
                Some(Report::Changed(instance)) => member.publish(instance),
                Some(Report::Gone(instance)) => member.withdraw(instance),
                None => return,
            },
            signal = own.recv() => match signal {
                Some(signal) => member.signal(signal),
                None => return,
            },
            signal = all.recv() => match signal {
                Some(Signal::Suspect(instance)) => agent.suspect(instance),
                Some(Signal::Demand(..)) => {}
                None => return,
            },
        }
    }
}
