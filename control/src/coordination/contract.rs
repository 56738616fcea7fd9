//! The promises of [`Coordination`], as a test suite that every implementation runs.
//!
//! Each promise is a function over fresh coordination without members. A
//! promise about the future is waited for, never slept for: an implementation
//! with leases may take as long as its lease.
#![cfg(test)]

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::timeout;

use super::{Coordination, Event, Load, Member, Signal, Term, Watch};
use crate::{
    model::{
        DeploymentId, FunctionId, GpuSpecificationId, Instance, InstanceId, InstanceState,
        VersionId,
    },
    scale::Sample,
};

/// Makes a test of every promise. `$fresh` is an `async fn() -> (Arc<dyn Coordination>, guard)`.
macro_rules! suite {
    ($fresh:path) => {
        $crate::coordination::contract::suite!(@each $fresh,
            tells_what_is_there_first, tells_every_change_in_order, keeps_an_instance_with_its_last_publisher,
            forgets_what_a_member_published, announces_what_will_not_come, sums_the_load, forgets_the_load_of_who_left,
            hands_signals_to_every_listener, has_one_leader_and_rising_terms, passes_over_who_stopped_waiting,
            never_grants_more_than_the_capacity, grants_nothing_of_what_is_not_ready,
            binds_new_grants_to_a_lowered_capacity, takes_back_no_more_than_was_held,
            frees_the_slots_of_who_left, forgets_slots_with_their_instance, keeps_the_slots_of_an_instance_without_publisher,
            takes_nothing_by_a_dropped_claim, gives_up_a_leadership_that_nobody_took,
        );
    };
    (@each $fresh:path, $($name:ident),* $(,)?) => {
        $(
            #[tokio::test]
            async fn $name() {
                let (coordination, _guard) = $fresh().await;
                $crate::coordination::contract::$name(coordination).await;
            }
        )*
    };
}
pub(crate) use suite;

type Shared = Arc<dyn Coordination>;

fn instance(state: InstanceState, capacity: u32) -> Instance {
    Instance {
        id: InstanceId::random(),
        function_id: FunctionId::random(),
        function_version_id: VersionId::random(),
        deployment_id: DeploymentId::random(),
        gpu_specification_id: GpuSpecificationId::random(),
        node: "here".into(),
        state,
        address: Some("127.0.0.1:20000".parse().unwrap()),
        server_name: None,
        capacity,
        pid: Some(7),
        created_at: Timestamp::UNIX_EPOCH,
        spawned_at: None,
        first_healthy_at: None,
        restarts: 0,
        error: None,
        failure: None,
        last_log_line: None,
        gpus: vec![0, 3],
    }
}

async fn join(coordination: &Shared, name: &str) -> Box<dyn Member> {
    coordination.join(name, Arc::new(())).await.unwrap()
}

/// Far beyond any lease; reached only by what never comes.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), future)
        .await
        .unwrap_or_else(|_| panic!("{what} never came"))
}

async fn next(watch: &mut Box<dyn Watch>) -> Event {
    soon("an event", watch.next()).await.unwrap()
}

