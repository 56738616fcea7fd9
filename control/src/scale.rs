//! How many instances a version should have: a pure function of its load, its deployment and the time.
//!
//! Nothing here reads a clock, starts an instance or waits. The caller pushes a [`Sample`] of the
//! version's load into its [`History`] and calls [`decide`] when demand arrives at a cold version, and
//! otherwise every [`next_tick`]; `now` and [`Sample::at`] are readings of one monotonic clock.
//!
//! # The `concurrency` policy
//!
//! The shape is that of Knative's pod autoscaler (KPA, `pkg/autoscaler/scaling/autoscaler.go`). Load is
//! invocations in the system, running or queued, averaged over two windows. One instance should carry
//! `target = concurrency * target_utilization` of them.
//!
//! | what | here | KPA's default |
//! | --- | --- | --- |
//! | stable window | `stable_window`, 60 s | 60 s |
//! | panic window | `panic_window`, 6 s | 10% of the stable window |
//! | target utilization | `target_utilization`, 0.7 | 70% |
//! | panic threshold | panic average at least 200% of `ready * target` | 200% |
//! | evaluation period | `panic_window / 6`, 1 s | 2 s |
//! | delay before scaling in | `scale_in_delay`, 0 s | 0 s |
//! | hold before zero | `idle_timeout`, 5 min since the last activity | a stable window, and 30 s of grace |
//! | scale-up rate | none: `max` is the limit | 1000x per evaluation, as good as none |
//! | scale-down rate | none | 2x per evaluation |
//!
//! `ceil(average / target)` instances are wanted. Past the panic threshold the larger of the windows'
//! answers counts and never falls, until a whole stable window has passed without a breach. As in KPA, a
//! window that the load hasn't filled yet is averaged over the time since it began, at least one
//! evaluation period, and an autoscaler that finds more than one instance at its start begins in panic,
//! since it can't know what they are for.
//!
//! Where it differs:
//!
//! - **Waking.** While no instance is ready, the number in the system at this moment counts too, so that a
//!   burst into a cold version starts what the burst needs, in one step.
//! - **No scale-down rate.** A decision is made on demand as well as on a tick, so a factor per decision
//!   isn't a rate. Nor is there work to protect: only idle instances are retired, and the stable average
//!   takes a whole window to fall.
//! - **Steadiness.** KPA's `ceil` goes up and down for ever under a flat load that lies near a multiple of
//!   the target. Here an instance that was wanted within the last three stable windows is kept while the load
//!   is close to wanting it again: within `0.35 * sqrt(n)` instances, as random arrivals spread.
//! - **The threshold isn't rounded.** KPA compares the rounded-up panic count with the ready count, so at
//!   one instance a load just above the target is a panic already.
//!
//! # The `nvcf-step` policy
//!
//! NVCF's steps: with `utilization = 100 * stable average / (instances * concurrency)`, above `up_threshold`
//! `ceil(n * up_factor)`, below `down_threshold` `max(1, floor(n * down_factor))`. NVCF takes a step each
//! cycle of 15 to 30 s; here the next step up is taken when the instances of the last one have started.
//! A step with a stickiness `{size, threshold}` is taken when the utilization was beyond its threshold in
//! `threshold` of the last `size` minutes, each judged by its last decision, since the number of instances
//! last changed. Waking, `idle_timeout`, `scale_in_delay` and the bounds are as above.

use std::{collections::VecDeque, fmt, time::Duration};

use serde::Serialize;

use crate::model::{AutoscalingConfiguration, IsoDuration, StickinessDetails};

pub use history::{History, Sample};

mod history;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod tests;

/// Panic begins when the load is this many times what the ready instances should carry.
const PANIC_THRESHOLD: f64 = 2.0;

/// How close to wanting one more the load must be to keep an instance that is there, in instances, times
/// the square root of what the load wants: random arrivals make averages spread like that.
const STEADY_BAND: f64 = 0.35;

/// How long it is kept so, in stable windows.
const STEADY_WINDOWS: u32 = 3;

/// Rounding errors of the averages that must not cost an instance.
const ROUNDING: f64 = 1e-6;

/// What a deployment asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub policy: Policy,
    /// The share of an instance's slots to aim at, in (0, 1].
    pub target_utilization: f64,
    pub stable_window: Duration,
    pub panic_window: Duration,
    /// The largest number that was wanted within this time is kept.
    pub scale_in_delay: Duration,
    /// The last instance goes this long after the last activity.
    pub idle_timeout: Duration,
    pub min: u32,
    /// Wins over `min`.
    pub max: u32,
    /// `maxRequestConcurrency`: the slots of one instance.
    pub concurrency: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            policy: Policy::Concurrency,
            target_utilization: 0.7,
            stable_window: Duration::from_secs(60),
            panic_window: Duration::from_secs(6),
            scale_in_delay: Duration::ZERO,
            idle_timeout: Duration::from_secs(300),
            min: 0,
            max: 1,
            concurrency: 1,
        }
    }
}

