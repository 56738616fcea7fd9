//! Replays traces of days against [`decide`] in a discrete-event simulation.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    time::Duration,
};

use super::{History, Observed, Policy, Sample, Settings, State, Steps, decide, next_tick};

const MS: u64 = 1;
const SECOND: u64 = 1000 * MS;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// An invocation: when it comes and how long it runs, in milliseconds.
type Trace = Vec<(u64, u64)>;

struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -(1.0 - self.next()).ln()
    }

    fn normal(&mut self) -> f64 {
        (2.0 * self.exponential()).sqrt() * (std::f64::consts::TAU * self.next()).cos()
    }
}

/// Poisson arrivals so that `load(t)` run at once on average; run times are log-normal.
fn trace(
    seed: u64,
    until: u64,
    mean_ms: f64,
    spread: f64,
    mut load: impl FnMut(u64, &mut Random) -> f64,
) -> Trace {
    const PIECE: u64 = 10 * SECOND;
    let mut random = Random(seed);
    let mut trace = Trace::new();
    for start in (0..until).step_by(PIECE as usize) {
        let rate = load(start, &mut random) / mean_ms;
        if rate <= 0.0 {
            continue;
        }
        let mut at = start as f64 + random.exponential() / rate;
        while at < (start + PIECE) as f64 {
            let run = mean_ms * (spread * random.normal() - spread * spread / 2.0).exp();
            trace.push((at as u64, (run as u64).max(1)));
            at += random.exponential() / rate;
        }
    }
    trace
}