/// Until a look shows what it should.
async fn until<F: Future<Output = bool>>(what: &str, mut look: impl FnMut() -> F) {
    soon(what, async {
        while !look().await {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A publication is under way when `publish` returns; it has arrived when it gives slots.
async fn ready(member: &dyn Member, instance: &Instance) {
    member.publish(instance.clone());
    until("a published instance", async || {
        let got = member.claim(instance.id, 1).await.unwrap();
        member.release(instance.id, got).await.unwrap();
        got == 1
    })
    .await;
}

pub(crate) async fn tells_what_is_there_first(coordination: Shared) {
    let mut empty = coordination.watch().await.unwrap();
    assert_eq!(next(&mut empty).await, Event::All(vec![]));

    let member = join(&coordination, "agent").await;
    let known = instance(InstanceState::Ready, 2);
    ready(&*member, &known).await;
    let mut watch = coordination.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, Event::All(vec![known]));
}

pub(crate) async fn tells_every_change_in_order(coordination: Shared) {
    let member = join(&coordination, "agent").await;
    let mut watch = coordination.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, Event::All(vec![]));
    let mut changing = instance(InstanceState::Starting, 2);
    for restarts in 0..100 {
        changing.restarts = restarts;
        member.publish(changing.clone());
    }
    member.withdraw(changing.id);
    let mut seen = None;
    loop {
        match next(&mut watch).await {
            Event::Changed(now) => {
                assert!(seen.is_none_or(|before| before < now.restarts));
                seen = Some(now.restarts);
            }
            Event::Gone(id) => {
                assert_eq!(id, changing.id);
                break;
            }
            // After a gap: the last word, unless it came before the first.
            Event::All(all) => match all.first() {
                Some(now) => {
                    assert!(seen.is_none_or(|before| before <= now.restarts));
                    seen = Some(now.restarts);
                }
                None if seen.is_some() => break,
                None => {}
            },
        }
    }
}

pub(crate) async fn keeps_an_instance_with_its_last_publisher(coordination: Shared) {
    let (first, second) = (
        join(&coordination, "first").await,
        join(&coordination, "second").await,
    );
    let mut moved = instance(InstanceState::Ready, 1);
    ready(&*first, &moved).await;
    moved.node = "elsewhere".into();
    let mut watch = coordination.watch().await.unwrap();
    next(&mut watch).await;
    second.publish(moved.clone());
    assert_eq!(next(&mut watch).await, Event::Changed(moved.clone()));

    first.withdraw(moved.id);
    drop(first);
    second.withdraw(moved.id);
    assert_eq!(next(&mut watch).await, Event::Gone(moved.id));
}

pub(crate) async fn forgets_what_a_member_published(coordination: Shared) {
    let (staying, leaving) = (
        join(&coordination, "staying").await,
        join(&coordination, "leaving").await,
    );
    let (kept, lost) = (
        instance(InstanceState::Ready, 1),
        instance(InstanceState::Ready, 1),
    );
    ready(&*staying, &kept).await;
    ready(&*leaving, &lost).await;
    let mut watch = coordination.watch().await.unwrap();
    next(&mut watch).await;
    drop(leaving);
    assert_eq!(next(&mut watch).await, Event::Gone(lost.id));
    let mut after = coordination.watch().await.unwrap();
    assert_eq!(next(&mut after).await, Event::All(vec![kept]));
}

struct Constant(VersionId, Sample);

impl Load for Constant {
    fn sample(&self, version: VersionId) -> Option<Sample> {
        (version == self.0).then_some(self.1)
    }
    fn versions(&self) -> Vec<VersionId> {
        vec![self.0]
    }
}

fn sample(arrivals: u64) -> Sample {
    Sample {
        at: Duration::from_secs(arrivals),
        area: 0.5,
        arrivals,
        in_system: 3,
        queued: 1,
    }
}

pub(crate) async fn sums_the_load(coordination: Shared) {
    let version = VersionId::random();
    assert_eq!(coordination.load(version), None);
    let load = |arrivals| Arc::new(Constant(version, sample(arrivals)));
    let _one = coordination.join("one", load(4)).await.unwrap();
    let _two = coordination.join("two", load(5)).await.unwrap();
    let _idle = join(&coordination, "idle").await;
    until("the load of both", async || {
        coordination.load(version).is_some_and(|sum| {
            (sum.arrivals, sum.in_system, sum.queued) == (9, 6, 2) && sum.area == 1.0
        })
    })
    .await;
    assert_eq!(coordination.load(VersionId::random()), None);
}

pub(crate) async fn announces_what_will_not_come(coordination: Shared) {
    let member = join(&coordination, "agent").await;
    let mut watch = coordination.watch().await.unwrap();
    let first = soon("the first event", watch.next()).await.unwrap();
    assert_eq!(first, Event::All(Vec::new()));
    let refused = InstanceId::random();
    member.withdraw(refused);
    let next = soon("the end", watch.next()).await.unwrap();
    assert_eq!(next, Event::Gone(refused));
}

pub(crate) async fn forgets_the_load_of_who_left(coordination: Shared) {
    let version = VersionId::random();
    let load = |arrivals| Arc::new(Constant(version, sample(arrivals)));
    let _one = coordination.join("one", load(4)).await.unwrap();
    let two = coordination.join("two", load(5)).await.unwrap();
    let arrivals = || coordination.load(version).map(|sum| sum.arrivals);
    until("the load of both", async || arrivals() == Some(9)).await;
    drop(two);
    until("the load of who stayed", async || arrivals() == Some(4)).await;
}

pub(crate) async fn hands_signals_to_every_listener(coordination: Shared) {
    let member = join(&coordination, "proxy").await;
    let (mut one, mut two) = (coordination.signals(), coordination.signals());
    drop(coordination.signals());
    let sent: Vec<Signal> = (0..50)
        .map(|_| Signal::Demand(FunctionId::random(), VersionId::random()))
        .chain([Signal::Suspect(InstanceId::random())])
        .collect();
    for signal in &sent {
        member.signal(*signal);
    }
    for listener in [&mut one, &mut two] {
        for signal in &sent {
            assert_eq!(soon("a signal", listener.recv()).await, Some(*signal));
        }
    }
}

pub(crate) async fn has_one_leader_and_rising_terms(coordination: Shared) {
    let first = join(&coordination, "first").await;
    let led = soon("the first leader", first.lead()).await.unwrap();
    assert_eq!(first.lead().await.unwrap(), led, "it leads already");
    let (second, third) = (
        join(&coordination, "second").await,
        join(&coordination, "third").await,
    );
    let (mut two, mut three) = (second.lead(), third.lead());
    assert!(futures_util::poll!(&mut two).is_pending());
    assert!(futures_util::poll!(&mut three).is_pending());
    drop(first);
    // Either may follow; the other one waits on.
    let next: Term = soon("the next leader", async {
        tokio::select! { term = &mut two => term, term = &mut three => term }
    })
    .await
    .unwrap();
    assert!(next > led);
}

pub(crate) async fn passes_over_who_stopped_waiting(coordination: Shared) {
    let (leader, fickle, patient) = (
        join(&coordination, "leader").await,
        join(&coordination, "fickle").await,
        join(&coordination, "patient").await,
    );
    soon("the leader", leader.lead()).await.unwrap();
    let mut candidacy = fickle.lead();
    assert!(futures_util::poll!(&mut candidacy).is_pending());
    drop(candidacy);
    drop(leader);
    soon("the one that waits", patient.lead()).await.unwrap();
}

pub(crate) async fn gives_up_a_leadership_that_nobody_took(coordination: Shared) {
    let (leader, fickle, patient) = (
        join(&coordination, "leader").await,
        join(&coordination, "fickle").await,
        join(&coordination, "patient").await,
    );
    soon("the leader", leader.lead()).await.unwrap();
    let mut candidacy = fickle.lead();
    assert!(futures_util::poll!(&mut candidacy).is_pending());
    drop(leader);
    // It may have been elected by now, or be about to be.
    drop(candidacy);
    let led = soon("the one that waits", patient.lead()).await.unwrap();
    drop(patient);
    assert!(soon("the one that left off", fickle.lead()).await.unwrap() > led);
}

pub(crate) async fn never_grants_more_than_the_capacity(coordination: Shared) {
    let agent = join(&coordination, "agent").await;
    let shared = instance(InstanceState::Ready, 7);
    ready(&*agent, &shared).await;
    let mut proxies = tokio::task::JoinSet::new();
    for name in ["a", "b", "c", "d"] {
        let (coordination, id) = (coordination.clone(), shared.id);
        proxies.spawn(async move {
            let proxy = join(&coordination, name).await;
            let mut got = 0;
            for round in 0..50 {
                let claimed = proxy.claim(id, 1 + round % 3).await.unwrap();
                assert!(claimed <= 1 + round % 3);
                assert!(proxy.held(id).await.unwrap() <= 7);
                tokio::task::yield_now().await;
                proxy.release(id, claimed).await.unwrap();
                got += claimed;
            }
            got
        });
    }
    let granted: u32 = soon("the proxies", proxies.join_all()).await.iter().sum();
    assert!(granted >= 50, "only {granted} grants in 200 claims");
    assert_eq!(agent.held(shared.id).await.unwrap(), 0);
}

pub(crate) async fn grants_nothing_of_what_is_not_ready(coordination: Shared) {
    let agent = join(&coordination, "agent").await;
    assert_eq!(agent.claim(InstanceId::random(), 3).await.unwrap(), 0);
    let mut ending = instance(InstanceState::Ready, 3);
    ready(&*agent, &ending).await;
    for state in [
        InstanceState::Draining,
        InstanceState::Error,
        InstanceState::Starting,
    ] {
        ending.state = state;
        agent.publish(ending.clone());
        until("its end", async || {
            let got = agent.claim(ending.id, 1).await.unwrap();
            agent.release(ending.id, got).await.unwrap();
            got == 0
        })
        .await;
        assert_eq!(agent.claim(ending.id, 3).await.unwrap(), 0);
    }
}

pub(crate) async fn binds_new_grants_to_a_lowered_capacity(coordination: Shared) {
    let agent = join(&coordination, "agent").await;
    let mut shrinking = instance(InstanceState::Ready, 4);
    ready(&*agent, &shrinking).await;
    assert_eq!(agent.claim(shrinking.id, 9).await.unwrap(), 4);
    let mut watch = coordination.watch().await.unwrap();
    next(&mut watch).await;
    shrinking.capacity = 2;
    agent.publish(shrinking.clone());
    assert_eq!(next(&mut watch).await, Event::Changed(shrinking.clone()));

    assert_eq!(agent.held(shrinking.id).await.unwrap(), 4);
    agent.release(shrinking.id, 2).await.unwrap();
    assert_eq!(agent.claim(shrinking.id, 1).await.unwrap(), 0);
    agent.release(shrinking.id, 1).await.unwrap();
    assert_eq!(agent.claim(shrinking.id, 2).await.unwrap(), 1);
}

pub(crate) async fn takes_back_no_more_than_was_held(coordination: Shared) {
    let (agent, other) = (
        join(&coordination, "agent").await,
        join(&coordination, "other").await,
    );
    let shared = instance(InstanceState::Ready, 4);
    ready(&*agent, &shared).await;
    assert_eq!(agent.claim(shared.id, 2).await.unwrap(), 2);
    assert_eq!(other.claim(shared.id, 2).await.unwrap(), 2);
    agent.release(shared.id, 100).await.unwrap();
    assert_eq!(agent.held(shared.id).await.unwrap(), 2);
    assert_eq!(agent.claim(shared.id, 100).await.unwrap(), 2);
    agent.release(InstanceId::random(), 1).await.unwrap();
}

pub(crate) async fn frees_the_slots_of_who_left(coordination: Shared) {
    let (agent, proxy) = (
        join(&coordination, "agent").await,
        join(&coordination, "proxy").await,
    );
    let shared = instance(InstanceState::Ready, 3);
    ready(&*agent, &shared).await;
    assert_eq!(proxy.claim(shared.id, 3).await.unwrap(), 3);
    assert_eq!(agent.claim(shared.id, 1).await.unwrap(), 0);
    drop(proxy);
    until("the slots of who left", async || {
        agent.held(shared.id).await.unwrap() == 0
    })
    .await;
    assert_eq!(agent.claim(shared.id, 3).await.unwrap(), 3);
}

pub(crate) async fn forgets_slots_with_their_instance(coordination: Shared) {
    let agent = join(&coordination, "agent").await;
    let again = instance(InstanceState::Ready, 2);
    ready(&*agent, &again).await;
    assert_eq!(agent.claim(again.id, 2).await.unwrap(), 2);
    agent.withdraw(again.id);
    until("its end", async || agent.held(again.id).await.unwrap() == 0).await;
    assert_eq!(agent.claim(again.id, 1).await.unwrap(), 0);
    ready(&*agent, &again).await;
    assert_eq!(agent.claim(again.id, 2).await.unwrap(), 2);
}

/// Who publishes an instance may look dead while the instance goes on, and the requests of others on it.
pub(crate) async fn keeps_the_slots_of_an_instance_without_publisher(coordination: Shared) {
    let (first, proxy) = (
        join(&coordination, "first").await,
        join(&coordination, "proxy").await,
    );
    let lasting = instance(InstanceState::Ready, 3);
    ready(&*first, &lasting).await;
    assert_eq!(proxy.claim(lasting.id, 2).await.unwrap(), 2);
    let mut watch = coordination.watch().await.unwrap();
    next(&mut watch).await;
    drop(first);
    assert_eq!(next(&mut watch).await, Event::Gone(lasting.id));
    assert_eq!(proxy.held(lasting.id).await.unwrap(), 2);
    assert_eq!(proxy.claim(lasting.id, 1).await.unwrap(), 0);

    let second = join(&coordination, "second").await;
    ready(&*second, &lasting).await;
    assert_eq!(second.claim(lasting.id, 3).await.unwrap(), 1);
    proxy.release(lasting.id, 2).await.unwrap();
    assert_eq!(second.claim(lasting.id, 3).await.unwrap(), 2);
}

pub(crate) async fn takes_nothing_by_a_dropped_claim(coordination: Shared) {
    let (agent, proxy) = (
        join(&coordination, "agent").await,
        join(&coordination, "proxy").await,
    );
    let shared = instance(InstanceState::Ready, 100);
    ready(&*agent, &shared).await;
    for n in 0..100 {
        // Dropped before it was sent, under way, and after the answer came.
        tokio::select! {
            biased;
            got = proxy.claim(shared.id, 1) => {
                proxy.release(shared.id, got.unwrap()).await.unwrap();
            }
            () = async { for _ in 0..n { tokio::task::yield_now().await; } } => {}
        }
    }
    until("the slots that nobody took", async || {
        agent.held(shared.id).await.unwrap() == 0
    })
    .await;
}
