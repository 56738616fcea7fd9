//! The life of an invocation, top to bottom.
//!
//! Every `.await` here may be the last: a caller that leaves drops the whole
//! future. What was taken is given back by guards: the place in the queue, the
//! slot, the request that an instance has, and the account of the request.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, Request, Response, Uri, Version, request::Parts, uri::PathAndQuery};
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, sleep, timeout_at};
use weir_control::coordination::Signal;
use weir_control::model::{AccountId, Deployment, FunctionState, Key, RoutingPolicy};
use weir_queue::{Ask, Entered, Phase, Preference, Refused, Waiting};

use crate::{
    account::{Account, Waited},
    body::{Answer, BodyFailure, Held, Streamed},
    clock,
    core::{Caller, Core, Stopping},
    headers,
    refusal::Refusal,
    table::{Deployed, Route, VersionRoute},
    target::{PathRule, Target},
    upstream::{self, Backend, Connection, Failure, InstanceSlot},
};

/// How often a request may meet an instance that takes no connection. Each time that instance is set aside, so
/// this is a bound on bad luck, beside the retry budget.
const ATTEMPTS: u32 = 4;

/// One invocation, from its head to its answer's head. `account` is taken along by the answer.
pub async fn invoke(
    core: &Arc<Core>,
    caller: &Caller,
    target: Target,
    request: Request<Incoming>,
    account: &mut Account,
) -> Result<Response<Answer>, Refusal> {
    let arrival = clock::now();
    let (mut head, body) = request.into_parts();

    let route = core
        .table
        .view(target.function)
        .ok_or(Refusal::UnknownFunction)?;
    let key = core.keys.authenticate(&head.headers)?;
    // What the key may not know of is not there for it, whatever else it lacks.
    if !route.versions.iter().any(|v| may_call(&route, v, &key)) {
        return Err(Refusal::UnknownFunction);
    }
    core.keys.may_invoke(&key, target.function)?;
    let limit = core.settings.max_body;
    if body.size_hint().lower() > limit {
        return Err(Refusal::BodyTooLarge { limit });
    }

    let chosen = choose(&route, &target, &key)?;
    let (version, deployed, deployment) = chosen;
    account.deployed(deployed);
    core.limits.check(version, &key)?;

    let mut patience = Patience::of(&head, &target, deployment, arrival)?;
    let ask = Ask {
        request: caller.request_id.as_u128(),
        priority: key.priority,
        account: account_number(&key.account),
        arrival,
        preference: preference(&head.headers, deployment),
        home: core.index,
    };
    let mut held = Held::new(body, limit);
    let (mut slot, mut waited) =
        take_slot(core, &ask, &mut held, &mut patience, chosen, account).await?;

    headers::forward(&mut head, caller, &version.version, &key, patience.left());
    head.uri = path_for(&head.uri, &target, &version.version.inference_url)?;
    head.extensions.clear();
    let outgoing = held.outgoing();
    let progress = outgoing.progress();
    let mut request = Request::from_parts(head, outgoing);
    core.budget.deposit();

    let deadline = Instant::now() + core.settings.request_timeout;
    let mut attempt = 1;
    let (response, exchange) = loop {
        account.dispatched(waited.take(), slot.target(), request.headers_mut());
        let instance = slot.target().instance;
        let cancels = &deployed.metrics.cancel_timeouts;
        let times = core.settings.instances;
        // Boxed: a request that waits has no room for what comes after.
        let send = Box::pin(upstream::send(slot, request, times, &core.trust, cancels));
        match timeout_at(deadline, send).await {
            // A protocol that nobody asked for: what follows is no answer.
            Ok(Ok((response, _))) if response.status().is_informational() => {
                return Err(Refusal::InstanceLost);
            }
            Ok(Ok(answered)) => break answered,
            Err(_) => return Err(Refusal::InstanceTimeout),
            Ok(Err(Failure::Lost)) => {
                let callers = progress.failed().map(|failure| unread(failure, limit));
                return Err(callers.unwrap_or(Refusal::InstanceLost));
            }
            Ok(Err(Failure::Short(error))) => {
                tracing::warn!(%error, "no connection to an instance could be made");
                let why =
                    format!("Weir itself can't open a connection to it ({error}). Try again.");
                return Err(Refusal::NoCapacity(why.into()));
            }
            Ok(Err(Failure::NotSent(unsent, refused))) => {
                account.not_sent();
                deployed.metrics.connect_failures.increment(1);
                set_aside(core, deployed, instance.0.as_u128());
                core.table.signal(Signal::Suspect(instance));
                drop(refused);
                if attempt == ATTEMPTS || !core.budget.withdraw() {
                    return Err(Refusal::InstanceRefused);
                }
                attempt += 1;
                request = *unsent;
                // Back into the line, at the old place: `ask` has the old arrival.
                let mut held = Held::default();
                (slot, _) =
                    take_slot(core, &ask, &mut held, &mut patience, chosen, account).await?;
            }
        }
    };

    let (mut head, body) = response.into_parts();
    // Not the instance's: an answer of HTTP/1.0 without a length would look whole wherever it broke off.
    head.version = Version::HTTP_11;
    headers::answer(&mut head.headers);
    account.answered(head.status, None);
    let streamed = Streamed::new(body, exchange, account.take(), deadline);
    Ok(Response::from_parts(
        head,
        Answer::Instance(Box::new(streamed)),
    ))
}

