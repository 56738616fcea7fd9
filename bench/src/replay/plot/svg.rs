//! As much of SVG as the plot needs: rectangles, lines, paths, text.
//!
//! `plotters`, the leanest of the plotting libraries, draws in whole pixels.

use std::fmt::Write;

pub(super) struct Svg {
    out: String,
}

/// Where a text's place is in it.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    /// On a ground of its own, so that it is readable on a dark page too.
    pub(super) fn new(width: f64, height: f64, title: &str) -> Self {
        let mut svg = Self { out: String::new() };
        svg.push(&format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\" \
             font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">"
        ));
        svg.push(&format!("<title>{}</title>", escaped(title)));
        svg.rect([0.0, 0.0, width, height], "#ffffff");
        svg
    }

    fn push(&mut self, element: &str) {
        self.out.push_str(element);
        self.out.push('\n');
    }

    /// Left, top, width and height.
    pub(super) fn rect(&mut self, [x, y, width, height]: [f64; 4], fill: &str) {
        self.push(&format!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" \
             fill=\"{fill}\"/>"
        ));
    }

    /// `look` is more attributes.
    pub(super) fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], stroke: &str, look: &str) {
        self.push(&format!(
            "<line x1=\"{x1:.2}\" y1=\"{y1:.2}\" x2=\"{x2:.2}\" y2=\"{y2:.2}\" \
             stroke=\"{stroke}\" {look}/>"
        ));
    }

    pub(super) fn path(&mut self, path: &Path, look: &str) {
        if !path.0.is_empty() {
            self.push(&format!("<path d=\"{}\" {look}/>", path.0.trim_end()));
        }
    }

    pub(super) fn text(&mut self, [x, y]: [f64; 2], anchor: Anchor, look: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.push(&format!(
            "<text x=\"{x:.2}\" y=\"{y:.2}\" text-anchor=\"{anchor}\" {look}>{}</text>",
            escaped(text)
        ));
    }

    /// So that what follows is one thing to readers of the file.
    pub(super) fn group(&mut self, name: &str) {
        self.push(&format!("<g id=\"{name}\">"));
    }

    pub(super) fn end_group(&mut self) {
        self.push("</g>");
    }

    pub(super) fn end(mut self) -> String {
        self.push("</svg>");
        self.out
    }
}

/// The outline of what holds for a while and then is something else.
#[derive(Default)]
pub(super) struct Path(String);

impl Path {
    pub(super) fn start(&mut self, x: f64, y: f64) {
        // A string takes all that is written.
        _ = write!(self.0, "M{x:.2} {y:.2} ");
    }

    pub(super) fn across(&mut self, x: f64) {
        _ = write!(self.0, "H{x:.2} ");
    }

    pub(super) fn up_or_down(&mut self, y: f64) {
        _ = write!(self.0, "V{y:.2} ");
    }

    pub(super) fn close(&mut self) {
        self.0.push_str("Z ");
    }
}

/// As text or attribute; what XML cannot have becomes a replacement character.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_well_formed() {
        let wild = "a <b> & \"c\" 'd' \u{1b}[31m \u{0} ]]> \u{ffff} \u{85} é 模";
        let mut svg = Svg::new(10.0, 20.0, wild);
        svg.text([1.0, 2.0], Anchor::End, "fill=\"#000\"", wild);
        let svg = svg.end();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let expected = "a <b> & \"c\" 'd' \u{fffd}[31m \u{fffd} ]]> \u{fffd} \u{fffd} é 模";
        for name in ["title", "text"] {
            let node = document.descendants().find(|n| n.has_tag_name(name));
            assert_eq!(node.unwrap().text(), Some(expected));
        }
    }
}
