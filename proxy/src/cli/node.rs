//! `weir logs` and `weir gpu`: what the nodes tell.

use anyhow::Context;
use reqwest::Method;
use serde_json::Value;

use super::{
    Common,
    api::Client,
    id::Id,
    list,
    table::{self, Column},
    text,
};

#[derive(Debug, clap::Args)]
pub struct Logs {
    #[command(flatten)]
    common: Common,
    /// The instance's ID, also of one that is gone; `weir status --instances` shows those there are
    instance: Id,
    /// The last lines only
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
        let mut path = format!("/v2/weir/instances/{instance}/logs");
        if let Some(tail) = self.tail {
            path += &format!("?tail={tail}");
        }
        let bytes = client.bytes(Method::GET, &path, None).await?;
        super::write_out(last_lines(&bytes, self.tail))
    }
}

/// The last lines, whole ones; all of them where no number is given.
fn last_lines(bytes: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return bytes };
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
    table::plain("memory"),
    table::plain("driver"),
    table::id("instance"),
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
    let first = |value: &Value, members: &[&str]| {
        members
            .iter()
            .map(|member| text(value, member))
            .find(|text| !text.is_empty())
            .unwrap_or_default()
    };
    let name = first(node, &["name", "node", "id"]);
    let driver = first(node, &["driverVersion", "driver"]);
    let gpus = list(node, "gpus");
    if gpus.is_empty() {
        let why = first(node, &["gpuError", "detail"]);
        let why = if why.is_empty() { "none".into() } else { why };
        return vec![vec![name, "-".into(), why, "".into(), driver, "".into()]];
    }
    gpus.iter()
        .enumerate()
        .map(|(index, gpu)| {
            let number = first(gpu, &["index", "id"]);
            vec![
                name.clone(),
                if number.is_empty() {
                    index.to_string()
                } else {
                    number
                },
                match gpu {
                    Value::String(name) => name.clone(),
                    gpu => first(gpu, &["name", "gpu"]),
                },
                first(gpu, &["memoryBytes", "memory", "memoryTotal"]),
                driver.clone(),
                first(gpu, &["instanceId", "instance", "usedBy"]),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_lines_are_whole() {
        let cases: [(&[u8], Option<usize>, &[u8]); 7] = [
            (b"a\nb\nc\n", None, b"a\nb\nc\n"),
            (b"a\nb\nc\n", Some(2), b"b\nc\n"),
            (b"a\nb\nc", Some(1), b"c"),
            (b"a\nb\nc\n", Some(9), b"a\nb\nc\n"),
            (b"a\n", Some(0), b""),
            (b"", Some(3), b""),
            (b"\n\n\n", Some(2), b"\n\n"),
        ];
        for (bytes, count, expected) in cases {
            assert_eq!(last_lines(bytes, count), expected, "{bytes:?} {count:?}");
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