impl Settings {
    /// The load that one instance should carry.
    fn target(&self) -> f64 {
        let utilization = if self.target_utilization.is_nan() {
            0.7
        } else {
            self.target_utilization.clamp(0.01, 1.0)
        };
        self.slots() * utilization
    }

    fn slots(&self) -> f64 {
        f64::from(self.concurrency.max(1))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    Concurrency,
    NvcfStep(Steps),
}

/// Thresholds are in percent of the instances' slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Steps {
    pub up_threshold: f64,
    pub up_factor: f64,
    pub up_stickiness: Option<Stickiness>,
    pub down_threshold: f64,
    pub down_factor: f64,
    pub down_stickiness: Option<Stickiness>,
}

/// How much of the last time a threshold must have been passed in, in minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stickiness {
    pub size: u64,
    pub threshold: u64,
}

impl Default for Steps {
    fn default() -> Self {
        Steps {
            up_threshold: 70.0,
            up_factor: 1.2,
            up_stickiness: None,
            down_threshold: 30.0,
            down_factor: 0.8,
            down_stickiness: None,
        }
    }
}

impl Steps {
    /// What is left out is as NVCF has it.
    #[must_use]
    pub fn of(configuration: &AutoscalingConfiguration) -> Self {
        let mut steps = Self::default();
        if let Some(up) = &configuration.scale_up_details {
            (steps.up_threshold, steps.up_factor) = (up.threshold as f64, up.factor);
            steps.up_stickiness = up.stickiness.map(Stickiness::of);
        }
        if let Some(down) = &configuration.scale_down_details {
            (steps.down_threshold, steps.down_factor) = (down.threshold as f64, down.factor);
            steps.down_stickiness = down.stickiness.map(Stickiness::of);
        }
        steps
    }
}

impl Stickiness {
    /// Begun minutes count as whole ones.
    fn of(details: StickinessDetails) -> Self {
        let minutes = |duration: IsoDuration| duration.0.as_secs().div_ceil(60);
        Self {
            size: minutes(details.size),
            threshold: minutes(details.threshold),
        }
    }
}

/// The version's instances as they are now. Instances in error carry nothing and don't count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub ready: u32,
    pub starting: u32,
    pub error: u32,
}

/// What one decision leaves to the next. Begin with the default, and keep it with the [`History`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    panic: Option<Panic>,
    /// What was wanted within the last three stable windows.
    steady: Peak,
    /// What was wanted within `scale_in_delay`.
    delayed: Peak,
    last_activity: Option<Duration>,
    /// When the version was last scaled from zero: averages reach no further back.
    woken: Option<Duration>,
    last_desired: Option<u32>,
    passed: Passed,
}

impl State {
    pub fn last_desired(&self) -> Option<u32> {
        self.last_desired
    }

    pub fn last_activity(&self) -> Option<Duration> {
        self.last_activity
    }

