//! What a version's load has been: enough of it for exact averages over both windows, and no more.

use std::{collections::VecDeque, time::Duration};

use super::Settings;

/// A version's load at one moment, summed over all proxies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    pub at: Duration,
    /// The integral of `in_system` over time, in seconds, since any fixed moment.
    pub area: f64,
    /// Invocations that ever arrived.
    pub arrivals: u64,
    /// Running and queued.
    pub in_system: u32,
    pub queued: u32,
}

impl Sample {
    /// Of two proxies together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            at: self.at.max(other.at),
            area: self.area + other.area,
            arrivals: self.arrivals.saturating_add(other.arrivals),
            in_system: self.in_system.saturating_add(other.in_system),
            queued: self.queued.saturating_add(other.queued),
        }
    }
}

/// The samples of the last stable window, and finer ones of the last panic window.
///
/// An average needs the area at its window's two ends only, so samples between them may be dropped: it
/// is exact where a sample lies at the window's start, and interpolates between two neighbours, at most
/// [`Track::CUTS`]th of the window apart, elsewhere.
#[derive(Clone, Debug)]
pub struct History {
    stable: Track,
    panic: Track,
    latest: Option<Sample>,
    /// Grows only, also where the samples' own area starts anew.
    area: f64,
    /// When the load began after at least a stable window without any.
    began: Duration,
    last_activity: Option<Duration>,
}

impl History {
    pub fn new(settings: &Settings) -> Self {
        History {
            stable: Track::new(settings.stable_window),
            panic: Track::new(settings.panic_window),
            latest: None,
            area: 0.0,
            began: Duration::ZERO,
            last_activity: None,
        }
    }

    /// Takes up windows that changed; what is known of the load stays.
    pub fn fit(&mut self, settings: &Settings) {
        self.stable.window = settings.stable_window;
        self.panic.window = settings.panic_window;
    }

    /// Adds a sample. One that is older than the last is ignored.
    pub fn push(&mut self, sample: Sample) {
        let Some(last) = self.latest else {
            self.latest = Some(sample);
            self.began = sample.at;
            if sample.in_system > 0 {
                self.last_activity = Some(sample.at);
            }
            self.record(sample.at);
            return;
        };
        let Some(passed) = sample.at.checked_sub(last.at) else {
            return;
        };
        let grown = sample.area - last.area;
        let grown = if grown.is_finite() && grown >= 0.0 {
            grown
        } else {
            // The sum began anew, as when a proxy has gone.
            f64::from(sample.in_system) * passed.as_secs_f64()
        };
        if sample.in_system > 0 || sample.arrivals > last.arrivals || grown > 0.0 {
            let quiet = last
                .at
                .saturating_sub(self.last_activity.unwrap_or(self.began));
            let was_idle = last.in_system == 0
                && (self.last_activity.is_none() || quiet >= self.stable.window);
            if was_idle {
                let since = if sample.in_system == 0 {
                    passed
                } else {
                    let seconds = grown / f64::from(sample.in_system);
                    Duration::try_from_secs_f64(seconds)
                        .unwrap_or(passed)
                        .min(passed)
                };
                self.began = sample.at - since;
                self.stable.points.clear();
                self.panic.points.clear();
                self.record(self.began);
            }
            self.last_activity = Some(sample.at);
        }
        self.area = (self.area + grown).min(f64::MAX);
        self.latest = Some(sample);
        self.record(sample.at);
    }

    pub fn latest(&self) -> Option<&Sample> {
        self.latest.as_ref()
    }

    /// When there last was an invocation in the system, or one that came and went between two samples.
    pub fn last_activity(&self) -> Option<Duration> {
        self.last_activity
    }

    /// How many samples are kept.
    pub fn len(&self) -> usize {
        self.stable.points.len() + self.panic.points.len()
    }

    pub fn is_empty(&self) -> bool {
        self.latest.is_none()
    }

    /// The average number in the system over the window that ends now.
    ///
    /// The window begins no earlier than the load, nor than `from`. The time is taken as no shorter than
    /// `least`, or a short burst at the beginning would count as a load.
    pub fn average(
        &self,
        window: Duration,
        now: Duration,
        from: Option<Duration>,
        least: Duration,
    ) -> f64 {
        let Some(latest) = self.latest else {
            return 0.0;
        };
        let track = if window <= self.panic.window {
            &self.panic
        } else {
            &self.stable
        };
        let Some(&(oldest, _)) = track.points.front() else {
            return 0.0;
        };
        let now = now.max(latest.at);
        let start = now
            .saturating_sub(window)
            .max(self.began)
            .max(oldest)
            .max(from.unwrap_or_default())
            .min(now);
        let area = self.area_at(track, now, latest) - self.area_at(track, start, latest);
        let time = (now - start).max(least.min(window)).as_secs_f64();
        if time > 0.0 {
            (area / time).max(0.0)
        } else {
            f64::from(latest.in_system)
        }
    }

    fn area_at(&self, track: &Track, at: Duration, latest: Sample) -> f64 {
        match at.checked_sub(latest.at) {
            Some(since) => self.area + f64::from(latest.in_system) * since.as_secs_f64(),
            None => track.area_at(at),
        }
    }

    fn record(&mut self, at: Duration) {
        self.stable.record(at, self.area);
        self.panic.record(at, self.area);
    }
}

/// The cumulative area at some moments of one window, the newest always among them.
#[derive(Clone, Debug)]
struct Track {
    window: Duration,
    points: VecDeque<(Duration, f64)>,
}

impl Track {
    /// Points of one window; a few more are kept around its ends.
    const CUTS: u32 = 90;

    fn new(window: Duration) -> Self {
        Track {
            window,
            points: VecDeque::new(),
        }
    }

    fn record(&mut self, at: Duration, area: f64) {
        // The newest is only kept for good if it is far enough from the one before.
        if let Some(&(before, _)) = self.points.iter().nth_back(1)
            && let Some(&(newest, _)) = self.points.back()
            && (newest - before < self.window / Self::CUTS || newest == at)
        {
            self.points.pop_back();
        }
        self.points.push_back((at, area));
        let start = at.saturating_sub(self.window);
        // One point at or before the window's start, to interpolate from.
        while self.points.get(1).is_some_and(|&(next, _)| next <= start) {
            self.points.pop_front();
        }
        while self.points.len() > Self::CUTS as usize + 5 {
            self.points.pop_front();
        }
    }

    fn area_at(&self, at: Duration) -> f64 {
        let after = self.points.partition_point(|&(point, _)| point <= at);
        match (after.checked_sub(1), self.points.get(after)) {
            (Some(before), Some(&(end, end_area))) => {
                let (start, area) = self.points[before];
                let share = (at - start).as_secs_f64() / (end - start).as_secs_f64();
                area + (end_area - area) * share
            }
            (None, Some(&(_, area))) => area,
            (_, None) => self.points.back().map_or(0.0, |&(_, area)| area),
        }
    }
}