/// An instance that took no connection gets nothing for a second, unless its agent says sooner what it is.
fn set_aside(core: &Arc<Core>, deployed: &Arc<Deployed>, instance: u128) {
    deployed.queue.eject(instance);
    let deployed = deployed.clone();
    core.spawn(async move {
        sleep(Duration::from_secs(1)).await;
        deployed.queue.restore(instance);
    });
}

type Chosen<'a> = (&'a VersionRoute, &'a Arc<Deployed>, &'a Deployment);

/// Whether the version is the key's account's, or shared with it.
fn may_call(route: &Route, version: &VersionRoute, key: &Key) -> bool {
    key.admin
        || key.account == route.account
        || version
            .shared_with
            .iter()
            .any(|to| to == "*" || **to == *key.account.0)
}

/// The version that serves this invocation: the one named, or one of those that take invocations.
fn choose<'a>(route: &'a Route, target: &Target, key: &Key) -> Result<Chosen<'a>, Refusal> {
    let mut callable = route
        .versions
        .iter()
        .filter(|v| target.version.is_none_or(|id| v.version.id == id))
        .filter(|v| may_call(route, v, key));
    if target.version.is_some() {
        return invokable(callable.next().ok_or(Refusal::UnknownFunction)?);
    }
    let callable: Vec<&VersionRoute> = callable.collect();
    let ready: Vec<(&VersionRoute, f64)> = callable
        .iter()
        .filter(|v| v.state.invokable())
        .filter_map(|v| Some((*v, v.deployed.as_ref()?.queue.load().capacity as f64)))
        .collect();
    let weighted = callable
        .iter()
        .any(|v| v.state.invokable() && weight(v).is_some());
    let total: f64 = ready
        .iter()
        .map(|(v, capacity)| {
            if weighted {
                weight(v).unwrap_or(0.0)
            } else {
                *capacity
            }
        })
        .sum();
    if ready.len() > 1 && total > 0.0 {
        let mut left = rand::random::<f64>() * total;
        for (version, capacity) in &ready {
            left -= if weighted {
                weight(version).unwrap_or(0.0)
            } else {
                *capacity
            };
            if left < 0.0 {
                return invokable(version);
            }
        }
    }
    // None ready, or only one: the newest that takes invocations, else the newest that says why it doesn't.
    let newest = ready.last().map(|(version, _)| *version);
    let deployed = callable
        .iter()
        .rev()
        .find(|v| v.state != FunctionState::Inactive)
        .copied();
    invokable(newest.or(deployed).ok_or(Refusal::UnknownFunction)?)
}

