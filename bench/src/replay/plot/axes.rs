//! A panel of the plot: its place, its two axes, and the ways to draw in it.
//!
//! All that is drawn holds for a while (from one look to the next, or for a
//! bucket), so all lines are steps.

use super::super::buckets::round_step;
use super::svg::{Anchor, Path, Svg};

const GRID: &str = "#e4e4e4";
const INK: &str = "#333333";
const LABEL: &str = "font-size=\"12\" fill=\"#555555\"";
const HEAD: &str = "font-size=\"13\" font-weight=\"bold\" fill=\"#222222\"";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// From 0.
    Linear {
        most: f64,
        step: f64,
    },
    Decades {
        least: f64,
        most: f64,
    },
}

impl Scale {
    /// Up to `most` or a little more.
    pub(super) fn linear(most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let step = round_step(most, 5.0);
        let most = (most / step - 1e-9).ceil() * step;
        Self::Linear { most, step }
    }

    /// For what comes in whole numbers.
    pub(super) fn whole(most: f64) -> Self {
        match Self::linear(most.max(1.0)) {
            Self::Linear { most, step } if step < 1.0 => Self::Linear {
                most: most.ceil(),
                step: 1.0,
            },
            scale => scale,
        }
    }

    /// From `least`, a power of ten, to the one that is at least `most`.
    pub(super) fn decades(least: f64, most: f64) -> Self {
        let decades = (most.max(least * 10.0) / least).log10();
        let most = least * 10f64.powf((decades - 1e-9).ceil());
        Self::Decades { least, most }
    }

    /// From 0 at the bottom to 1 at the top.
    fn place(self, value: f64) -> f64 {
        let place = match self {
            Self::Linear { most, .. } => value / most,
            Self::Decades { least, most } => {
                (value.max(least) / least).log10() / (most / least).log10()
            }
        };
        place.clamp(0.0, 1.0)
    }

    fn ticks(self) -> Vec<f64> {
        match self {
            Self::Linear { most, step } => {
                let count = (most / step).round() as u32;
                (0..=count).map(|tick| f64::from(tick) * step).collect()
            }
            Self::Decades { least, most } => {
                let count = (most / least).log10().round() as i32;
                (0..=count).map(|power| least * 10f64.powi(power)).collect()
            }
        }
    }
}

/// Without more digits than it needs.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) width: f64,
    pub(super) height: f64,
    /// Seconds at the right edge.
    pub(super) end: f64,
    pub(super) scale: Scale,
}

/// A colour, what it shows, and whether as an area or a line.
pub(super) struct Key {
    pub(super) colour: &'static str,
    pub(super) name: String,
    pub(super) look: Look,
}

#[derive(Clone, Copy)]
pub(super) enum Look {
    Area,
    Line,
    Dashed,
}

impl Look {
    fn of_line(self) -> &'static str {
        match self {
            Self::Area | Self::Line => "stroke-width=\"1.5\"",
            Self::Dashed => "stroke-width=\"1.5\" stroke-dasharray=\"6 4\"",
        }
    }
}

impl Panel {
    fn x(&self, at: f64) -> f64 {
        self.left + self.width * (at / self.end).clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        self.top + self.height * (1.0 - self.scale.place(value))
    }

    fn bottom(&self) -> f64 {
        self.top + self.height
    }

    fn right(&self) -> f64 {
        self.left + self.width
    }

    /// What lies behind the data. `label` writes a value of the vertical axis.
    pub(super) fn grid(&self, svg: &mut Svg, head: &str, label: impl Fn(f64) -> String) {
        svg.text([self.left, self.top - 9.0], Anchor::Start, HEAD, head);
        for tick in self.scale.ticks() {
            let y = self.y(tick);
            svg.line([self.left, y, self.right(), y], GRID, "");
            let place = [self.left - 8.0, y + 4.0];
            svg.text(place, Anchor::End, LABEL, &label(tick));
        }
        for tick in self.times() {
            let x = self.x(tick);
            svg.line([x, self.top, x, self.bottom()], GRID, "");
        }
    }

    fn times(&self) -> impl Iterator<Item = f64> {
        let step = round_step(self.end, 14.0);
        let end = self.end * (1.0 + 1e-9);
        (0..)
            .map(move |tick| f64::from(tick) * step)
            .take_while(move |tick| *tick <= end)
    }

    /// What lies before the data.
    pub(super) fn frame(&self, svg: &mut Svg) {
        let (left, bottom) = (self.left, self.bottom());
        svg.line([left, bottom, self.right(), bottom], INK, "");
        svg.line([left, self.top, left, bottom], INK, "");
    }

