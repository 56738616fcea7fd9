//! What came of a run's requests: answers by status, and how long they took.

use std::collections::BTreeMap;
use std::time::Duration;

use comfy_table::Table;
use hdrhistogram::Histogram;
use serde::Serialize;

/// A whole answer's status, with Weir's error code where there is one; or why there was no whole answer.
pub(crate) type Answered = Result<String, String>;

pub(crate) struct Tally {
    answered: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    /// Of the answers of 200, in microseconds: refusals are quick, and would
    /// flatter.
    times: Histogram<u64>,
}

/// What a [`Tally`] came to, as `--json` writes it.
#[derive(Debug, Serialize)]
pub(crate) struct Counted {
    pub(crate) requests: u64,
    /// By status.
    pub(crate) answered: BTreeMap<String, u64>,
    /// By cause.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Of the answers of 200; `None` where there were none.
    #[serde(skip)]
    pub(crate) times: Option<Quantiles>,
}

/// In milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Tally {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            answered: BTreeMap::new(),
            errors: BTreeMap::new(),
            times: Histogram::new(3)?,
        })
    }

    pub(crate) fn add(&mut self, answer: &Answered, took: Duration) {
        let count = match answer {
            Ok(status) => {
                if status == "200" {
                    // An auto-resizing histogram takes any number.
                    _ = self.times.record(took.as_micros() as u64);
                }
                self.answered.entry(status.clone())
            }
            Err(cause) => self.errors.entry(cause.clone()),
        };
        *count.or_insert(0) += 1;
    }

    pub(crate) fn count(self) -> Counted {
        let ms = |quantile| self.times.value_at_quantile(quantile) as f64 / 1e3;
        let times = (!self.times.is_empty()).then(|| Quantiles {
            p50: ms(0.5),
            p90: ms(0.9),
            p99: ms(0.99),
            max: self.times.max() as f64 / 1e3,
        });
        Counted {
            requests: self.answered.values().chain(self.errors.values()).sum(),
            answered: self.answered,
            errors: self.errors,
            times,
        }
    }
}

impl Quantiles {
    pub(crate) fn times(self, factor: f64) -> Self {
        Self {
            p50: self.p50 * factor,
            p90: self.p90 * factor,
            p99: self.p99 * factor,
            max: self.max * factor,
        }
    }
}

impl Counted {
    pub(crate) fn good(&self) -> u64 {
        self.answered.get("200").copied().unwrap_or(0)
    }

    /// Those that were not answered 200.
    pub(crate) fn failed(&self) -> u64 {
        self.requests - self.good()
    }

    /// One row for the requests, and one for each answer.
    pub(crate) fn rows(&self, table: &mut Table) {
        let mut row = |name: String, value: String| {
            table.add_row([name, value]);
        };
        row("requests".into(), self.requests.to_string());
        for (status, count) in &self.answered {
            row(format!("answered {status}"), count.to_string());
        }
        for (cause, count) in &self.errors {
            row(format!("error: {cause}"), count.to_string());
        }
    }
}

/// One row for times of answers of 200.
pub(crate) fn times_row(table: &mut Table, name: &str, times: Option<Quantiles>) {
    let value = match times {
        Some(Quantiles { p50, p90, p99, max }) => {
            format!("{p50:.1} / {p90:.1} / {p99:.1} / {max:.1} ms")
        }
        None => "none: nothing was answered 200".into(),
    };
    table.add_row([format!("{name} p50 / p90 / p99 / max"), value]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_of_200_have_times() {
        let mut tally = Tally::new().unwrap();
        let ms = Duration::from_millis;
        tally.add(&Ok("429 queue-full".into()), ms(1));
        tally.add(&Ok("201".into()), ms(2));
        tally.add(&Err("broken pipe".into()), ms(3));
        assert_eq!(tally.count().times, None);

        let mut tally = Tally::new().unwrap();
        for _ in 0..99 {
            tally.add(&Ok("429 queue-full".into()), ms(1));
        }
        tally.add(&Ok("200".into()), ms(1000));
        let counted = tally.count();
        assert_eq!((counted.good(), counted.failed()), (1, 99));
        assert_eq!(counted.times.unwrap().p50.round(), 1000.0);
        let mut table = Table::new();
        counted.rows(&mut table);
        times_row(&mut table, "latency", counted.times);
        let text = table.trim_fmt();
        assert!(text.contains("answered 429 queue-full"), "{text}");
    }
}
