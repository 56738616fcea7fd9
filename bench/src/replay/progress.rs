//! How far a replay is, on stderr where that is a terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use super::watch::{Count, Depth};

/// Cheap to clone; all clones are one bar.
#[derive(Clone)]
pub(super) struct Progress {
    /// Its position is the number of answers.
    bar: ProgressBar,
    sent: Arc<AtomicU64>,
}

impl Progress {
    pub(super) fn new(requests: usize) -> anyhow::Result<Self> {
        let style = ProgressStyle::with_template("{bar:24} {pos} of {len} answered, {msg}")
            .context("the bar's template is wrong")?;
        // Draws nothing where stderr is no terminal.
        let bar = ProgressBar::new(requests as u64).with_style(style);
        bar.set_message("deploying");
        Ok(Self {
            bar,
            sent: Arc::default(),
        })
    }

    pub(super) fn sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn answered(&self) {
        self.bar.inc(1);
    }

    pub(super) fn seen(&self, count: Count, depth: Depth) {
        let sent = self.sent.load(Ordering::Relaxed);
        self.bar.set_message(message(sent, count, depth));
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn message(sent: u64, count: Count, Depth { depth, .. }: Depth) -> String {
    let mut message = format!("{sent} sent, {depth} waiting; instances:");
    let states = [
        ("ready", count.ready),
        ("starting", count.starting),
        ("draining", count.draining),
        ("in error", count.error),
    ];
    let mut some = states.iter().filter(|(_, number)| *number > 0).peekable();
    if some.peek().is_none() {
        message.push_str(" none");
    }
    for (state, number) in some {
        message.push_str(&format!(" {number} {state}"));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_what_is_sent_answered_and_waits() {
        let progress = Progress::new(3).unwrap();
        progress.sent();
        progress.sent();
        progress.answered();
        let count = Count {
            ready: 2,
            draining: 1,
            ..Count::default()
        };
        progress.seen(count, Depth { at: 1.0, depth: 7 });
        let bar = &progress.bar;
        assert_eq!((bar.position(), bar.length()), (1, Some(3)));
        let said = "2 sent, 7 waiting; instances: 2 ready 1 draining";
        assert_eq!(bar.message(), said);
        progress.seen(Count::default(), Depth::default());
        assert_eq!(bar.message(), "2 sent, 0 waiting; instances: none");
        progress.end();
        assert!(bar.is_finished());
    }
}
