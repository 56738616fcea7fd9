//! The text that Prometheus reads, less the series of what is gone.

use uuid::Uuid;

/// What a line of the page is about.
#[derive(Debug, PartialEq, Eq)]
pub struct Series<'a> {
    /// With the histogram's suffix, if it is of one.
    pub name: &'a str,
    pub function: Option<Uuid>,
    pub version: Option<Uuid>,
}

impl<'a> Series<'a> {
    /// `None` for comments and empty lines.
    fn of(line: &'a str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let end = line.find(['{', ' '])?;
        let (name, rest) = line.split_at(end);
        // A quote inside a label's value is written with a backslash, so this finds labels only.
        let id = |label: &str| {
            let (_, after) = rest.split_once(label)?;
            Uuid::try_parse(after.split('"').next()?).ok()
        };
        Some(Self {
            name,
            function: id("function=\""),
            version: id("version=\""),
        })
    }
}

pub(super) fn retain(page: &str, lives: impl Fn(&Series<'_>) -> bool) -> String {
    let mut kept = String::with_capacity(page.len());
    for line in page.split_inclusive('\n') {
        if Series::of(line).is_none_or(|series| lives(&series)) {
            kept.push_str(line);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198b2a4-5d2e-7c3a-9a51-0f6e1d2c3b4a";

    #[test]
    fn a_line_says_what_it_is_about() {
        let id = Uuid::try_parse(ID).unwrap();
        let series = |name, function, version| {
            Some(Series {
                name,
                function,
                version,
            })
        };
        let line = format!("weir_slots{{function=\"{ID}\",version=\"{ID}\",state=\"busy\"}} 3\n");
        assert_eq!(Series::of(&line), series("weir_slots", Some(id), Some(id)));
        let line = format!("a_bucket{{function=\"{ID}\",le=\"0.5\"}} 3\n");
        assert_eq!(Series::of(&line), series("a_bucket", Some(id), None));
        let line = "weir_build_info{version=\"0.1.0\"} 1\n";
        assert_eq!(Series::of(line), series("weir_build_info", None, None));
        assert_eq!(Series::of("up 1\n"), series("up", None, None));
        assert_eq!(Series::of("# TYPE up gauge\n"), None);
        assert_eq!(Series::of("\n"), None);
    }

    #[test]
    fn only_what_lives_is_shown() {
        let page = "# TYPE a gauge\na{x=\"1\"} 1\nb 2\n\nc 3\n";
        assert_eq!(
            retain(page, |series| series.name != "b"),
            "# TYPE a gauge\na{x=\"1\"} 1\n\nc 3\n"
        );
    }
}
