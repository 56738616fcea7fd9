//! The plot of a replay as SVG: arrivals, instances, queue and waits over one
//! time axis.

use super::summary::Summary;
use super::watch::Count;

mod axes;
mod svg;

use axes::{Key, Look, Panel, Scale, number};
use svg::{Anchor, Svg};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 900.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 24.0;
/// Of the first panel; above it are the titles.
const TOP: f64 = 118.0;
/// From one panel's top to the next one's.
const PITCH: f64 = 190.0;
const PANEL: f64 = 146.0;

// Told apart also by those who see no red or no green (Okabe and Ito).
const BLUE: &str = "#0072b2";
const SKY: &str = "#56b4e9";
const GREEN: &str = "#009e73";
const ORANGE: &str = "#e69f00";
const RED: &str = "#d55e00";
const GREY: &str = "#a0a0a0";
const INK: &str = "#333333";

pub(super) fn draw(summary: &Summary) -> String {
    let title = format!(
        "Replay of {} at {} times its speed",
        summary.trace,
        number(summary.speed)
    );
    let mut svg = Svg::new(WIDTH, HEIGHT, &title);
    let large = "font-size=\"19\" font-weight=\"bold\" fill=\"#111111\"";
    svg.text([LEFT, 34.0], Anchor::Start, large, &title);
    let small = "font-size=\"13\" fill=\"#444444\"";
    svg.text([LEFT, 56.0], Anchor::Start, small, &came_to(summary));
    svg.text([LEFT, 75.0], Anchor::Start, small, &given(summary));

    arrivals(&mut svg, summary);
    instances(&mut svg, summary);
    queue(&mut svg, summary);
    let last = waits(&mut svg, summary);
    let axis = format!(
        "seconds after the first request (one is {} s of the trace)",
        number(summary.speed)
    );
    last.time_axis(&mut svg, &axis);
    svg.end()
}

fn came_to(summary: &Summary) -> String {
    let ratio = match summary.ratio {
        Some(ratio) => format!(
            "{ratio:.2} times the least where nothing waits ({:.1})",
            summary.least_instance_seconds
        ),
        None => "no instance was seen".into(),
    };
    format!(
        "{} requests, {} failed; {:.1} instance-seconds, {ratio}; {} instances started",
        summary.counted.requests,
        summary.counted.failed(),
        summary.instance_seconds,
        summary.instances_started,
    )
}

fn given(summary: &Summary) -> String {
    let settings = &summary.settings;
    format!(
        "{} to {} instances of {} slots; start delay {} s of the trace",
        settings.min_instances,
        settings.max_instances,
        settings.max_request_concurrency,
        number(settings.start_delay_seconds),
    )
}

/// All of them have one time axis.
fn panel(summary: &Summary, place: u32, scale: Scale) -> Panel {
    let looked = summary.instances.last().map_or(0.0, |count| count.at);
    let end = looked.max(came_until(summary));
    Panel {
        left: LEFT,
        top: TOP + PITCH * f64::from(place),
        width: WIDTH - LEFT - RIGHT,
        height: PANEL,
        end: if end > 0.0 { end } else { 1.0 },
        scale,
    }
}

/// The end of the last bucket.
fn came_until(summary: &Summary) -> f64 {
    let last = summary.buckets.last();
    last.map_or(0.0, |bucket| bucket.at + summary.bucket_seconds)
}

fn key(colour: &'static str, name: &str, look: Look) -> Key {
    Key {
        colour,
        name: name.to_owned(),
        look,
    }
}

fn most(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max)
}

fn arrivals(svg: &mut Svg, summary: &Summary) {
    let rate = |number: u64| number as f64 / summary.bucket_seconds;
    let buckets = &summary.buckets;
    let scale = Scale::linear(most(buckets.iter().map(|bucket| rate(bucket.arrivals))));
    let panel = panel(summary, 0, scale);
    svg.group("arrivals");
    panel.grid(svg, "Arrivals (requests/s)", number);
    let until = came_until(summary);
    let mut keys = vec![key(SKY, "answered 200", Look::Area)];
    let good: Vec<_> = buckets
        .iter()
        .map(|b| (b.at, (rate(b.failed), rate(b.arrivals))))
        .collect();
    panel.area(svg, SKY, &good, until);
    if summary.counted.failed() > 0 {
        let failed: Vec<_> = buckets
            .iter()
            .map(|b| (b.at, (0.0, rate(b.failed))))
            .collect();
        panel.area(svg, RED, &failed, until);
        keys.push(key(RED, "failed", Look::Area));
    }
    panel.legend(svg, &keys);
    panel.frame(svg);
    svg.end_group();
}

