//! How the status is laid out: the same columns at every width, shorter cells
//! where it is narrow.

use anstyle::Style;
use jiff::Timestamp;
use unicode_width::UnicodeWidthStr;
use weir_control::model::Instance;

use super::{
    super::{
        ago,
        screen::{BAD, BOLD, FAINT, Screen, style_of},
        table::{self, Column, cut, one_line, table},
    },
    seen::{Decision, Seen, VersionSeen},
};

/// What is asked for.
pub(super) struct Wish<'a> {
    pub(super) address: &'a str,
    pub(super) instances: bool,
    pub(super) decisions: bool,
    /// Why the last look failed.
    pub(super) trouble: Option<&'a str>,
    pub(super) now: Timestamp,
    pub(super) screen: Screen,
}

/// Lines: the first ones and the last ones stay, those between scroll.
pub(super) struct Frame {
    top: Vec<String>,
    middle: Vec<String>,
    bottom: Vec<String>,
    foot: String,
    screen: Screen,
}

/// From here on cells are written out.
const WIDE: usize = 140;
/// Failing instances that keep their place on the screen.
const FAILING: usize = 5;
/// Decisions shown of each version.
const DECISIONS: usize = 5;

const VERSIONS: &[Column] = &[
    table::name("function"),
    table::id("version"),
    table::state("state"),
    table::plain("instances"),
    table::number("slots"),
    table::number("queue"),
    table::plain("decision"),
];
const ERRORS: &[Column] = &[
    table::name("function"),
    table::id("instance"),
    table::state("state"),
    table::number("restarts"),
    table::plain("last error"),
];
const INSTANCES: &[Column] = &[
    table::id("instance"),
    table::id("version"),
    table::state("state"),
    table::number("age"),
    table::plain("node"),
    table::plain("address"),
    table::number("pid"),
    table::number("restarts"),
];
const HISTORY: &[Column] = &[
    table::id("version"),
    table::number("ago"),
    table::number("wanted"),
    table::plain("reason"),
    table::plain("why"),
];

impl Frame {
    pub(super) fn of(seen: &Seen, wish: &Wish<'_>) -> Self {
        let screen = wish.screen;
        let wide = screen.width.is_none_or(|width| width >= WIDE);
        let mut top = vec![summary(seen, wish)];
        if let Some(trouble) = wish.trouble {
            let told = one_line(trouble.lines().next().unwrap_or_default());
            let told = cut(&format!("old: {told}"), screen.width.unwrap_or(usize::MAX));
            top.push(screen.paint(BAD, &told));
        }
        top.push(String::new());

        let rows = seen.versions.iter().map(|v| version(v, wish.now, wide));
        let mut middle = if seen.versions.is_empty() {
            vec![
                "There is no function yet: `weir function create` or `weir apply` makes one."
                    .to_owned(),
            ]
        } else {
            lines(&table(VERSIONS, rows.collect(), screen))
        };
        let mut part = |title: &str, columns: &[Column], rows: Vec<Vec<String>>| {
            if !rows.is_empty() {
                middle.push(String::new());
                middle.push(screen.paint(BOLD, title));
                middle.extend(lines(&table(columns, rows, screen)));
            }
        };
        if wish.instances {
            let rows = seen.instances.iter().map(|i| instance(i, wish.now));
            part("Instances", INSTANCES, rows.collect());
        }
        if wish.decisions {
            let rows = seen.versions.iter().flat_map(|v| history(v, wish.now));
            part("Decisions", HISTORY, rows.collect());
        }

        let failing = seen.failing();
        let mut bottom = Vec::new();
        if !failing.is_empty() {
            let shown = match screen.width {
                Some(_) => failing.len().min(FAILING),
                None => failing.len(),
            };
            bottom.push(String::new());
            let more = match failing.len() - shown {
                0 => String::new(),
                more => format!(" ({more} more: `weir status --once --instances`)"),
            };
            bottom.push(format!("{}{more}", screen.paint(BOLD, "Recent errors")));
            let rows = failing[..shown].iter().map(|(name, i)| failed(name, i));
            bottom.extend(lines(&table(ERRORS, rows.collect(), screen)));
        }
        Self {
            top,
            middle,
            bottom,
            foot: screen.paint(FAINT, "q quits, arrows scroll"),
            screen,
        }
    }