/// A day's swing, and swings of minutes on top, as chat traffic has them; 23 at once on average.
fn llm(seed: u64, days: u64) -> Trace {
    let mut swing = 0.0;
    trace(seed, days * DAY, 9000.0, 0.9, move |at, random| {
        swing = 0.95 * swing + 0.08 * random.normal();
        let day = 1.0 + 0.3 * (std::f64::consts::TAU * at as f64 / DAY as f64).sin();
        (23.0 * day * (1.0 + swing)).clamp(0.5, 29.0)
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Finished(usize),
    Ready(usize),
    Tick,
}

#[derive(Default)]
struct Instance {
    ready: bool,
    draining: bool,
    busy: u32,
}

#[derive(Debug, Default)]
struct Outcome {
    served: usize,
    instance_seconds: f64,
    waits: Vec<u64>,
    changes: Vec<u64>,
    counts: Vec<(u64, u32)>,
    most_samples: usize,
    left: usize,
    last_finish: u64,
    gone_at: u64,
}

impl Outcome {
    fn wait(&self, share: f64) -> f64 {
        let index = ((self.waits.len() - 1) as f64 * share) as usize;
        self.waits[index] as f64 / 1000.0
    }

    fn desired_at(&self, at: u64) -> u32 {
        let after = self.counts.partition_point(|&(time, _)| time <= at);
        after.checked_sub(1).map_or(0, |last| self.counts[last].1)
    }

    fn changes_per_hour(&self, from: u64, to: u64) -> f64 {
        let changes = self
            .changes
            .iter()
            .filter(|&&at| (from..to).contains(&at))
            .count();
        changes as f64 * HOUR as f64 / (to - from) as f64
    }
}

/// What to do with an instance too many that is busy.
#[derive(Clone, Copy, PartialEq)]
enum Surplus {
    /// It gets no more work, unless it is wanted again.
    Drain,
    /// It goes on as before until it happens to be idle.
    Wait,
}

fn replay(settings: &Settings, trace: &Trace, start_ms: u64, surplus: Surplus) -> Outcome {
    let tick = next_tick(settings).as_millis() as u64;
    let mut outcome = Outcome::default();
    let mut history = History::new(settings);
    let mut state = State::default();
    let mut instances: BTreeMap<usize, Instance> = BTreeMap::new();
    let mut queue: VecDeque<(u64, u64)> = VecDeque::new();
    let mut events = BinaryHeap::from([Reverse((0, Event::Tick))]);
    let mut arrivals = trace.iter().copied().enumerate().peekable();
    let (mut now, mut next_instance, mut desired) = (0, 0, 0);
    let (mut busy, mut area) = (0_u32, 0.0);
    let mut arrived = 0;
    let end = trace.last().map_or(0, |last| last.0) + 3 * HOUR;

    loop {
        let next_event = events.peek().map_or(u64::MAX, |event| event.0.0);
        let next_arrival = arrivals.peek().map_or(u64::MAX, |&(_, (at, _))| at);
        let then = next_event.min(next_arrival);
        if then > end {
            break;
        }
        let seconds = (then - now) as f64 / 1000.0;
        area += (f64::from(busy) + queue.len() as f64) * seconds;
        outcome.instance_seconds += instances.len() as f64 * seconds;
        now = then;

        let mut decides = false;
        if next_arrival <= next_event {
            let (_, invocation) = arrivals.next().unwrap();
            arrived += 1;
            queue.push_back(invocation);
            decides = instances.is_empty();
        } else {
            match events.pop().unwrap().0.1 {
                Event::Finished(id) => {
                    instances.get_mut(&id).unwrap().busy -= 1;
                    busy -= 1;
                    outcome.served += 1;
                    outcome.last_finish = now;
                }
                Event::Ready(id) => {
                    if let Some(instance) = instances.get_mut(&id) {
                        instance.ready = true;
                    }
                }
                Event::Tick => {
                    decides = true;
                    events.push(Reverse((now + tick, Event::Tick)));
                }
            }
        }

        while !queue.is_empty() {
            let Some((&id, instance)) = instances
                .iter_mut()
                .filter(|(_, it)| it.ready && !it.draining && it.busy < settings.concurrency)
                .min_by_key(|(_, it)| it.busy)
            else {
                break;
            };
            let (came, run) = queue.pop_front().unwrap();
            outcome.waits.push(now - came);
            instance.busy += 1;
            busy += 1;
            events.push(Reverse((now + run, Event::Finished(id))));
        }

        if decides {
            history.push(Sample {
                at: Duration::from_millis(now),
                area,
                arrivals: arrived,
                in_system: busy + queue.len() as u32,
                queued: queue.len() as u32,
            });
            outcome.most_samples = outcome.most_samples.max(history.len());
            let wanted = |instance: &&Instance| !instance.draining;
            let ready = instances.values().filter(wanted).filter(|it| it.ready);
            let ready = ready.count() as u32;
            let all = instances.values().filter(wanted).count() as u32;
            let observed = Observed {
                ready,
                starting: all - ready,
                error: 0,
            };
            let now = Duration::from_millis(now);
            let (decision, next) = decide(settings, &history, observed, state, now);
            state = next;
            if decision.desired != desired {
                desired = decision.desired;
                outcome.changes.push(then);
                outcome.counts.push((then, desired));
            }
        }

        let draining = instances.values().any(|it| it.draining);
        if instances.len() > desired as usize || draining {
            // The idle go first, those that are starting before those that are ready.
            let mut order: Vec<usize> = instances.keys().copied().collect();
            order.sort_by_key(|id| Reverse((instances[id].ready, instances[id].busy)));
            for (rank, id) in order.into_iter().enumerate() {
                let instance = instances.get_mut(&id).unwrap();
                let extra = rank >= desired as usize;
                if extra && instance.busy == 0 {
                    instances.remove(&id);
                    outcome.gone_at = now;
                } else {
                    instance.draining = extra && surplus == Surplus::Drain;
                }
            }
        }
        while instances.len() < desired as usize {
            instances.insert(next_instance, Instance::default());
            events.push(Reverse((now + start_ms, Event::Ready(next_instance))));
            next_instance += 1;
        }
    }
    outcome.left = instances.len();
    outcome.waits.sort_unstable();
    outcome
}

/// The instance-seconds of one that knows the future: started in time, full to the last slot, gone at once.
fn least(settings: &Settings, trace: &Trace) -> f64 {
    let slots = (settings.max * settings.concurrency) as usize;
    let mut ends: BinaryHeap<Reverse<u64>> = BinaryHeap::new();
    let mut steps: Vec<(u64, i64)> = Vec::with_capacity(2 * trace.len());
    for &(at, run) in trace {
        while ends.peek().is_some_and(|end| end.0 <= at) {
            ends.pop();
        }
        let start = if ends.len() < slots {
            at
        } else {
            ends.pop().unwrap().0
        };
        ends.push(Reverse(start + run));
        steps.push((start, 1));
        steps.push((start + run, -1));
    }
    steps.sort_unstable();
    let (mut before, mut busy, mut sum) = (0, 0_i64, 0.0);
    for (at, change) in steps {
        let count = busy as u64;
        sum += count.div_ceil(u64::from(settings.concurrency)) as f64 * (at - before) as f64;
        before = at;
        busy += change;
    }
    sum / 1000.0
}

fn settings() -> Settings {
    Settings {
        max: 8,
        concurrency: 4,
        ..Settings::default()
    }
}

fn ratio(outcome: &Outcome, settings: &Settings, trace: &Trace) -> f64 {
    outcome.instance_seconds / least(settings, trace)
}

#[test]
fn days_of_an_llm_trace_cost_little_more_than_the_least() {
    let settings = settings();
    let trace = llm(7, 1);
    for surplus in [Surplus::Drain, Surplus::Wait] {
        let outcome = replay(&settings, &trace, 10 * SECOND, surplus);
        let ratio = ratio(&outcome, &settings, &trace);
        println!(
            "drain {}: {} served, ratio {ratio:.3}, wait p50 {} p99 {} max {}, {} changes/h",
            surplus == Surplus::Drain,
            outcome.served,
            outcome.wait(0.5),
            outcome.wait(0.99),
            outcome.wait(1.0),
            outcome.changes_per_hour(0, DAY)
        );
        assert_eq!(outcome.served, trace.len());
        assert!(ratio <= 1.6, "{ratio}");
        assert!(outcome.wait(0.99) <= 10.0);
        assert!(outcome.wait(1.0) <= 30.0);
        assert_eq!(outcome.left, 0);
        assert!(outcome.most_samples <= 200, "{}", outcome.most_samples);
    }
}

#[test]
fn a_larger_limit_and_quiet_nights_cost_little_more_than_the_least() {
    let settings = Settings {
        max: 50,
        ..settings()
    };
    let trace = trace(3, 2 * DAY, 9000.0, 0.9, |at, _| {
        40.0 * (std::f64::consts::TAU * at as f64 / DAY as f64)
            .sin()
            .max(0.0)
    });
    let outcome = replay(&settings, &trace, 10 * SECOND, Surplus::Drain);
    let ratio = ratio(&outcome, &settings, &trace);
    println!(
        "quiet nights: ratio {ratio:.3}, wait p99 {} max {}",
        outcome.wait(0.99),
        outcome.wait(1.0)
    );
    assert_eq!(outcome.served, trace.len());
    assert!(ratio <= 1.6, "{ratio}");
    assert!(outcome.wait(0.99) <= 1.0);
    // The nights' first invocation waits for the start.
    assert!(outcome.wait(1.0) <= 15.0);
    assert_eq!(outcome.desired_at(DAY - HOUR), 0);
}

#[test]
fn a_flat_load_does_not_flap() {
    let settings = Settings {
        max: 20,
        ..settings()
    };
    // Also at and around multiples of the target, where rounding up alone would flap.
    for load in [1.0, 2.8, 5.6, 8.4, 14.0, 20.0, 23.0, 28.0] {
        let trace = trace(11, 12 * HOUR, 2000.0, 0.5, |_, _| load);
        let outcome = replay(&settings, &trace, 10 * SECOND, Surplus::Drain);
        let changes = outcome.changes_per_hour(HOUR, 12 * HOUR);
        println!(
            "load {load}: {changes:.1} changes/h, ratio {:.3}, wait p99 {} max {}",
            ratio(&outcome, &settings, &trace),
            outcome.wait(0.99),
            outcome.wait(1.0)
        );
        assert_eq!(outcome.served, trace.len());
        assert!(changes <= 24.0, "{load}: {changes}");
        assert_eq!(outcome.left, 0);
    }
}

#[test]
fn a_burst_into_a_cold_version_starts_what_it_needs_and_ends_at_zero() {
    let settings = settings();
    let burst: Trace = (0..20).map(|_| (HOUR, 5 * SECOND)).collect();
    let outcome = replay(&settings, &burst, 10 * SECOND, Surplus::Wait);
    assert_eq!(outcome.desired_at(HOUR - 1), 0);
    assert_eq!(outcome.desired_at(HOUR + SECOND), 8);
    assert_eq!(outcome.wait(1.0), 10.0);
    assert_eq!(outcome.served, 20);
    let idle = outcome.gone_at - outcome.last_finish;
    assert!(
        (5 * MINUTE..=5 * MINUTE + 2 * SECOND).contains(&idle),
        "{idle}"
    );
    // The panic ends long before the idle time-out.
    assert!(outcome.desired_at(HOUR + 3 * MINUTE) <= 1);
}

#[test]
fn small_windows_come_down_promptly() {
    let settings = Settings {
        stable_window: Duration::from_secs(2),
        panic_window: Duration::from_millis(300),
        idle_timeout: Duration::from_secs(3),
        ..settings()
    };
    let burst: Trace = (0..30).map(|_| (MINUTE, 2 * SECOND)).collect();
    let outcome = replay(&settings, &burst, 500, Surplus::Wait);
    assert_eq!(outcome.desired_at(MINUTE + 100), 8);
    let done = outcome.last_finish;
    assert!(outcome.desired_at(done + 2200) <= 1);
    assert_eq!(outcome.desired_at(done + 3200), 0);
}

#[test]
fn steps_serve_everything_and_end_at_zero() {
    let settings = Settings {
        policy: Policy::NvcfStep(Steps::default()),
        ..settings()
    };
    let trace = llm(5, 1);
    let outcome = replay(&settings, &trace, 10 * SECOND, Surplus::Drain);
    println!(
        "steps: ratio {:.3}, wait p99 {} max {}, {} changes/h",
        ratio(&outcome, &settings, &trace),
        outcome.wait(0.99),
        outcome.wait(1.0),
        outcome.changes_per_hour(0, DAY)
    );
    assert_eq!(outcome.served, trace.len());
    assert_eq!(outcome.left, 0);
    assert!(outcome.changes_per_hour(0, DAY) <= 60.0);
}
