//! Arrivals and waits over time: the requests that came due in each of some
//! hundred equal stretches of a replay.

use serde::Serialize;

use super::Outcome;
use super::watch::SAMPLE_EVERY;
use crate::tally::{Quantiles, Tally};

/// More are too narrow to see, and hold too few requests for quantiles.
const MOST: f64 = 100.0;

/// What came due in one stretch of time.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Bucket {
    /// Its start, in seconds after the first request.
    pub(super) at: f64,
    pub(super) arrivals: u64,
    /// Those of them that were not answered 200.
    pub(super) failed: u64,
    /// Of those that were answered 200.
    pub(super) wait_milliseconds: Option<Quantiles>,
}

/// The width of each in seconds, and all from the first request to the last.
pub(super) fn buckets(outcomes: &[Outcome]) -> anyhow::Result<(f64, Vec<Bucket>)> {
    let due = |outcome: &Outcome| outcome.due.as_secs_f64();
    let last = outcomes.iter().map(due).fold(0.0, f64::max);
    let width = round_step(last, MOST).max(SAMPLE_EVERY.as_secs_f64());
    let place = |at: f64| (at / width) as usize;
    let mut tallies = Vec::new();
    for _ in 0..=place(last) {
        tallies.push(Tally::new()?);
    }
    for outcome in outcomes {
        tallies[place(due(outcome))].add(&outcome.answer, outcome.wait);
    }
    let bucket = |(place, tally): (usize, Tally)| {
        let counted = tally.count();
        Bucket {
            at: place as f64 * width,
            arrivals: counted.requests,
            failed: counted.failed(),
            wait_milliseconds: counted.times,
        }
    };
    Ok((width, tallies.into_iter().enumerate().map(bucket).collect()))
}

/// The least of 1, 2 and 5 times a power of ten that divides `span` into at
/// most so many steps; 0 for no span.
pub(super) fn round_step(span: f64, at_most: f64) -> f64 {
    if span <= 0.0 {
        return 0.0;
    }
    let least = span / at_most;
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    // A quotient that is a hair too large is no reason for a wider step.
    let fits = |step: &f64| *step >= least * (1.0 - 1e-9);
    steps.into_iter().find(fits).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn outcome(due_ms: u64, answer: Result<&str, &str>, wait_ms: u64) -> Outcome {
        Outcome {
            due: Duration::from_millis(due_ms),
            answer: answer.map(str::to_owned).map_err(str::to_owned),
            wait: Duration::from_millis(wait_ms),
        }
    }

    #[test]
    fn requests_are_counted_where_they_came_due() {
        let outcomes = [
            outcome(0, Ok("200"), 8),
            outcome(199, Ok("503 no-capacity"), 4),
            outcome(20_000, Ok("200"), 1000),
            outcome(400, Err("broken pipe"), 3),
        ];
        let (width, buckets) = buckets(&outcomes).unwrap();
        assert_eq!(width, 0.2);
        assert_eq!(buckets.len(), 101);
        assert_eq!((buckets[0].arrivals, buckets[0].failed), (2, 1));
        let waits = buckets[0].wait_milliseconds.unwrap();
        assert_eq!(waits.p50.round(), 8.0);
        assert_eq!(waits.max.round(), 8.0);
        assert_eq!((buckets[2].arrivals, buckets[2].failed), (1, 1));
        assert_eq!(buckets[2].wait_milliseconds, None);
        assert_eq!((buckets[3].arrivals, buckets[3].failed), (0, 0));
        assert_eq!(buckets[100].at, 20.0);
        assert_eq!(buckets[100].arrivals, 1);
    }

    #[test]
    fn one_moment_is_one_bucket() {
        let (width, buckets) = buckets(&[outcome(0, Ok("200"), 0)]).unwrap();
        assert_eq!((width, buckets.len()), (0.1, 1));
    }

    #[test]
    fn steps_are_round() {
        let same = |one: f64, other: f64| assert!((one - other).abs() < 1e-9, "{one} {other}");
        same(round_step(100.0, 100.0), 1.0);
        same(round_step(101.0, 100.0), 2.0);
        same(round_step(3.0, 5.0), 1.0);
        same(round_step(0.3, 10.0), 0.05);
        same(round_step(7000.0, 8.0), 1000.0);
        same(round_step(0.0, 8.0), 0.0);
    }
}