    pub fn panicking_since(&self) -> Option<Duration> {
        self.panic.map(|panic| panic.since)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Panic {
    since: Duration,
    last_breach: Duration,
    most: u32,
}

/// How many instances there should be, and what led to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    pub desired: u32,
    pub reason: Reason,
    /// Invocations in the system, averaged over the stable window.
    pub stable_average: f64,
    /// The same over the panic window.
    pub panic_average: f64,
    /// The load that one instance should carry.
    pub target: f64,
    pub stable_desired: u32,
    pub panic_desired: u32,
    pub panicking: bool,
    pub in_system: u32,
    pub queued: u32,
    pub ready: u32,
    pub starting: u32,
    pub error: u32,
}

/// What had the last word in a [`Decision`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// No instance is ready and invocations wait.
    Wake,
    /// The stable window's average.
    Stable,
    /// The most that was wanted since the panic began.
    Panic,
    /// `nvcf-step`: above the upper threshold.
    StepUp,
    /// `nvcf-step`: below the lower threshold.
    StepDown,
    /// `nvcf-step`: between the thresholds, or the last step isn't done.
    Steady,
    /// More was wanted within the scale-in delay.
    ScaleInDelay,
    /// No load, but not idle for long enough to let the last instance go.
    Hold,
    /// Idle for long enough.
    Idle,
    Min,
    Max,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Wake => "wake",
            Reason::Stable => "stable",
            Reason::Panic => "panic",
            Reason::StepUp => "step-up",
            Reason::StepDown => "step-down",
            Reason::Steady => "steady",
            Reason::ScaleInDelay => "scale-in-delay",
            Reason::Hold => "hold",
            Reason::Idle => "idle",
            Reason::Min => "min",
            Reason::Max => "max",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Decides how many instances the version should have, ready and starting together.
pub fn decide(
    settings: &Settings,
    history: &History,
    observed: Observed,
    mut state: State,
    now: Duration,
) -> (Decision, State) {
    let target = settings.target();
    let (in_system, queued) = history
        .latest()
        .map_or((0, 0), |sample| (sample.in_system, sample.queued));
    let running = observed.ready.saturating_add(observed.starting);

    if state.last_desired.is_none() && running > 0 {
        state.last_activity = Some(now);
        if running > 1 {
            state.panic = Some(Panic {
                since: now,
                last_breach: now,
                most: running,
            });
        }
    }
    let active = if in_system > 0 {
        Some(now)
    } else {
        history.last_activity()
    };
    state.last_activity = state.last_activity.max(active);
    let idle = in_system == 0
        && state
            .last_activity
            .is_none_or(|at| now.saturating_sub(at) >= settings.idle_timeout);

    let average = |window| history.average(window, now, state.woken, next_tick(settings));
    let stable_average = average(settings.stable_window);
    let panic_average = average(settings.panic_window);
    let cold = observed.ready == 0 && in_system > 0;
    let waking = if cold {
        instances(f64::from(in_system), target).max(1)
    } else {
        0
    };
    let stable_desired = instances(stable_average, target);
    let panic_desired = instances(panic_average, target);

    let (mut desired, mut reason) = if idle {
        state.panic = None;
        state.steady = Peak::default();
        (0, Reason::Idle)
    } else {
        match settings.policy {
            Policy::Concurrency => {
                let steady = settings.stable_window.saturating_mul(STEADY_WINDOWS);
                let band = STEADY_BAND * (stable_average / target).max(1.0).sqrt();
                let panicked = state.panic.map_or(0, |panic| panic.most);
                let kept = state
                    .steady
                    .raise(stable_desired.max(panicked), steady, now)
                    .min(instances(stable_average + band * target, target))
                    .max(stable_desired);
                let load = if cold {
                    panic_average.max(f64::from(in_system))
                } else {
                    panic_average
                };
                let carried = target * f64::from(observed.ready.max(1));
                let most = kept.max(panic_desired).max(waking);
                state.panic = panic(
                    state.panic,
                    load >= PANIC_THRESHOLD * carried,
                    most,
                    settings.stable_window,
                    now,
                );
                match state.panic {
                    Some(panic) => (panic.most, Reason::Panic),
                    None => (kept, Reason::Stable),
                }
            }
            Policy::NvcfStep(steps) => {
                state.panic = None;
                step(
                    settings,
                    steps,
                    observed,
                    stable_average,
                    &mut state.passed,
                    now,
                )
            }
        }
    };

    if cold && desired <= waking {
        (desired, reason) = (waking, Reason::Wake);
    }
    let delayed = state.delayed.raise(desired, settings.scale_in_delay, now);
    if delayed > desired {
        (desired, reason) = (delayed, Reason::ScaleInDelay);
    }
    if desired == 0 && !idle {
        (desired, reason) = (1, Reason::Hold);
    }
    if desired < settings.min {
        (desired, reason) = (settings.min, Reason::Min);
    }
    if desired > settings.max {
        (desired, reason) = (settings.max, Reason::Max);
    }

    if desired > 0 && state.last_desired == Some(0) {
        state.woken = Some(now);
    }
    state.last_desired = Some(desired);
    let decision = Decision {
        desired,
        reason,
        stable_average,
        panic_average,
        target,
        stable_desired,
        panic_desired,
        panicking: state.panic.is_some(),
        in_system,
        queued,
        ready: observed.ready,
        starting: observed.starting,
        error: observed.error,
    };
    (decision, state)
}

/// When to decide again if nothing happens before.
pub fn next_tick(settings: &Settings) -> Duration {
    (settings.panic_window / 6).clamp(Duration::from_millis(50), Duration::from_secs(2))
}

/// What one of a deployment's specifications may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub min: u32,
    /// Wins over `min`.
    pub max: u32,
    /// Its instances fail: it is no capacity, as far as is known.
    pub failed: bool,
}

/// Spreads instances over specifications: first every minimum, then the rest in order, over those that
/// failed last. What one that failed has for its minimum counts only where the others are full. What
/// doesn't fit is dropped.
pub fn spread(desired: u32, shares: &[Share]) -> Vec<u32> {
    let mut counts: Vec<u32> = shares.iter().map(|s| s.min.min(s.max)).collect();
    let mut rest = desired;
    for failed in [false, true] {
        let these = || shares.iter().map(move |s| s.failed == failed);
        let minimum = counts.iter().zip(these()).filter(|(_, this)| *this);
        let minimum = minimum.fold(0_u32, |sum, (&count, _)| sum.saturating_add(count));
        rest = rest.saturating_sub(minimum);
        for ((count, share), this) in counts.iter_mut().zip(shares).zip(these()) {
            if this {
                let more = rest.min(share.max - *count);
                *count += more;
                rest -= more;
            }
        }
    }
    counts
}