fn weight(version: &VersionRoute) -> Option<f64> {
    version.deployment.as_ref()?.traffic_weight.map(f64::from)
}

fn invokable(version: &VersionRoute) -> Result<Chosen<'_>, Refusal> {
    match (&version.deployed, &version.deployment) {
        (Some(deployed), Some(deployment)) if version.state.invokable() => {
            Ok((version, deployed, deployment))
        }
        _ if version.state == FunctionState::Inactive => Err(Refusal::UnknownFunction),
        _ => Err(Refusal::NotInvokable {
            state: version.state,
            why: version
                .failure
                .as_ref()
                .map(|why| format!(" ({why})"))
                .unwrap_or_default(),
            retry_after: version.starting.then(|| {
                let known = version.deployed.as_ref().and_then(|d| d.start_time());
                known.unwrap_or(Duration::from_secs(1))
            }),
        }),
    }
}

fn preference(headers: &HeaderMap, deployment: &Deployment) -> Preference {
    match deployment.routing.policy {
        RoutingPolicy::LeastLoaded => Preference::LeastLoaded,
        RoutingPolicy::ConsistentHash => {
            match headers.get(deployment.routing.session_header.as_str()) {
                Some(session) => Preference::Hash(stable_hash(session.as_bytes())),
                None => Preference::LeastLoaded,
            }
        }
    }
}

/// FNV-1a: the same in every process, for ever.
fn stable_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn account_number(account: &AccountId) -> u64 {
    stable_hash(account.0.as_bytes())
}

/// How long the caller and the deployment let an invocation wait.
struct Patience {
    /// The caller's own limit, from arrival.
    callers: Option<Duration>,
    busy: Duration,
    cold: Duration,
    /// By the queue's clock.
    arrival: Duration,
    /// The queue's phase when it first had to wait, and what of the wait came before that.
    entered: Option<(Phase, Duration)>,
}

/// A wait is looked at this often where the clock that runs is not the one that would end it first.
const OTHER_CLOCK: Duration = Duration::from_secs(1);

impl Patience {
    fn of(
        head: &Parts,
        target: &Target,
        deployment: &Deployment,
        arrival: Duration,
    ) -> Result<Self, Refusal> {
        let seconds = |name: &str, most: u64| -> Result<Option<Duration>, Refusal> {
            let Some(value) = head.headers.get(name) else {
                return Ok(None);
            };
            let parsed: Option<u64> = value
                .to_str()
                .ok()
                .and_then(|text| text.trim().parse().ok());
            match parsed {
                Some(seconds) if seconds <= most => Ok(Some(Duration::from_secs(seconds.max(1)))),
                _ => Err(Refusal::BadRequest(format!(
                    "The header {name} must be whole seconds, 1 to {most}."
                ))),
            }
        };
        let poll = match target.path {
            PathRule::InferenceUrl => seconds("nvcf-poll-seconds", 3600)?,
            PathRule::Callers => None,
        };
        let own = seconds("x-weir-timeout", 86_400)?;
        Ok(Self {
            callers: [poll, own].into_iter().flatten().min(),
            busy: deployment.queue.busy_timeout.0,
            cold: deployment.queue.cold_timeout.0,
            arrival,
            entered: None,
        })
    }

    /// Of the caller's own limit.
    fn left(&self) -> Option<Duration> {
        self.callers
            .map(|limit| limit.saturating_sub(self.waited()))
    }

    fn waited(&self) -> Duration {
        clock::now().saturating_sub(self.arrival)
    }

