//! Tables that fit the screen: identifiers become prefixes, then texts are cut.
//! A pipe gets everything whole. Column names are the same at every width.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::screen::{BOLD, Screen, style_of};

#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    name: &'static str,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A UUID; where there is no room a prefix that is unique in the table.
    Id,
    /// Cut at its end.
    Text,
    /// Cut in its middle: names differ at both ends.
    Name,
    /// Whole, at the right.
    Number,
    /// Whole, and coloured.
    State,
}

pub(super) const fn id(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Id,
    }
}
pub(super) const fn plain(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Text,
    }
}
pub(super) const fn name(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Name,
    }
}
pub(super) const fn number(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Number,
    }
}
pub(super) const fn state(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::State,
    }
}

const GAP: usize = 2;
/// What a text keeps however narrow the screen is.
const LEAST: usize = 8;
/// Characters of a shortened identifier.
const PREFIX: usize = 8;

/// The table's lines, its head first; no line ends in blanks.
pub(super) fn table(columns: &[Column], mut rows: Vec<Vec<String>>, screen: Screen) -> String {
    for cell in rows.iter_mut().flatten() {
        *cell = one_line(cell);
    }
    let mut widths = natural(columns, &rows);
    if let Some(width) = screen.width
        && total(&widths) > width
    {
        shorten_ids(columns, &mut rows);
        widths = natural(columns, &rows);
        cut_texts(columns, &mut widths, width);
    }

    let mut lines = Vec::with_capacity(rows.len() + 1);
    let head: Vec<String> = columns.iter().map(|c| c.name.to_uppercase()).collect();
    lines.push(line(columns, &widths, &head, |_, text| {
        screen.paint(BOLD, text)
    }));
    lines.extend(rows.iter().map(|row| {
        line(columns, &widths, row, |column, text| match column.kind {
            Kind::State => screen.paint(style_of(text), text),
            _ => text.to_owned(),
        })
    }));
    lines.join("\n")
}

fn line(
    columns: &[Column],
    widths: &[usize],
    cells: &[String],
    paint: impl Fn(&Column, &str) -> String,
) -> String {
    let mut line = String::new();
    let mut owed = 0;
    for ((column, width), cell) in columns.iter().zip(widths).zip(cells) {
        let cell = match column.kind {
            Kind::Name => cut_middle(cell, *width),
            _ => cut(cell, *width),
        };
        let pad = width - cell.width().min(*width);
        if column.kind == Kind::Number {
            owed += pad;
        }
        // Blanks are written only when something follows.
        if !cell.is_empty() {
            line.extend(std::iter::repeat_n(' ', owed));
            line.push_str(&paint(column, &cell));
            owed = 0;
        }
        owed += GAP;
        if column.kind != Kind::Number {
            owed += pad;
        }
    }
    line
}

fn natural(columns: &[Column], rows: &[Vec<String>]) -> Vec<usize> {
    let widest = |at: usize| rows.iter().filter_map(move |row| row.get(at));
    columns
        .iter()
        .enumerate()
        .map(|(at, column)| {
            let cells = widest(at).map(|cell| cell.width()).max();
            column.name.width().max(cells.unwrap_or(0))
        })
        .collect()
}

fn total(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
}

fn shorten_ids(columns: &[Column], rows: &mut [Vec<String>]) {
    for (at, _) in columns
        .iter()
        .enumerate()
        .filter(|(_, c)| c.kind == Kind::Id)
    {
        let all: Vec<&str> = rows
            .iter()
            .filter_map(|row| row.get(at))
            .map(String::as_str)
            .collect();
        let length = prefix(&all);
        for row in rows.iter_mut() {
            if let Some(cell) = row.get_mut(at) {
                *cell = cell.chars().take(length).collect();
            }
        }
    }
}

/// How many characters tell these identifiers apart.
pub(super) fn prefix(ids: &[&str]) -> usize {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    let alike = ids.windows(2).map(|pair| {
        let same = pair[0].chars().zip(pair[1].chars());
        same.take_while(|(a, b)| a == b).count() + 1
    });
    alike.max().unwrap_or(0).max(PREFIX)
}

/// Takes from the widest text, column by column, until the row fits.
fn cut_texts(columns: &[Column], widths: &mut [usize], width: usize) {
    while total(widths) > width {
        let widest = columns
            .iter()
            .zip(widths.iter_mut())
            .filter(|(c, w)| {
                matches!(c.kind, Kind::Text | Kind::Name) && **w > LEAST.max(c.name.width())
            })
            .map(|(_, w)| w)
            .max_by_key(|w| **w);
        match widest {
            Some(widest) => *widest -= 1,
            None => return,
        }
    }
}

