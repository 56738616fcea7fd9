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
    watchers: Vec<UnboundedSender<Event>>,
    listeners: Vec<UnboundedSender<Signal>>,
    leader: Option<MemberId>,
    term: u64,
    candidates: VecDeque<(MemberId, oneshot::Sender<Term>)>,
}

struct Published {
    owner: MemberId,
    instance: Instance,
    slots: HashMap<MemberId, u32>,
}

impl Published {
    fn held(&self) -> u32 {
        self.slots.values().sum()
    }
}

impl Facts {
    fn tell(&mut self, event: &Event) {
        self.watchers
            .retain(|watcher| watcher.send(event.clone()).is_ok());
    }

    fn withdraw(&mut self, owner: MemberId, id: InstanceId) {
        if self.instances.get(&id).is_none_or(|p| p.owner == owner) {
            self.instances.remove(&id);
            self.tell(&Event::Gone(id));
        }
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
            self.withdraw(member, instance);
        }
        for published in self.instances.values_mut() {
            published.slots.remove(&member);
        }
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
                    slots: HashMap::new(),
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
        let elected = {
            let mut facts = self.all.facts();
            if facts.leader == Some(self.id) {
                return Ok(Term(facts.term));
            }
            let (sender, elected) = oneshot::channel();
            facts.candidates.push_back((self.id, sender));
            facts.elect();
            elected
        };
        // The sender goes with the member, which is borrowed here.
        elected.await.map_err(|_| CoordinationError::Expired)
    }

    async fn claim(&self, instance: InstanceId, wanted: u32) -> Result<u32, CoordinationError> {
        let mut facts = self.all.facts();
        let Some(published) = facts
            .instances
            .get_mut(&instance)
            .filter(|p| p.instance.state == InstanceState::Ready)
        else {
            return Ok(0);
        };
        let free = published.instance.capacity.saturating_sub(published.held());
        let granted = wanted.min(free);
        if granted > 0 {
            *published.slots.entry(self.id).or_default() += granted;
        }
        Ok(granted)
    }

    async fn release(&self, instance: InstanceId, slots: u32) -> Result<(), CoordinationError> {
        let mut facts = self.all.facts();
        if let Some(published) = facts.instances.get_mut(&instance)
            && let Some(held) = published.slots.get_mut(&self.id)
        {
            *held = held.saturating_sub(slots);
            if *held == 0 {
                published.slots.remove(&self.id);
            }
        }
        Ok(())
    }

    async fn held(&self, instance: InstanceId) -> Result<u32, CoordinationError> {
        Ok(self
            .all
            .facts()
            .instances
            .get(&instance)
            .map_or(0, Published::held))
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
