//! The summary as a person reads it.

use comfy_table::Table;

use super::summary::Summary;
use super::watch::Count;
use crate::tally::times_row;

/// Columns of the chart.
const WIDTH: usize = 64;

/// Where requests waited much.
const NOTE: &str = "note: p99 of the waits is more than a tenth of the mean service time; \
    waiting packs requests closer, so the first ratio flatters: see the second\n";

pub(super) fn render(summary: &Summary) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    summary.counted.rows(&mut table);
    let speed = summary.speed;
    let in_trace = format!("wait in the trace's time (times {speed})");
    times_row(&mut table, "wait as measured", summary.wait_milliseconds);
    times_row(&mut table, &in_trace, summary.wait_trace_milliseconds);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("instances started", summary.instances_started.to_string());
    row("cold starts (from none)", summary.cold_starts.to_string());
    row(
        "instance-seconds",
        format!("{:.1}", summary.instance_seconds),
    );
    let least = summary.least_instance_seconds;
    row("least where nothing waits", format!("{least:.1}"));
    let work = summary.work_instance_seconds;
    row(
        "floor whatever waits (service times / slots)",
        format!("{work:.1}"),
    );
    let ratio = |ratio: Option<f64>| {
        let unknown = || "unknown: no instance was seen".to_owned();
        ratio.map_or_else(unknown, |ratio| format!("{ratio:.2}"))
    };
    row("ratio to least where nothing waits", ratio(summary.ratio));
    row("ratio to floor whatever waits", ratio(summary.work_ratio));
    if summary.samples_missed > 0 {
        row(
            "looks at instances and queue that failed",
            summary.samples_missed.to_string(),
        );
    }
    let note = if summary.waits_flatter { NOTE } else { "" };
    format!("{}\n{note}{}", table.trim_fmt(), chart(&summary.instances))
}

/// Instances over time, the most of each column: ready █, starting ▒,
/// draining ░.
fn chart(counts: &[Count]) -> String {
    let end = counts.last().map_or(0.0, |count| count.at);
    let mut columns = [Count::default(); WIDTH];
    let column_at = |at: f64| {
        let place = if end > 0.0 { at / end } else { 0.0 };
        ((place * WIDTH as f64) as usize).min(WIDTH - 1)
    };
    for (place, count) in counts.iter().enumerate() {
        // A count holds until the next look.
        let until = counts.get(place + 1).unwrap_or(count).at;
        for column in &mut columns[column_at(count.at)..=column_at(until)] {
            if count.running() > column.running() {
                *column = *count;
            }
        }
    }
    let most = columns.iter().map(Count::running).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let mut chart = String::from("\ninstances (█ ready ▒ starting ░ draining)\n");
    for height in (1..=most).rev() {
        let line: String = columns
            .iter()
            .map(|column| {
                if height <= column.ready {
                    '█'
                } else if height <= column.ready + column.starting {
                    '▒'
                } else if height <= column.running() {
                    '░'
                } else {
                    ' '
                }
            })
            .collect();
        chart.push_str(&format!("{height:>4} {}\n", line.trim_end()));
    }
    chart.push_str(&format!(
        "     0 s{:>1$}\n",
        format!("{end:.0} s"),
        WIDTH - 3
    ));
    chart
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Outcome;
    use super::super::summary::tests::{count, summary};
    use super::super::watch::Watched;
    use super::*;

    /// Of one request with a service time of 20 s, at 20 times the speed.
    fn waited(milliseconds: u64) -> String {
        let outcome = Outcome {
            due: Duration::ZERO,
            answer: Ok("200".into()),
            wait: Duration::from_millis(milliseconds),
        };
        let watched = Watched {
            counts: vec![count(0.0, 1, 0, 0), count(20.0, 0, 0, 0)],
            ..Watched::default()
        };
        render(&summary("trace.csv", &[outcome], watched))
    }

    #[test]
    fn waits_and_ratios_say_what_they_are() {
        let text = waited(1000);
        let row = |name: &str| {
            let line = text.lines().find(|line| line.trim().starts_with(name));
            let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
            line.split("  ").last().unwrap().trim().to_owned()
        };
        let measured = row("wait as measured");
        assert!(measured.starts_with("1000.4 / "), "{measured}");
        let in_trace = row("wait in the trace's time (times 20)");
        assert!(in_trace.starts_with("20008.9 / "), "{in_trace}");
        assert_eq!(row("ratio to least where nothing waits"), "2.00");
        assert_eq!(row("ratio to floor whatever waits"), "4.00");
    }

    #[test]
    fn where_waits_are_long_the_ratio_is_said_to_flatter() {
        assert!(!waited(1900).contains("flatters"));
        assert!(waited(2100).contains("flatters"));
    }

    #[test]
    fn the_chart_stacks_ready_starting_and_draining() {
        let counts = [
            Count {
                at: 0.0,
                starting: 1,
                ..Count::default()
            },
            Count {
                at: 10.0,
                ready: 1,
                starting: 1,
                draining: 1,
                ..Count::default()
            },
        ];
        let chart = chart(&counts);
        let rows: Vec<&str> = chart.lines().skip(2).collect();
        assert!(rows[0].starts_with("   3 ") && rows[0].ends_with('░'));
        assert!(rows[1].ends_with('▒'));
        assert!(rows[2].starts_with("   1 ▒") && rows[2].ends_with('█'));
        assert!(rows[3].ends_with("10 s"));
    }

    #[test]
    fn no_instances_make_no_chart() {
        assert_eq!(chart(&[]), "");
        assert_eq!(chart(&[Count::default()]), "");
    }
}