    /// All of it, for what takes any number of lines.
    pub(super) fn whole(&self) -> String {
        let all = self.top.iter().chain(&self.middle).chain(&self.bottom);
        all.map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Lines between top and bottom, on a screen with so many.
    fn room(&self, height: usize) -> usize {
        // The foot and the blank line above it are the last.
        let taken = self.top.len() + self.bottom.len() + 2;
        height.saturating_sub(taken).max(1)
    }

    /// How far it may be scrolled.
    pub(super) fn furthest(&self, height: usize) -> usize {
        match self.middle.len().saturating_sub(self.room(height)) {
            0 => 0,
            // The head of the table stays, and a line says what is not shown.
            hidden => hidden + 1,
        }
    }

    /// As many lines as the screen has.
    pub(super) fn part(&self, height: usize, from: usize) -> Vec<String> {
        let room = self.room(height);
        let mut all = self.top.clone();
        if self.middle.len() <= room {
            all.extend_from_slice(&self.middle);
        } else if let Some((head, rows)) = self.middle.split_first() {
            let shown = room.saturating_sub(2);
            let from = from.min(rows.len().saturating_sub(shown));
            let below = rows.len().saturating_sub(from + shown);
            all.push(head.clone());
            all.extend(rows.iter().skip(from).take(shown).cloned());
            let more = format!("… {from} lines above, {below} below");
            all.push(self.screen.paint(FAINT, &more));
        }
        all.extend_from_slice(&self.bottom);
        all.truncate(height.saturating_sub(1));
        while all.len() + 1 < height {
            all.push(String::new());
        }
        all.push(self.foot.clone());
        all
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// One line: as much of it as fits, what matters most first.
fn summary(seen: &Seen, wish: &Wish<'_>) -> String {
    let sum = |of: fn(&VersionSeen) -> u64| seen.versions.iter().map(of).sum::<u64>();
    let busy = sum(|v| v.load.map_or(0, |l| l.busy));
    let slots = sum(|v| v.load.map_or(0, |l| l.busy + l.free));
    let queued = sum(|v| v.load.map_or(0, |l| l.queued));
    let mut parts = vec![(BOLD, format!("weir {}", wish.address))];
    for state in [
        "ERROR",
        "DEGRADED",
        "DEGRADING",
        "DEPLOYING",
        "ACTIVE",
        "INACTIVE",
    ] {
        let n = seen
            .versions
            .iter()
            .filter(|v| v.row.status == state)
            .count();
        if n > 0 {
            parts.push((style_of(state), format!("{n} {state}")));
        }
    }
    let instances = seen.instances.len();
    let plural = if instances == 1 { "" } else { "s" };
    for part in [
        format!("{queued} queued"),
        format!("{busy}/{slots} slots busy"),
        format!("{instances} instance{plural}"),
    ] {
        parts.push((Style::new(), part));
    }

    let width = wish.screen.width.unwrap_or(usize::MAX);
    let mut used = 0;
    let fitting = parts.into_iter().take_while(|(_, part)| {
        used += part.width() + 2;
        used - 2 <= width
    });
    let painted: Vec<String> = fitting
        .map(|(style, part)| wish.screen.paint(style, &part))
        .collect();
    painted.join("  ")
}

fn version(seen: &VersionSeen, now: Timestamp, wide: bool) -> Vec<String> {
    let (slots, queue) = match seen.load.filter(|_| seen.row.deployed()) {
        Some(load) => (
            format!("{}/{}", load.busy, load.busy + load.free),
            load.queued.to_string(),
        ),
        None => ("-".into(), "-".into()),
    };
    vec![
        seen.row.name.clone(),
        seen.row.version_id.to_string(),
        seen.row.status.clone(),
        counts(seen, wide),
        slots,
        queue,
        seen.decisions
            .last()
            .map_or_else(|| "-".into(), |d| decision(d, now, wide)),
    ]
}

/// Instances by state; by the states' first letters where words take too much room.
fn counts(seen: &VersionSeen, wide: bool) -> String {
    const ORDER: [&str; 4] = ["ready", "starting", "draining", "error"];
    let there: Vec<(usize, &str)> = ORDER
        .iter()
        .filter_map(|state| Some((*seen.counts.get(state)?, *state)))
        .collect();
    let told = |parts: Vec<String>, gap: &str| parts.join(gap);
    match there.len() {
        0 => "-".into(),
        1 | 2 if !wide => {
            let words = there
                .iter()
                .map(|(n, state)| format!("{n} {state}"))
                .collect();
            let words = told(words, " ");
            if words.len() <= 15 {
                words
            } else {
                letters(&there)
            }
        }
        _ if wide => told(
            there
                .iter()
                .map(|(n, state)| format!("{n} {state}"))
                .collect(),
            ", ",
        ),
        _ => letters(&there),
    }
}

fn letters(there: &[(usize, &str)]) -> String {
    let parts: Vec<String> = there
        .iter()
        .map(|(n, state)| format!("{n}{}", &state[..1]))
        .collect();
    parts.join(" ")
}

fn decision(decision: &Decision, now: Timestamp, wide: bool) -> String {
    let Decision {
        desired, reason, ..
    } = decision;
    let ago = ago(now, decision.at);
    if wide {
        format!("{desired} wanted for {ago}, {reason}: {}", decision.why())
    } else {
        format!("{desired} {reason} {ago}")
    }
}

fn failed(name: &str, instance: &Instance) -> Vec<String> {
    vec![
        name.to_owned(),
        instance.id.to_string(),
        instance.state.as_str().to_owned(),
        instance.restarts.to_string(),
        instance.error_and_log().unwrap_or_default(),
    ]
}

fn instance(instance: &Instance, now: Timestamp) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        instance.id.to_string(),
        instance.function_version_id.to_string(),
        instance.state.as_str().to_owned(),
        ago(now, instance.created_at),
        instance.node.clone(),
        or_dash(instance.address.map(|a| a.to_string())),
        or_dash(instance.pid.map(|p| p.to_string())),
        instance.restarts.to_string(),
    ]
}

fn history(seen: &VersionSeen, now: Timestamp) -> impl Iterator<Item = Vec<String>> {
    let version = seen.row.version_id.to_string();
    seen.decisions.iter().rev().take(DECISIONS).map(move |d| {
        vec![
            version.clone(),
            ago(now, d.at),
            d.desired.to_string(),
            d.reason.clone(),
            d.why(),
        ]
    })
}

#[cfg(test)]
mod tests;
