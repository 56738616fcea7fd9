//! What a replay came to: the one source of its table, its JSON and its plot.

use std::path::Path;

use serde::Serialize;

use super::buckets::{Bucket, buckets};
use super::trace::Format;
use super::watch::{Count, Depth, Watched, cold_starts, instance_seconds};
use super::{Outcome, ReplayArgs};
use crate::tally::{Counted, Quantiles, Tally};

/// Names every key that [`Summary`] has; a test compares them.
pub(super) const JSON_HELP: &str = "\
What --json writes: one object. Seconds are the run's, not the trace's, and
`at` is in seconds after the first request.

  trace, format         the file's name; azure or mooncake
  speed                 as given
  settings              the other flags as given, so in the trace's time:
                        startDelaySeconds, minInstances, maxInstances,
                        maxRequestConcurrency, targetUtilization,
                        stableWindowSeconds, panicWindowSeconds,
                        scaleInDelaySeconds, idleTimeoutSeconds,
                        queueMaxRequests, prefillMilliseconds and
                        decodeMilliseconds (for each token)
  requests              how many were sent
  answered, errors      how many by status, and by cause where no whole answer
                        came
  waitMilliseconds      p50, p90, p99, max of latency less service time, of
                        answers of 200; null where there were none
  waitTraceMilliseconds the same in the trace's time, so times speed
  instancesStarted, coldStarts
                        all, and those from no instance to one
  instanceSeconds, leastInstanceSeconds, workInstanceSeconds
                        used; the least possible where no request waits; the
                        least whatever waits, service times by slots
  ratio, workRatio      used to each of these two; null where no instance was
                        seen
  waitsFlatter          whether p99 of the waits is more than a tenth of the
                        mean service time: waiting packs requests closer, so
                        that ratio is lower than it would be without
  samplesMissed         looks at the instances and the queue that failed
  instances             each look: at, starting, ready, draining, error
  queue                 each look: at, depth (invocations that wait)
  bucketSeconds         the width of each bucket
  buckets               requests by the time they came due: at (its start),
                        arrivals, failed (not answered 200), waitMilliseconds
                        (as above)";

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    pub(super) trace: String,
    pub(super) format: Format,
    pub(super) speed: f64,
    pub(super) settings: Settings,
    #[serde(flatten)]
    pub(super) counted: Counted,
    pub(super) wait_milliseconds: Option<Quantiles>,
    pub(super) wait_trace_milliseconds: Option<Quantiles>,
    pub(super) instances_started: usize,
    /// Rises from no instance to one.
    pub(super) cold_starts: usize,
    pub(super) instance_seconds: f64,
    pub(super) least_instance_seconds: f64,
    /// All service times divided by slots: instances that were always full
    /// and started in no time.
    pub(super) work_instance_seconds: f64,
    pub(super) ratio: Option<f64>,
    pub(super) work_ratio: Option<f64>,
    pub(super) waits_flatter: bool,
    pub(super) samples_missed: u64,
    pub(super) instances: Vec<Count>,
    pub(super) queue: Vec<Depth>,
    pub(super) bucket_seconds: f64,
    pub(super) buckets: Vec<Bucket>,
}

/// The flags, in the trace's time.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Settings {
    pub(super) start_delay_seconds: f64,
    pub(super) min_instances: u32,
    pub(super) max_instances: u32,
    pub(super) max_request_concurrency: u32,
    target_utilization: f64,
    stable_window_seconds: f64,
    panic_window_seconds: f64,
    scale_in_delay_seconds: f64,
    idle_timeout_seconds: f64,
    queue_max_requests: u32,
    prefill_milliseconds: f64,
    decode_milliseconds: f64,
}

impl Settings {
    pub(super) fn of(args: &ReplayArgs) -> Self {
        Self {
            start_delay_seconds: args.start_delay.as_secs_f64(),
            min_instances: args.min_instances,
            max_instances: args.max_instances,
            max_request_concurrency: args.max_request_concurrency,
            target_utilization: args.target_utilization,
            stable_window_seconds: args.stable_window.as_secs_f64(),
            panic_window_seconds: args.panic_window.as_secs_f64(),
            scale_in_delay_seconds: args.scale_in_delay.as_secs_f64(),
            idle_timeout_seconds: args.idle_timeout.as_secs_f64(),
            queue_max_requests: args.queue,
            prefill_milliseconds: args.prefill_ms,
            decode_milliseconds: args.decode_ms,
        }
    }
}

/// A wait is, from this part of the mean service time on.
const CONSIDERABLE: f64 = 0.1;

/// What knowing the trace beforehand would have cost, in instance-seconds.
pub(super) struct Bounds {
    pub(super) least: f64,
    pub(super) work: f64,
}