fn instances(load: f64, target: f64) -> u32 {
    (load / target - ROUNDING).ceil() as u32
}

fn panic(
    before: Option<Panic>,
    breach: bool,
    most: u32,
    stable_window: Duration,
    now: Duration,
) -> Option<Panic> {
    let mut panic = match before {
        Some(panic) => panic,
        None if breach => Panic {
            since: now,
            last_breach: now,
            most,
        },
        None => return None,
    };
    if breach {
        panic.last_breach = now;
    } else if now.saturating_sub(panic.last_breach) >= stable_window {
        return None;
    }
    panic.most = panic.most.max(most);
    Some(panic)
}

fn step(
    settings: &Settings,
    steps: Steps,
    observed: Observed,
    average: f64,
    passed: &mut Passed,
    now: Duration,
) -> (u32, Reason) {
    let running = observed.ready.saturating_add(observed.starting);
    let count = f64::from(running.max(1));
    let utilization = 100.0 * average / (count * settings.slots());
    if running != passed.of {
        *passed = Passed {
            of: running,
            ..Passed::default()
        };
    }
    let (above, below) = (
        utilization > steps.up_threshold,
        utilization < steps.down_threshold,
    );
    let up = passed.up.stuck(above, steps.up_stickiness, now);
    let down = passed.down.stuck(below, steps.down_stickiness, now);
    if running == 0 {
        (0, Reason::Steady)
    } else if up && observed.starting == 0 {
        let up = (count * steps.up_factor - ROUNDING).ceil() as u32;
        (up.max(running), Reason::StepUp)
    } else if down && !up {
        let down = (count * steps.down_factor + ROUNDING).floor() as u32;
        (down.clamp(1, running), Reason::StepDown)
    } else {
        (running, Reason::Steady)
    }
}

/// The minutes in which a threshold was passed, with one number of instances.
#[derive(Clone, Debug, Default, PartialEq)]
struct Passed {
    of: u32,
    up: Minutes,
    down: Minutes,
}

/// Minutes that ended beyond a threshold, oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
struct Minutes {
    ended: VecDeque<u64>,
    /// The minute of the last decision, and how it stood then.
    last: (u64, bool),
}

impl Minutes {
    /// Whether the threshold was passed for long enough; without stickiness, whether it is now.
    fn stuck(&mut self, passed: bool, stickiness: Option<Stickiness>, now: Duration) -> bool {
        let Some(Stickiness { size, threshold }) = stickiness else {
            *self = Self::default();
            return passed;
        };
        let this = now.as_secs() / 60;
        let (minute, stood) = std::mem::replace(&mut self.last, (this, passed));
        if stood && minute != this {
            self.ended.push_back(minute);
        }
        while self
            .ended
            .front()
            .is_some_and(|minute| this.saturating_sub(*minute) > size)
        {
            self.ended.pop_front();
        }
        self.ended.len() as u64 >= threshold.max(1)
    }
}

/// The largest value within a span of time that moves on.
///
/// Time is cut into [`Peak::CUTS`] pieces for each span, so that it stays small whatever the number of
/// decisions; a value is kept for the span and at most one piece more.
#[derive(Clone, Debug, Default, PartialEq)]
struct Peak {
    /// Values that nothing later exceeds, each with the piece of time that it was last seen in.
    falling: VecDeque<(u128, u32)>,
    piece: Duration,
}

impl Peak {
    const CUTS: u32 = 64;

    /// Adds a value and returns the largest within the span.
    fn raise(&mut self, value: u32, span: Duration, now: Duration) -> u32 {
        let piece = span / Self::CUTS;
        if piece != self.piece {
            self.falling.clear();
            self.piece = piece;
        }
        if piece.is_zero() {
            return value;
        }
        let this = now.as_nanos() / piece.as_nanos();
        while self.falling.back().is_some_and(|&(_, old)| old <= value) {
            self.falling.pop_back();
        }
        // A larger value of the same piece outlives this one.
        if self.falling.back().is_none_or(|&(at, _)| at < this) {
            self.falling.push_back((this, value));
        }
        while self
            .falling
            .front()
            .is_some_and(|&(at, _)| this.saturating_sub(at) > u128::from(Self::CUTS))
        {
            self.falling.pop_front();
        }
        self.falling.front().map_or(value, |&(_, most)| most)
    }
}