    pub(super) fn time_axis(&self, svg: &mut Svg, head: &str) {
        let bottom = self.bottom();
        for tick in self.times() {
            let x = self.x(tick);
            svg.line([x, bottom, x, bottom + 5.0], INK, "");
            let place = [x, bottom + 19.0];
            svg.text(place, Anchor::Middle, LABEL, &number(tick));
        }
        let place = [self.left + self.width / 2.0, bottom + 40.0];
        svg.text(place, Anchor::Middle, HEAD, head);
    }

    /// Above the panel at the right, where no data is.
    pub(super) fn legend(&self, svg: &mut Svg, keys: &[Key]) {
        const MARK: f64 = 18.0;
        // Widths of text differ from font to font: this is ample for 12 px.
        let width = |key: &Key| MARK + 26.0 + 6.8 * key.name.chars().count() as f64;
        let y = self.top - 13.0;
        let mut x = self.right() + 20.0 - keys.iter().map(width).sum::<f64>();
        for key in keys {
            match key.look {
                Look::Area => svg.rect([x, y - 5.0, MARK, 10.0], key.colour),
                look => svg.line([x, y, x + MARK, y], key.colour, look.of_line()),
            }
            let place = [x + MARK + 6.0, y + 4.0];
            svg.text(place, Anchor::Start, LABEL, &key.name);
            x += width(key);
        }
    }

    /// Values from their times on, the last to `until`; nothing where there is
    /// no value.
    pub(super) fn steps(
        &self,
        svg: &mut Svg,
        key: &Key,
        values: &[(f64, Option<f64>)],
        until: f64,
    ) {
        let mut path = Path::default();
        let mut drawing = false;
        for (from, to, value) in held(values, until) {
            match value {
                Some(value) if drawing => path.up_or_down(self.y(value)),
                Some(value) => path.start(self.x(from), self.y(value)),
                None => {}
            }
            drawing = value.is_some();
            if drawing {
                path.across(self.x(to));
            }
        }
        let look = key.look.of_line();
        let colour = key.colour;
        let look = format!("fill=\"none\" stroke=\"{colour}\" stroke-linejoin=\"round\" {look}");
        svg.path(&path, &look);
    }

    /// From the first to the second of each pair, from its time on.
    pub(super) fn area(
        &self,
        svg: &mut Svg,
        colour: &str,
        bounds: &[(f64, (f64, f64))],
        until: f64,
    ) {
        let mut path = Path::default();
        for (from, to, (low, high)) in held(bounds, until) {
            if low < high {
                path.start(self.x(from), self.y(low));
                path.up_or_down(self.y(high));
                path.across(self.x(to));
                path.up_or_down(self.y(low));
                path.close();
            }
        }
        // Else a light line shows between neighbours.
        let look = format!("fill=\"{colour}\" shape-rendering=\"crispEdges\"");
        svg.path(&path, &look);
    }
}

/// From when to when each value holds, equal neighbours as one.
fn held<T: Copy + PartialEq>(values: &[(f64, T)], until: f64) -> Vec<(f64, f64, T)> {
    let mut held: Vec<(f64, f64, T)> = Vec::new();
    for (place, &(from, value)) in values.iter().enumerate() {
        let to = values.get(place + 1).map_or(until, |next| next.0);
        match held.last_mut() {
            Some(last) if last.2 == value => last.1 = to,
            _ => held.push((from, to, value)),
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_end_on_round_numbers() {
        let ends = |scale: Scale| (scale.ticks()[0], *scale.ticks().last().unwrap());
        assert_eq!(ends(Scale::linear(87.0)), (0.0, 100.0));
        assert_eq!(ends(Scale::linear(0.0)), (0.0, 1.0));
        assert_eq!(ends(Scale::whole(1.0)), (0.0, 1.0));
        assert_eq!(Scale::whole(3.0).ticks(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(Scale::decades(1.0, 70.0).ticks(), [1.0, 10.0, 100.0]);
        assert_eq!(Scale::decades(1.0, 0.0).ticks(), [1.0, 10.0]);
        assert_eq!(Scale::decades(1.0, 100.0).ticks(), [1.0, 10.0, 100.0]);
    }

    #[test]
    fn values_have_their_places() {
        assert_eq!(Scale::linear(100.0).place(25.0), 0.25);
        assert_eq!(Scale::decades(1.0, 100.0).place(10.0), 0.5);
        assert_eq!(Scale::decades(1.0, 100.0).place(0.0), 0.0);
        assert_eq!(Scale::linear(100.0).place(1e9), 1.0);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(100.0), "100");
        assert_eq!(number(0.25), "0.25");
        assert_eq!(number(0.0), "0");
    }

    #[test]
    fn what_stays_the_same_is_drawn_once() {
        let values = [(0.0, 1), (1.0, 1), (2.0, 3)];
        assert_eq!(held(&values, 5.0), [(0.0, 2.0, 1), (2.0, 5.0, 3)]);
        assert_eq!(held::<u32>(&[], 5.0), []);
    }
}
