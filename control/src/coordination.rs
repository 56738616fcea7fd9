//! Facts: what is so now, told by those who know it and gone with them.
//!
//! A process that takes part is a [`Member`]. What it publishes lives as long
//! as its lease, which the implementation renews: a member that dies takes its
//! instances, its load, its slots and its leadership with it. Nothing here is
//! durable and nothing waits for a disk; after a restart everything is
//! published anew.
//!
//! One that is only slow looks dead too, and goes on. So what it does after its
//! lease has no effect, it is told ([`Member::expired`]), and what others hold of
//! its instances stays counted: their requests are still there.
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
    /// the last one never is. The future may be dropped without losing an event. An outage is no error: it is waited
    /// out, and [`Event::All`] follows. After an error the watch is over.
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
    /// as gone too, for whoever asked for it; a watcher with a gap there does not hear that, since it leaves nothing
    /// behind that [`Event::All`] could show.
    fn withdraw(&self, instance: InstanceId);

    /// Tells all listeners at once. Never waits.
    fn signal(&self, signal: Signal);

    /// Waits until this member leads, which one at a time does, and answers at once where it leads already.
    /// Dropping the future withdraws the candidacy, won or not. A leadership lasts until the member is dropped or
    /// [expired](Member::expired); an outage is waited out.
    async fn lead(&self) -> Result<Term, CoordinationError>;

    /// Takes up to `wanted` slots of an instance and answers how many it got. All members together never hold
    /// more than the instance's capacity; a lowered capacity takes nothing back, but gives nothing out until
    /// enough came back. An instance that is not published, or not ready, gives none. A future that is dropped, or
    /// an error, takes none: what was taken all the same is given back as soon as that can be told.
    async fn claim(&self, instance: InstanceId, wanted: u32) -> Result<u32, CoordinationError>;

    /// Gives slots back; more than it holds gives back what it holds. After an error, or dropped, they are given
    /// back all the same, as soon as that can be told: repeated, it would give back others.
    async fn release(&self, instance: InstanceId, slots: u32) -> Result<(), CoordinationError>;

    /// How many slots of an instance all members hold; an instance without any is drained. They stay counted while
    /// its publisher is gone without having withdrawn it, and bind whoever publishes it next.
    async fn held(&self, instance: InstanceId) -> Result<u32, CoordinationError>;

    /// Waits until the others take this member for dead, which may be long after they began to. From then on every
    /// call answers [`CoordinationError::Expired`] or does nothing: whoever led must stop, whoever published must
    /// join anew and publish again.
    async fn expired(&self);
}

/// Tells the others what this process's agent reports and its request path signals, and its agent what is suspected
/// anywhere. Ends when one of them does, or the member expired.
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
            () = member.expired() => return,
            signal = all.recv() => match signal {
                Some(Signal::Suspect(instance)) => agent.suspect(instance),
                Some(Signal::Demand(..)) => {}
                None => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::agent::AgentConfig;

    /// Taken for dead once that is said.
    struct Mortal(watch::Receiver<bool>);

    #[async_trait]
    impl Member for Mortal {
        fn publish(&self, _: Instance) {}
        fn withdraw(&self, _: InstanceId) {}
        fn signal(&self, _: Signal) {}
        async fn lead(&self) -> Result<Term, CoordinationError> {
            Err(CoordinationError::Expired)
        }
        async fn claim(&self, _: InstanceId, _: u32) -> Result<u32, CoordinationError> {
            Err(CoordinationError::Expired)
        }
        async fn release(&self, _: InstanceId, _: u32) -> Result<(), CoordinationError> {
            Err(CoordinationError::Expired)
        }
        async fn held(&self, _: InstanceId) -> Result<u32, CoordinationError> {
            Err(CoordinationError::Expired)
        }
        async fn expired(&self) {
            _ = self.0.clone().wait_for(|expired| *expired).await;
        }
    }

    /// A process that only publishes never gets an answer that would tell it.
    #[tokio::test]
    async fn taking_part_ends_where_the_member_expired() {
        let directory = tempfile::tempdir().unwrap();
        let (report, reports) = mpsc::unbounded_channel();
        let config = AgentConfig {
            node: "n1".into(),
            data_dir: directory.path().into(),
            ports: 20_000..=20_000,
            user: None,
            gpus: vec![],
            forbidden: vec![],
            trust: crate::dial::Trust::default(),
            kill_after: Duration::from_millis(500),
            open_files: None,
        };
        let agent = Agent::start(config, report).unwrap();
        let (expire, expired) = watch::channel(false);
        let (_own, own) = mpsc::unbounded_channel();
        let (_all, all) = mpsc::unbounded_channel();
        let mut taking_part = Box::pin(take_part(
            Arc::new(Mortal(expired)),
            agent,
            reports,
            own,
            all,
        ));
        assert!(futures_util::poll!(&mut taking_part).is_pending());
        expire.send_replace(true);
        tokio::time::timeout(Duration::from_secs(30), taking_part)
            .await
            .unwrap();
    }
}