pub(super) fn summarize(
    args: &ReplayArgs,
    format: Format,
    outcomes: &[Outcome],
    watched: Watched,
    bounds: Bounds,
) -> anyhow::Result<Summary> {
    let mut tally = Tally::new()?;
    for outcome in outcomes {
        tally.add(&outcome.answer, outcome.wait);
    }
    let counted = tally.count();
    let used = instance_seconds(&watched.counts);
    // Nothing seen is nothing to compare.
    let to = |bound: f64| (used > 0.0 && bound > 0.0).then(|| used / bound);
    let (bucket_seconds, buckets) = buckets(outcomes)?;
    let service = bounds.work * f64::from(args.max_request_concurrency) * 1e3;
    let considerable = CONSIDERABLE * service / outcomes.len() as f64;
    Ok(Summary {
        trace: file_name(&args.trace),
        format,
        speed: args.speed,
        settings: Settings::of(args),
        wait_milliseconds: counted.times,
        wait_trace_milliseconds: counted.times.map(|waits| waits.times(args.speed)),
        waits_flatter: counted.times.is_some_and(|waits| waits.p99 > considerable),
        counted,
        instances_started: watched.ids.len(),
        cold_starts: cold_starts(&watched.counts),
        instance_seconds: used,
        least_instance_seconds: bounds.least,
        work_instance_seconds: bounds.work,
        ratio: to(bounds.least),
        work_ratio: to(bounds.work),
        samples_missed: watched.missed,
        instances: watched.counts,
        queue: watched.queue,
        bucket_seconds,
        buckets,
    })
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use clap::{CommandFactory, Parser};
    use serde_json::Value;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        replay: ReplayArgs,
    }

    pub(in super::super) fn count(
        at: f64,
        starting: usize,
        ready: usize,
        draining: usize,
    ) -> Count {
        Count {
            at,
            starting,
            ready,
            draining,
            error: 0,
        }
    }

    /// With at most two instances, and ten instance-seconds at least.
    pub(in super::super) fn summary(
        trace: &str,
        outcomes: &[Outcome],
        watched: Watched,
    ) -> Summary {
        let flags = ["replay", trace, "--speed", "20", "--max-instances", "2"];
        let args = Cli::parse_from(flags).replay;
        let bounds = Bounds {
            least: 10.0,
            work: 5.0,
        };
        summarize(&args, Format::Azure, outcomes, watched, bounds).unwrap()
    }

    fn json() -> Value {
        let outcomes = [Outcome {
            due: Duration::from_secs(1),
            answer: Ok("200".into()),
            wait: Duration::from_millis(8),
        }];
        let watched = Watched {
            counts: vec![count(0.0, 1, 0, 0), count(20.0, 0, 0, 0)],
            queue: vec![Depth { at: 0.5, depth: 3 }],
            ..Watched::default()
        };
        serde_json::to_value(summary("some/trace.csv", &outcomes, watched)).unwrap()
    }

    #[test]
    fn the_json_has_settings_series_and_buckets() {
        let json = json();
        assert_eq!(json["trace"], "trace.csv");
        assert_eq!(json["format"], "azure");
        assert_eq!(json["speed"], 20.0);
        let settings = &json["settings"];
        assert_eq!(settings["startDelaySeconds"], 10.0);
        assert_eq!(settings["maxInstances"], 2);
        assert_eq!(settings["stableWindowSeconds"], 60.0);
        assert_eq!(settings["panicWindowSeconds"], 6.0);
        assert_eq!(settings["queueMaxRequests"], 100_000);
        assert_eq!(json["ratio"], 2.0);
        assert_eq!(json["workRatio"], 4.0);
        // The one request has 20 s of service: half of ten instance-seconds
        // by four slots.
        assert_eq!(json["waitsFlatter"], false);
        let wait = json["waitMilliseconds"]["p50"].as_f64().unwrap();
        let in_trace = json["waitTraceMilliseconds"]["p50"].as_f64().unwrap();
        assert_eq!(in_trace, wait * 20.0);
        assert_eq!(json["instances"][0]["starting"], 1);
        assert_eq!(
            json["queue"],
            serde_json::json!([{ "at": 0.5, "depth": 3 }])
        );
        assert_eq!(json["bucketSeconds"], 0.1);
        let buckets = json["buckets"].as_array().unwrap();
        assert_eq!(buckets.len(), 11);
        assert_eq!(buckets[0]["arrivals"], 0);
        assert_eq!(buckets[0]["waitMilliseconds"], Value::Null);
        assert_eq!(buckets[10]["arrivals"], 1);
        let p99 = buckets[10]["waitMilliseconds"]["p99"].as_f64().unwrap();
        assert!((7.9..8.1).contains(&p99), "{p99}");
    }

    #[test]
    fn the_help_names_every_key_of_the_json() {
        let help = Cli::command().render_long_help().to_string();
        let (_, help) = help.split_once("What --json writes").unwrap();
        let words: BTreeSet<&str> = help.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        let mut places = vec![json()];
        while let Some(place) = places.pop() {
            match place {
                Value::Array(values) => places.extend(values),
                Value::Object(fields) => {
                    for (key, value) in fields {
                        // A status is no key.
                        let named = key == "200" || words.contains(key.as_str());
                        assert!(named, "--help says nothing of {key}");
                        places.push(value);
                    }
                }
                _ => {}
            }
        }
    }
}