    /// Whether the wait is over, and when to look again. `warm`: an instance is ready now. A request that waits again,
    /// since its instance took no connection, goes on from where it was.
    fn check(&mut self, now: Phase, warm: bool) -> Result<Duration, Expired> {
        let waited = self.waited();
        let (entered, before) = *self.entered.get_or_insert((now, waited));
        // What came before the first wait was with an instance, so with one that was ready.
        let busy = before + now.warm.saturating_sub(entered.warm);
        let busy_left = self.busy.saturating_sub(busy);
        let cold_left = self
            .cold
            .saturating_sub(now.cold.saturating_sub(entered.cold));
        if busy_left.is_zero() {
            return Err(Expired::Busy);
        }
        if cold_left.is_zero() {
            return Err(Expired::Cold);
        }
        let (runs, stands) = match warm {
            true => (busy_left, cold_left),
            false => (cold_left, busy_left),
        };
        let look = runs.min(stands.max(OTHER_CLOCK));
        match self.left() {
            Some(Duration::ZERO) if warm => Err(Expired::Busy),
            Some(Duration::ZERO) => Err(Expired::Cold),
            left => Ok(left.unwrap_or(Duration::MAX).min(look)),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Expired {
    Busy,
    Cold,
}

/// Takes a slot at once or after a wait.
async fn take_slot(
    core: &Arc<Core>,
    ask: &Ask,
    held: &mut Held,
    patience: &mut Patience,
    chosen: Chosen<'_>,
    account: &mut Account,
) -> Result<(InstanceSlot, Option<Waited>), Refusal> {
    let (_, deployed, _) = chosen;
    match deployed.queue.enter(ask.clone()) {
        Entered::Slot(slot) => Ok((slot, None)),
        Entered::Refused(refused) => Err(refusal(core, refused, deployed)),
        Entered::Waiting(waiting) => {
            let cold = waiting.cold();
            account.queued(cold);
            let slot = wait(core, waiting, held, patience, chosen).await?;
            let time = patience.waited();
            Ok((slot, Some(Waited { time, cold })))
        }
    }
}

/// Waits for a slot, reading the body meanwhile.
///
/// Up to `holdBytes` of it are read whatever happens. A longer body is read on as long as half of the queue's bytes
/// are free: behind unread bytes a caller's leaving can't be seen.
async fn wait(
    core: &Arc<Core>,
    mut waiting: Waiting<Arc<Backend>, Connection>,
    held: &mut Held,
    patience: &mut Patience,
    (_, deployed, deployment): Chosen<'_>,
) -> Result<InstanceSlot, Refusal> {
    if waiting.first() || waiting.cold() {
        core.table
            .signal(Signal::Demand(deployed.function, deployed.version));
    }
    let settings = &deployment.queue;
    loop {
        let warm = deployed.queue.load().ready_instances > 0;
        let left = match patience.check(deployed.queue.phase(), warm) {
            Ok(left) => left,
            Err(expired) => {
                let waited = patience.waited();
                return Err(match expired {
                    Expired::Busy => Refusal::BusyTimeout {
                        waited,
                        retry_after: deployed.retry_after(),
                    },
                    Expired::Cold => Refusal::StartTimeout {
                        waited,
                        retry_after: deployed
                            .start_time()
                            .unwrap_or_default()
                            .saturating_sub(waited),
                    },
                });
            }
        };
        let read_on = !held.whole()
            && (held.len() < settings.hold_bytes || waiting.spare_bytes() > settings.max_bytes / 2);
        tokio::select! {
            biased;
            granted = &mut waiting => return granted.map_err(|refused| refusal(core, refused, deployed)),
            read = held.read(), if read_on => match read {
                Ok(bytes) => waiting.add_bytes(bytes).map_err(|refused| refusal(core, refused, deployed))?,
                Err(failure) => return Err(unread(failure, core.settings.max_body)),
            },
            () = sleep(left.min(Duration::from_secs(86_400))) => {}
        }
    }
}

fn unread(failure: BodyFailure, limit: u64) -> Refusal {
    match failure {
        BodyFailure::TooLarge => Refusal::BodyTooLarge { limit },
        BodyFailure::Malformed => {
            Refusal::BadRequest("The body is not in the chunks that its head promises.".into())
        }
        BodyFailure::BrokeOff => Refusal::BodyBrokeOff,
    }
}

fn refusal(core: &Core, refused: Refused, deployed: &Deployed) -> Refusal {
    match refused {
        Refused::Full { requests, limit } => Refusal::QueueFull {
            what: if requests {
                format!("{limit} invocations wait")
            } else {
                format!("{limit} bytes of bodies wait")
            },
            retry_after: deployed.retry_after(),
        },
        Refused::Closed(_) if *core.stopping.borrow() >= Stopping::Draining => Refusal::Draining,
        Refused::Closed(why) => Refusal::NoCapacity(why),
    }
}

fn path_for(callers: &Uri, target: &Target, inference_url: &str) -> Result<Uri, Refusal> {
    let path_and_query = match target.path {
        PathRule::Callers => callers
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/")),
        PathRule::InferenceUrl => {
            let text = match callers.query() {
                Some(query) if inference_url.contains('?') => format!("{inference_url}&{query}"),
                Some(query) => format!("{inference_url}?{query}"),
                None => inference_url.to_owned(),
            };
            text.parse().map_err(|_| {
                Refusal::BadRequest(format!(
                    "The version's inferenceUrl '{inference_url}' is no path."
                ))
            })?
        }
    };
    Ok(Uri::from(path_and_query))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A request that came now and waits up to ten seconds for a busy instance, twenty for a start.
    fn patience() -> Patience {
        Patience {
            callers: None,
            busy: 10 * SECOND,
            cold: 20 * SECOND,
            arrival: clock::now(),
            entered: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_again_goes_on_from_where_it_was() {
        let mut patience = patience();
        let mut phase = Phase {
            warm: 100 * SECOND,
            cold: 50 * SECOND,
        };
        assert_eq!(patience.check(phase, true).unwrap(), 10 * SECOND);
        phase.warm += 4 * SECOND;
        assert_eq!(patience.check(phase, true).unwrap(), 6 * SECOND);
        // The instance took no connection and is set aside: the next wait.
        phase.cold += 15 * SECOND;
        assert_eq!(patience.check(phase, false).unwrap(), 5 * SECOND);
        phase.warm += 6 * SECOND;
        assert!(matches!(patience.check(phase, true), Err(Expired::Busy)));
    }

    #[tokio::test(start_paused = true)]
    async fn time_with_an_instance_that_took_no_connection_counts() {
        let mut patience = patience();
        tokio::time::advance(3 * SECOND).await;
        let phase = Phase {
            warm: 100 * SECOND,
            cold: Duration::ZERO,
        };
        assert_eq!(patience.check(phase, true).unwrap(), 7 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_the_callers_own_time_is_what_it_waited_for_last() {
        let mut patience = Patience {
            callers: Some(2 * SECOND),
            ..patience()
        };
        // It has been warm before, and is cold now.
        let mut phase = Phase {
            warm: 100 * SECOND,
            cold: 50 * SECOND,
        };
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(patience.check(phase, false).is_ok());
        tokio::time::advance(2 * SECOND).await;
        phase.cold += 2 * SECOND;
        assert!(matches!(patience.check(phase, false), Err(Expired::Cold)));
        assert!(matches!(patience.check(phase, true), Err(Expired::Busy)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_stands_is_not_slept_on() {
        let mut patience = patience();
        let mut phase = Phase::default();
        patience.check(phase, true).unwrap();
        phase.warm += 10 * SECOND - Duration::from_millis(1);
        let busy_left = Duration::from_millis(1);
        assert_eq!(patience.check(phase, true).unwrap(), busy_left);
        assert_eq!(patience.check(phase, false).unwrap(), OTHER_CLOCK);
    }
}