fn instances(svg: &mut Svg, summary: &Summary) {
    let counts = &summary.instances;
    let cap = f64::from(summary.settings.max_instances);
    let running = most(counts.iter().map(|count| count.running() as f64));
    let panel = panel(summary, 1, Scale::whole(running.max(cap)));
    svg.group("instances");
    panel.grid(svg, "Instances (number)", number);
    let of = [
        |count: &Count| count.ready,
        |count: &Count| count.starting,
        |count: &Count| count.draining,
    ];
    let states = [("ready", GREEN), ("starting", ORANGE), ("draining", GREY)];
    let mut keys = Vec::new();
    let mut below = vec![0; counts.len()];
    for ((name, colour), of) in states.into_iter().zip(of) {
        let bounds: Vec<_> = counts
            .iter()
            .zip(&mut below)
            .map(|(count, below)| {
                let low = *below;
                *below += of(count);
                (count.at, (low as f64, *below as f64))
            })
            .collect();
        panel.area(svg, colour, &bounds, panel.end);
        keys.push(key(colour, name, Look::Area));
    }
    if counts.iter().any(|count| count.error > 0) {
        let errors = key(RED, "in error", Look::Line);
        let values: Vec<_> = counts
            .iter()
            .map(|count| (count.at, Some(count.error as f64)))
            .collect();
        panel.steps(svg, &errors, &values, panel.end);
        keys.push(errors);
    }
    let at_most = key(INK, "at most", Look::Dashed);
    panel.steps(svg, &at_most, &[(0.0, Some(cap))], panel.end);
    keys.push(at_most);
    panel.legend(svg, &keys);
    panel.frame(svg);
    svg.end_group();
}

fn queue(svg: &mut Svg, summary: &Summary) {
    let depths = &summary.queue;
    let scale = Scale::whole(most(depths.iter().map(|depth| depth.depth as f64)));
    let panel = panel(summary, 2, scale);
    svg.group("queue");
    panel.grid(svg, "Queue depth (requests)", number);
    let waiting = key(BLUE, "waiting", Look::Area);
    let bounds: Vec<_> = depths
        .iter()
        .map(|depth| (depth.at, (0.0, depth.depth as f64)))
        .collect();
    panel.area(svg, BLUE, &bounds, panel.end);
    panel.legend(svg, &[waiting]);
    panel.frame(svg);
    svg.end_group();
}

fn waits(svg: &mut Svg, summary: &Summary) -> Panel {
    let waits = || summary.buckets.iter().map(|b| (b.at, b.wait_milliseconds));
    let longest = most(waits().filter_map(|(_, wait)| wait.map(|wait| wait.p99)));
    let panel = panel(summary, 3, Scale::decades(1.0, longest));
    svg.group("waits");
    let head = "Wait, by the time of arrival (logarithmic, from 1 ms)";
    panel.grid(svg, head, |ms| {
        if ms >= 1e3 {
            format!("{} s", number(ms / 1e3))
        } else {
            format!("{} ms", number(ms))
        }
    });
    let keys = [key(RED, "p99", Look::Line), key(BLUE, "p50", Look::Line)];
    let p99: Vec<_> = waits().map(|(at, w)| (at, w.map(|w| w.p99))).collect();
    let p50: Vec<_> = waits().map(|(at, w)| (at, w.map(|w| w.p50))).collect();
    panel.steps(svg, &keys[0], &p99, came_until(summary));
    panel.steps(svg, &keys[1], &p50, came_until(summary));
    panel.legend(svg, &keys);
    panel.frame(svg);
    svg.end_group();
    panel
}

#[cfg(test)]
mod tests;
