//! `weir logs` and `weir gpu`: what the nodes tell.

use anyhow::Context;
use reqwest::Method;
use serde_json::Value;

use super::{
    Common,
    api::Client,
    id::Id,
    list, note,
    table::{self, Column},
    text,
};

#[derive(Debug, clap::Args)]
pub struct Logs {
    #[command(flatten)]
    common: Common,
    /// The instance's ID, also of one that is gone; `weir status --instances` shows those there are
    instance: Id,
    /// The last lines only, at most 100000 [default: 1000, and says so where there are more]
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub struct Gpu {
    #[command(flatten)]
    common: Common,
}

impl Logs {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let instance = match self.instance.whole() {
            Some(id) => id,
            None => {
                let (_, all) = client.instances(None).await?;
                let ids = all.iter().map(|i| i.id.0);
                self.instance
                    .pick(ids, |id| *id, "instances")?
                    .with_context(|| {
                        format!(
                            "no instance has an ID that begins with {}\n\
                             try: `weir status --instances` shows those there are",
                            self.instance
                        )
                    })?
            }
        };
        // One more than is shown by itself tells whether that is all.
        let asked = self.tail.unwrap_or(SHOWN + 1);
        let path = format!("/v2/weir/instances/{instance}/logs?tail={asked}");
        let bytes = client.bytes(Method::GET, &path, None).await?;
        let shown = last_lines(&bytes, self.tail.unwrap_or(SHOWN));
        super::write_out(shown)?;
        if self.tail.is_none() && shown.len() < bytes.len() {
            note(&format!(
                "these are the last {SHOWN} lines: --tail N shows more of them"
            ));
        }
        Ok(())
    }
}

/// Lines that are shown where no number is given.
const SHOWN: usize = 1000;

/// The last lines, whole ones.
fn last_lines(bytes: &[u8], count: usize) -> &[u8] {
    let end = bytes.len() - usize::from(bytes.ends_with(b"\n"));
    let mut ends = bytes[..end]
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .map(|(at, _)| at + 1);
    match count {
        0 => &[],
        _ => &bytes[ends.nth(count - 1).unwrap_or(0)..],
    }
}

const COLUMNS: &[Column] = &[
    table::name("node"),
    table::plain("gpu"),
    table::plain("name"),
];

impl Gpu {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let answer = client.get("/v2/weir/nodes").await?;
        let rows = list(&answer, "nodes").iter().flat_map(node_rows).collect();
        self.common.show(&answer, COLUMNS, rows)
    }
}

/// A row for each GPU of a node; one that says there is none for the others.
fn node_rows(node: &Value) -> Vec<Vec<String>> {
    let name = text(node, "name");
    let gpus = list(node, "gpus");
    if gpus.is_empty() {
        return vec![vec![name, "-".into(), "none".into()]];
    }
    gpus.iter()
        .map(|gpu| vec![name.clone(), text(gpu, "index"), text(gpu, "name")])
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_lines_are_whole() {
        let cases: [(&[u8], usize, &[u8]); 6] = [
            (b"a\nb\nc\n", 2, b"b\nc\n"),
            (b"a\nb\nc", 1, b"c"),
            (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
            (b"a\n", 0, b""),
            (b"", 3, b""),
            (b"\n\n\n", 2, b"\n\n"),
        ];
        for (bytes, count, expected) in cases {
            assert_eq!(last_lines(bytes, count), expected, "{bytes:?} {count}");
        }
    }

    #[test]
    fn a_node_without_gpus_is_shown_too() {
        let node = json!({"name": "n", "gpus": [{"index": 0, "name": "H100"}, {"index": 1, "name": "H100"}]});
        assert_eq!(node_rows(&node).len(), 2);
        assert_eq!(node_rows(&node)[1][..3], ["n", "1", "H100"]);
        assert_eq!(node_rows(&json!({"name": "n"}))[0][..3], ["n", "-", "none"]);
    }
}
