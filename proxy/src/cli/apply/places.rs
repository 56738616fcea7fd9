//! A YAML or JSON text as a value, and where in the text each part of it is.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;

/// Line and column, from 1, of each value by its path.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Places(BTreeMap<String, (u64, u64)>);

impl Places {
    /// `:LINE:COLUMN` of what is at the path, else of the nearest part around it.
    pub(super) fn of(&self, path: &str) -> String {
        let mut path = path;
        loop {
            if let Some((line, column)) = self.0.get(path) {
                return format!(":{line}:{column}");
            }
            match path.rfind(['.', '[']) {
                Some(at) => path = &path[..at],
                None => return String::new(),
            }
        }
    }

    pub(super) fn knows(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }
}

/// The value and its places; the error is where it is wrong, and why.
pub(super) fn read(text: &str) -> Result<(Value, Places), (String, String)> {
    let root: Spanned<Node> = serde_saphyr::from_str(text).map_err(|error| {
        let place = error
            .location()
            .map_or_else(String::new, |at| format!(":{}:{}", at.line(), at.column()));
        let why = error.without_snippet().to_string();
        // It has the place at its end too.
        let why = why.split(" at line ").next().unwrap_or_default().to_owned();
        (place, why)
    })?;
    let mut places = Places::default();
    let value = settle(root, String::new(), &mut places);
    Ok((value, places))
}

enum Node {
    Plain(Value),
    List(Vec<Spanned<Node>>),
    Members(Vec<(String, Spanned<Node>)>),
}

fn settle(node: Spanned<Node>, path: String, places: &mut Places) -> Value {
    let at = node.referenced;
    let value = match node.value {
        Node::Plain(value) => value,
        Node::List(entries) => entries
            .into_iter()
            .enumerate()
            .map(|(at, entry)| settle(entry, format!("{path}[{at}]"), places))
            .collect(),
        Node::Members(members) => members
            .into_iter()
            .map(|(name, value)| {
                let dot = if path.is_empty() { "" } else { "." };
                let value = settle(value, format!("{path}{dot}{name}"), places);
                (name, value)
            })
            .collect::<Map<_, _>>()
            .into(),
    };
    places.0.insert(path, (at.line(), at.column()));
    value
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Nodes)
    }
}

struct Nodes;

impl<'de> Visitor<'de> for Nodes {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
        Ok(Node::Plain(v.into()))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
        Ok(Node::Plain(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
        Ok(Node::Plain(v.into()))
    }
    fn visit_f64<E>(self, v: f64) -> Result<Node, E> {
        Ok(Node::Plain(v.into()))
    }
    fn visit_str<E>(self, v: &str) -> Result<Node, E> {
        Ok(Node::Plain(v.into()))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Plain(Value::Null))
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Plain(Value::Null))
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = seq.next_element()? {
            entries.push(entry);
        }
        Ok(Node::List(entries))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Node::Members(members))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_as_without_places() {
        let text =
            "a: 1\nb: [x, -2, 2.5, true, null, '3', ~]\nc:\n  - d: {e: f}\n  - &x 7\n  - *x\n";
        let (value, places) = read(text).unwrap();
        let plain: Value = serde_saphyr::from_str(text).unwrap();
        assert_eq!(value, plain);
        assert_eq!(value["b"], json!(["x", -2, 2.5, true, null, "3", null]));
        assert_eq!(places.of("c[0].d.e"), ":4:12");
        assert_eq!(places.of("b[1]"), ":2:8");
        assert_eq!(places.of("c[1].nothing.here"), ":5:8");
        let (value, places) = read("{\"a\": {\n \"b\": 1}}").unwrap();
        assert_eq!(
            (value, places.of("a.b")),
            (json!({"a": {"b": 1}}), ":2:7".into())
        );
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_place() {
        for text in ["a:\n  - b: [1, 2\n", "a: 1\na: 2\n", "a: \"x\n"] {
            let (place, why) = read(text).unwrap_err();
            assert!(
                place.starts_with(':') && !why.is_empty(),
                "{text}: {place} {why}"
            );
        }
    }
}
