//! What output is shown on: whether it is a terminal, how wide, in colour.

use std::io::{IsTerminal, stderr, stdout};

use anstyle::{AnsiColor, Style};

pub(super) const BOLD: Style = Style::new().bold();
pub(super) const FAINT: Style = Style::new().dimmed();
pub(super) const GOOD: Style = AnsiColor::Green.on_default();
pub(super) const UNDERWAY: Style = AnsiColor::Yellow.on_default();
pub(super) const BAD: Style = AnsiColor::Red.on_default();

#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    /// Columns to fit into; none: as wide as it gets, for a pipe or a file.
    pub(super) width: Option<usize>,
    pub(super) colour: bool,
}

impl Screen {
    /// What reads lines and knows no colours.
    #[cfg(test)]
    pub(super) const PLAIN: Self = Self {
        width: None,
        colour: false,
    };

    pub(super) fn stdout() -> Self {
        Self {
            width: size().map(|(columns, _)| columns),
            colour: stdout().is_terminal() && wants_colour(),
        }
    }

    pub(super) fn stderr() -> Self {
        Self {
            width: None,
            colour: stderr().is_terminal() && wants_colour(),
        }
    }

    pub(super) fn paint(self, style: Style, text: &str) -> String {
        if !self.colour || style.is_plain() || text.is_empty() {
            return text.to_owned();
        }
        format!("{style}{text}{style:#}")
    }
}

/// Columns and lines of the terminal that standard output is.
pub(super) fn size() -> Option<(usize, usize)> {
    if !stdout().is_terminal() {
        return None;
    }
    let or = |told: u16, usual: usize| match told {
        0 => usual,
        told => usize::from(told),
    };
    // One without a size, as a serial line is, is taken for the classic one.
    let told = rustix::termios::tcgetwinsize(stdout()).ok();
    let (columns, lines) = told.map_or((0, 0), |size| (size.ws_col, size.ws_row));
    Some((or(columns, 80), or(lines, 24)))
}

/// As no-color.org has it.
fn wants_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
        && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// The style of a state's name, of a version or of an instance.
pub(super) fn style_of(state: &str) -> Style {
    match state {
        "ACTIVE" | "ready" => GOOD,
        "DEPLOYING" | "DEGRADING" | "starting" | "draining" => UNDERWAY,
        "ERROR" | "DEGRADED" | "error" => BAD,
        "INACTIVE" => FAINT,
        _ => Style::new(),
    }
}