/// Without what would move a terminal's cursor.
pub(super) fn one_line(text: &str) -> String {
    if text.chars().any(char::is_control) {
        text.replace(char::is_control, " ")
    } else {
        text.to_owned()
    }
}

/// At most so many columns; what is lost at the end is marked.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut kept = fitting(text.chars(), width.saturating_sub(1));
    kept.push('…');
    kept
}

/// The same, with the mark in the middle.
pub(super) fn cut_middle(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    let tail: String = fitting(text.chars().rev(), room / 2);
    let head = fitting(text.chars(), room - tail.width());
    head + "…" + &tail.chars().rev().collect::<String>()
}

fn fitting(chars: impl Iterator<Item = char>, width: usize) -> String {
    let mut used = 0;
    chars
        .take_while(|c| {
            used += c.width().unwrap_or(0);
            used <= width
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] = &[
        id("id"),
        name("name"),
        state("status"),
        number("min"),
        plain("runs"),
    ];

    fn rows() -> Vec<Vec<String>> {
        let row = |cells: [&str; 5]| cells.map(str::to_owned).to_vec();
        vec![
            row([
                "3f2a91c0-0000-4000-8000-000000000001",
                "summarise",
                "ACTIVE",
                "2",
                "python3 -u serve.py",
            ]),
            row([
                "3f2a91c0-7000-4000-8000-000000000002",
                "a-function-with-a-name-that-goes-on-v2",
                "ERROR",
                "10",
                "python3 -m vllm.entrypoints.openai.api_server --model meta-llama/Llama-3.1-8B-Instruct",
            ]),
        ]
    }

    fn on(width: Option<usize>) -> String {
        let screen = Screen {
            width,
            colour: false,
        };
        table(COLUMNS, rows(), screen)
    }

    #[test]
    fn at_80_columns_ids_are_short_and_texts_cut() {
        assert_eq!(
            on(Some(80)),
            "\
ID          NAME                         STATUS  MIN  RUNS
3f2a91c0-0  summarise                    ACTIVE    2  python3 -u serve.py
3f2a91c0-7  a-function-wi…at-goes-on-v2  ERROR    10  python3 -m vllm.entrypoin…"
        );
    }

    #[test]
    fn at_200_columns_everything_is_whole() {
        let whole = "\
ID                                    NAME                                    STATUS  MIN  RUNS
3f2a91c0-0000-4000-8000-000000000001  summarise                               ACTIVE    2  python3 -u serve.py
3f2a91c0-7000-4000-8000-000000000002  a-function-with-a-name-that-goes-on-v2  ERROR    10  python3 -m vllm.entrypoints.openai.api_server --model meta-llama/Llama-3.1-8B-Instruct";
        assert_eq!(on(Some(200)), whole);
        assert_eq!(on(None), whole, "and in a pipe");
    }

    #[test]
    fn colours_are_on_the_head_and_the_states() {
        let screen = Screen {
            width: None,
            colour: true,
        };
        let shown = table(
            &[state("status"), plain("x")],
            vec![vec!["ERROR".into(), "1".into()]],
            screen,
        );
        assert_eq!(
            shown,
            "\u{1b}[1mSTATUS\u{1b}[0m  \u{1b}[1mX\u{1b}[0m\n\u{1b}[31mERROR\u{1b}[0m   1"
        );
    }

    #[test]
    fn no_cell_breaks_out_of_its_line() {
        let shown = table(
            &[plain("a"), plain("b")],
            vec![vec!["x\ny\u{1b}[2J".into(), String::new()]],
            Screen::PLAIN,
        );
        assert_eq!(shown, "A        B\nx y [2J");
    }

    #[test]
    fn cuts_are_marked_and_fit() {
        for width in 1..12 {
            for text in ["0123456789abc", "日本語日本語日本語"] {
                for cut in [cut(text, width), cut_middle(text, width)] {
                    assert!(cut.width() <= width && cut.contains('…'), "{cut} {width}");
                }
            }
        }
        assert_eq!(cut("0123456789", 5), "0123…");
        assert_eq!(cut_middle("0123456789", 5), "01…89");
        assert_eq!(cut("0123", 4), "0123");
    }
}
