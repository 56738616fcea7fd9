//! Facts within one process: a table under a mutex, held for one change.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use tokio::sync::{
    mpsc::{self, UnboundedReceiver, UnboundedSender},
    oneshot,
};

use super::{Coordination, CoordinationError, Event, Load, Member, Signal, Term, Watch};
use crate::{
    model::{Instance, InstanceId, InstanceState, VersionId},
    scale::Sample,
};

/// See the module's head. Clones share everything.
#[derive(Clone, Default)]
pub struct Local(Arc<Mutex<Facts>>);

type MemberId = u64;

#[derive(Default)]
struct Facts {
    next_member: MemberId,
    members: BTreeMap<MemberId, Arc<dyn Load>>,
    instances: BTreeMap<InstanceId, Published>,
    /// Who holds how many; without an entry, nobody any.
    slots: BTreeMap<InstanceId, HashMap<MemberId, u32>>,
    watchers: Vec<UnboundedSender<Event>>,
    listeners: Vec<UnboundedSender<Signal>>,
    leader: Option<MemberId>,
    /// The leader's, or the last one's.
    term: u64,
    /// The leader knows of it.
    taken: bool,
    candidates: VecDeque<(MemberId, oneshot::Sender<Term>)>,
}

struct Published {
    owner: MemberId,
    instance: Instance,
}

impl Facts {
    fn tell(&mut self, event: &Event) {
        self.watchers
            .retain(|watcher| watcher.send(event.clone()).is_ok());
    }

    fn withdraw(&mut self, owner: MemberId, id: InstanceId) {
        if self.instances.get(&id).is_none_or(|p| p.owner == owner) {
            self.instances.remove(&id);
            self.slots.remove(&id);
            self.tell(&Event::Gone(id));
        }
    }

    fn held(&self, id: InstanceId) -> u32 {
        let holders = self.slots.get(&id);
        holders.map_or(0, |holders| holders.values().sum())
    }

    /// Whoever waits longest leads next.
    fn elect(&mut self) {
        while self.leader.is_none()
            && let Some((candidate, elected)) = self.candidates.pop_front()
        {
            let term = Term(self.term + 1);
            // One that stopped waiting is passed over.
            if elected.send(term).is_ok() {
                self.term = term.0;
                self.leader = Some(candidate);
                self.taken = false;
            }
        }
    }

    fn leave(&mut self, member: MemberId) {
        self.members.remove(&member);
        let own: Vec<InstanceId> = self
            .instances
            .iter()
            .filter(|(_, p)| p.owner == member)
            .map(|(id, _)| *id)
            .collect();
        for instance in own {
            // Not withdrawn: others may hold slots of it.
            self.instances.remove(&instance);
            self.tell(&Event::Gone(instance));
        }
        self.slots.retain(|_, holders| {
            holders.remove(&member);
            !holders.is_empty()
        });
        self.candidates.retain(|(id, _)| *id != member);
        if self.leader == Some(member) {
            self.leader = None;
            self.elect();
        }
    }
}

impl Local {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Coordination for Local {
    async fn join(
        &self,
        name: &str,
        load: Arc<dyn Load>,
    ) -> Result<Box<dyn Member>, CoordinationError> {
        let mut facts = self.facts();
        facts.next_member += 1;
        let id = facts.next_member;
        facts.members.insert(id, load);
        tracing::debug!(name, id, "a member joined");
        Ok(Box::new(LocalMember {
            id,
            all: self.clone(),
        }))
    }

    async fn watch(&self) -> Result<Box<dyn Watch>, CoordinationError> {
        let mut facts = self.facts();
        let (sender, events) = mpsc::unbounded_channel();
        let all = facts
            .instances
            .values()
            .map(|p| p.instance.clone())
            .collect();
        // The receiver is held right here.
        _ = sender.send(Event::All(all));
        facts.watchers.push(sender);
        Ok(Box::new(LocalWatch(events)))
    }

    fn signals(&self) -> UnboundedReceiver<Signal> {
        let (sender, signals) = mpsc::unbounded_channel();
        self.facts().listeners.push(sender);
        signals
    }

