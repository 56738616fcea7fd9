//! Looks at the version's instances and at its queue while a replay runs.

use std::collections::HashSet;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior};

use super::progress::Progress;
use crate::client::{Client, Version};

pub(super) const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// How many instances there were at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Count {
    /// Seconds after the first request.
    pub(super) at: f64,
    pub(super) starting: usize,
    pub(super) ready: usize,
    pub(super) draining: usize,
    pub(super) error: usize,
}

impl Count {
    /// Those that use a machine.
    pub(super) fn running(&self) -> usize {
        self.starting + self.ready + self.draining
    }
}

/// How many invocations waited at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Depth {
    /// Seconds after the first request.
    pub(super) at: f64,
    pub(super) depth: u64,
}

#[derive(Debug, Default)]
pub(super) struct Watched {
    pub(super) counts: Vec<Count>,
    pub(super) queue: Vec<Depth>,
    pub(super) ids: HashSet<String>,
    /// Looks that failed.
    pub(super) missed: u64,
}

/// Looks until it is told to stop, and then once more.
pub(super) async fn watch(
    client: Client,
    version: Version,
    start: Instant,
    progress: Progress,
    mut stopped: oneshot::Receiver<()>,
) -> Watched {
    let mut watched = Watched::default();
    let mut ticks = tokio::time::interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let last = tokio::select! {
            _ = ticks.tick() => false,
            _ = &mut stopped => true,
        };
        let (instances, depth) = tokio::join!(
            client.instances(&version.version),
            client.queue_depth(&version)
        );
        let at = start.elapsed().as_secs_f64();
        watched.missed += u64::from(instances.is_err() || depth.is_err());
        if let Ok(instances) = instances {
            let count = |state: &str| instances.iter().filter(|i| i.state == state).count();
            watched.counts.push(Count {
                at,
                starting: count("starting"),
                ready: count("ready"),
                draining: count("draining"),
                error: count("error"),
            });
            watched.ids.extend(instances.into_iter().map(|i| i.id));
        }
        if let Ok(depth) = depth {
            watched.queue.push(Depth { at, depth });
        }
        progress.seen(
            watched.counts.last().copied().unwrap_or_default(),
            watched.queue.last().copied().unwrap_or_default(),
        );
        if last {
            return watched;
        }
    }
}

/// Each count holds until the next look.
pub(super) fn instance_seconds(counts: &[Count]) -> f64 {
    let held = |pair: &[Count]| pair[0].running() as f64 * (pair[1].at - pair[0].at);
    // `sum` of nothing is -0.
    counts
        .windows(2)
        .map(held)
        .fold(0.0, |sum, held| sum + held)
}

pub(super) fn cold_starts(counts: &[Count]) -> usize {
    let mut before = 0;
    let mut starts = 0;
    for count in counts {
        starts += usize::from(before == 0 && count.running() > 0);
        before = count.running();
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(at: f64, starting: usize, ready: usize, draining: usize) -> Count {
        Count {
            at,
            starting,
            ready,
            draining,
            error: 1,
        }
    }

    #[test]
    fn instance_seconds_integrate_what_runs() {
        let counts = [
            count(0.0, 0, 0, 0),
            count(1.0, 1, 0, 0),
            count(3.0, 1, 1, 1),
            count(3.5, 0, 0, 0),
            count(4.0, 0, 1, 0),
            count(5.0, 0, 0, 0),
        ];
        assert_eq!(instance_seconds(&counts), 2.0 + 1.5 + 1.0);
        assert_eq!(cold_starts(&counts), 2);
        assert_eq!(instance_seconds(&[]), 0.0);
    }
}
