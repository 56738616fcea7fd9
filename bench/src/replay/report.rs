//! The summary as a person reads it.

use comfy_table::Table;

use super::summary::Summary;
use super::watch::Count;
use crate::tally::times_row;

/// Columns of the chart.
const WIDTH: usize = 64;

pub(super) fn render(summary: &Summary) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    summary.counted.rows(&mut table);
    times_row(&mut table, "wait", summary.wait_milliseconds);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("instances started", summary.instances_started.to_string());
    row("cold starts (from none)", summary.cold_starts.to_string());
    row(
        "instance-seconds",
        format!("{:.1}", summary.instance_seconds),
    );
    row(
        "least possible",
        format!("{:.1}", summary.least_instance_seconds),
    );
    row(
        "service times / slots",
        format!("{:.1}", summary.work_instance_seconds),
    );
    row(
        "ratio to least possible",
        summary
            .ratio
            .map_or("unknown: no instance was seen".into(), |ratio| {
                format!("{ratio:.2}")
            }),
    );
    if summary.samples_missed > 0 {
        row(
            "looks at instances and queue that failed",
            summary.samples_missed.to_string(),
        );
    }
    format!("{}\n{}", table.trim_fmt(), chart(&summary.instances))
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
    use super::*;

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