    fn load(&self, version: VersionId) -> Option<Sample> {
        // Asked outside the lock: a load looks into a queue, which has a lock of its own.
        let members: Vec<Arc<dyn Load>> = self.facts().members.values().cloned().collect();
        members
            .iter()
            .filter_map(|load| load.sample(version))
            .reduce(Sample::plus)
    }
}

struct LocalWatch(UnboundedReceiver<Event>);

#[async_trait]
impl Watch for LocalWatch {
    async fn next(&mut self) -> Result<Event, CoordinationError> {
        let gone = || CoordinationError::Unavailable("this process is stopping".into());
        self.0.recv().await.ok_or_else(gone)
    }
}

struct LocalMember {
    id: MemberId,
    all: Local,
}

#[async_trait]
impl Member for LocalMember {
    fn publish(&self, instance: Instance) {
        let mut facts = self.all.facts();
        let event = Event::Changed(instance.clone());
        match facts.instances.get_mut(&instance.id) {
            Some(published) => {
                published.owner = self.id;
                published.instance = instance;
            }
            None => {
                let published = Published {
                    owner: self.id,
                    instance,
                };
                facts.instances.insert(published.instance.id, published);
            }
        }
        facts.tell(&event);
    }

    fn withdraw(&self, instance: InstanceId) {
        self.all.facts().withdraw(self.id, instance);
    }

    fn signal(&self, signal: Signal) {
        self.all
            .facts()
            .listeners
            .retain(|listener| listener.send(signal).is_ok());
    }

    async fn lead(&self) -> Result<Term, CoordinationError> {
        let mut candidacy = {
            let mut facts = self.all.facts();
            if facts.leader == Some(self.id) {
                facts.taken = true;
                return Ok(Term(facts.term));
            }
            let (sender, elected) = oneshot::channel();
            facts.candidates.push_back((self.id, sender));
            facts.elect();
            Candidacy {
                all: &self.all,
                elected,
            }
        };
        // The sender goes with the member, which is borrowed here.
        let gone = |_| CoordinationError::Expired;
        let term = (&mut candidacy.elected).await.map_err(gone)?;
        self.all.facts().taken = true;
        Ok(term)
    }

    async fn claim(&self, instance: InstanceId, wanted: u32) -> Result<u32, CoordinationError> {
        let mut facts = self.all.facts();
        let Some(published) = facts
            .instances
            .get(&instance)
            .filter(|p| p.instance.state == InstanceState::Ready)
        else {
            return Ok(0);
        };
        let capacity = published.instance.capacity;
        let granted = wanted.min(capacity.saturating_sub(facts.held(instance)));
        if granted > 0 {
            let holders = facts.slots.entry(instance).or_default();
            *holders.entry(self.id).or_default() += granted;
        }
        Ok(granted)
    }

    async fn release(&self, instance: InstanceId, slots: u32) -> Result<(), CoordinationError> {
        let mut facts = self.all.facts();
        if let Some(holders) = facts.slots.get_mut(&instance)
            && let Some(held) = holders.get_mut(&self.id)
        {
            *held = held.saturating_sub(slots);
            if *held == 0 {
                holders.remove(&self.id);
            }
            if holders.is_empty() {
                facts.slots.remove(&instance);
            }
        }
        Ok(())
    }

    async fn held(&self, instance: InstanceId) -> Result<u32, CoordinationError> {
        Ok(self.all.facts().held(instance))
    }

    /// Never: within one process nobody takes anybody for dead.
    async fn expired(&self) {
        std::future::pending().await
    }
}

/// A wait for leadership. Dropped before it is over, it gives up what it may have won meanwhile.
struct Candidacy<'a> {
    all: &'a Local,
    elected: oneshot::Receiver<Term>,
}

impl Drop for Candidacy<'_> {
    fn drop(&mut self) {
        let mut facts = self.all.facts();
        if let Ok(term) = self.elected.try_recv()
            && facts.term == term.0
            && !facts.taken
        {
            facts.leader = None;
            facts.elect();
        }
    }
}

impl Drop for LocalMember {
    fn drop(&mut self) {
        self.all.facts().leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::contract::suite, Arc, Coordination, Local};

    async fn fresh() -> (Arc<dyn Coordination>, ()) {
        (Arc::new(Local::default()), ())
    }

    suite!(fresh);
}
