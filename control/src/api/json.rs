//! Bodies, path names and queries, read strictly: what is wrong is named.

use std::{collections::HashSet, fmt};

use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use http::{header, request::Parts};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

use super::problem::Problem;
use crate::model::{FunctionId, VersionId};

/// Longest body, in bytes.
const LIMIT: usize = 1 << 20;

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        if let Some(kind) = request.headers().get(header::CONTENT_TYPE) {
            let kind = kind.to_str().unwrap_or_default();
            let essence = kind.split(';').next().unwrap_or_default().trim();
            let essence = essence.to_ascii_lowercase();
            if essence != "application/json" && !essence.ends_with("+json") {
                return Err(Problem::bad(format!(
                    "the body is '{kind}': send JSON, with 'Content-Type: application/json'"
                )));
            }
        }
        let bytes = axum::body::to_bytes(request.into_body(), LIMIT)
            .await
            .map_err(|error| {
                let over = std::error::Error::source(&error)
                    .is_some_and(|e| e.is::<http_body_util::LengthLimitError>());
                if over {
                    Problem::too_large("the body is over 1 MiB (1048576 bytes), the limit here")
                } else {
                    Problem::bad("the body broke off: send it again")
                }
            })?;
        parse(&bytes).map(Self)
    }
}

pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Unique { top: true }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| Problem::bad(format!("the body is not valid JSON: {error}")))?;
    if !value.is_object() {
        return Err(Problem::bad(
            "the body has to be a JSON object, such as {\"name\": \"a\"}: see /openapi.json for its members",
        ));
    }
    read(value)
}

/// What a value says; what is wrong is named by its path.
pub(crate) fn read<T: DeserializeOwned>(value: Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        wrong(&path, &error.into_inner().to_string())
    })
}

/// What serde says of the member at `path`, for people who write JSON and no Rust.
fn wrong(path: &str, said: &str) -> Problem {
    let member = |name: &str| match (path, name) {
        (".", "") => "the body".to_owned(),
        (".", name) => name.to_owned(),
        (path, "") => path.to_owned(),
        (path, name) => format!("{path}.{name}"),
    };
    if let Some(name) = said.strip_prefix("missing field ") {
        return Problem::bad(format!("{}: is needed", member(name.trim_matches('`'))));
    }
    if said.starts_with("UUID parsing failed") {
        return Problem::bad(format!("{}: is not a UUID", member("")));
    }
    let kinds = ["invalid type: ", "invalid value: ", "unknown variant "];
    let found = kinds.iter().find_map(|kind| said.strip_prefix(kind));
    let found = found.or_else(|| said.starts_with("invalid length ").then_some(said));
    let detail = match found.and_then(|found| found.rsplit_once(", expected ")) {
        Some((found, expected)) => {
            format!("has to be {}, not {}", in_json(expected), in_json(found))
        }
        None => said.to_owned(),
    };
    Problem::bad(format!("{}: {detail}", member("")))
}

fn in_json(word: &str) -> String {
    let whole = |most: u64| format!("a whole number from 0 to {most}");
    match word {
        "u8" => whole(u8::MAX.into()),
        "u16" => whole(u16::MAX.into()),
        "u32" => whole(u32::MAX.into()),
        "u64" | "usize" => whole(u64::MAX),
        "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" | "sequence" => "a list".to_owned(),
        "a map" | "map" => "an object".to_owned(),
        struct_or_value if struct_or_value.starts_with("struct ") => "an object".to_owned(),
        // The lists that serde takes for structs have no place in the API.
        length if length.starts_with("invalid length ") => "a list".to_owned(),
        other => {
            let number = ["integer ", "floating point ", "boolean "];
            let number = number.iter().find_map(|kind| other.strip_prefix(kind));
            let text = ["string ", "one of "];
            let text = text.iter().find_map(|kind| other.strip_prefix(kind));
            let bare = number.map(|number| number.trim_matches('`')).or(text);
            bare.unwrap_or(other).chars().take(256).collect()
        }
    }
}

/// Members of a body in which `null` is not the same as nothing: it takes back what was set.
const NULLABLE: [&str; 1] = ["trafficWeight"];

/// Any JSON value; a name that comes twice in one object is an error, a `null` member is absent, but for a body's
/// [`NULLABLE`] ones.
struct Unique {
    /// Whether it is the body itself.
    top: bool,
}

/// For a [`NULLABLE`] member, with `#[serde(default)]`: the outer is `None` where it is absent.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }
    /// `2.0` is the whole number 2, as JSON Schema has it.
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if v.fract() == 0.0 && v.abs() <= EXACT {
            return Ok((v as i64).into());
        }
        Ok(v.into())
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = seq.next_element_seed(Unique { top: false })? {
            all.push(value);
        }
        Ok(Value::Array(all))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut seen = HashSet::new();
        let mut members = serde_json::Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = map.next_value_seed(Unique { top: false })?;
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("the member '{name}' comes twice")));
            }
            if !value.is_null() || self.top && NULLABLE.contains(&&*name) {
                members.insert(name, value);
            }
        }
        Ok(Value::Object(members))
    }
}

/// A name for people. Lists print it, so it may not move a terminal's cursor.
pub(crate) fn checked_label(name: &str) -> Result<(), Problem> {
    if (1..=128).contains(&name.chars().count()) && !name.contains(char::is_control) {
        return Ok(());
    }
    Err(Problem::bad(
        "name: has to be 1 to 128 characters, none of them a control character",
    ))
}

/// Puts the members that were given over `current`'s; the others stay.
pub(crate) fn merged<T: Serialize + DeserializeOwned>(
    member: &str,
    current: &T,
    given: &Map<String, Value>,
) -> Result<T, Problem> {
    let mut whole = serde_json::to_value(current)
        .map_err(|error| Problem::bad(format!("{member}: {error}")))?;
    if let Value::Object(whole) = &mut whole {
        whole.extend(given.clone());
    }
    serde_path_to_error::deserialize(whole).map_err(|error| {
        let path = format!("{member}.{}", error.path());
        wrong(&path, &error.into_inner().to_string())
    })
}

/// The names in a path.
pub(crate) struct Names(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Names {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let names = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::bad("the path is not valid UTF-8"))?;
        Ok(Self(
            names
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        ))
    }
}

impl Names {
    pub(crate) fn find(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
    pub(crate) fn id<T: std::str::FromStr>(&self, name: &str) -> Result<T, Problem> {
        let given = self.find(name).unwrap_or_default();
        uuid(name, given)
    }
    pub(crate) fn function(&self) -> Result<FunctionId, Problem> {
        self.id("functionId")
    }
    pub(crate) fn version(&self) -> Result<(FunctionId, VersionId), Problem> {
        Ok((self.id("functionId")?, self.id("functionVersionId")?))
    }
}

fn uuid<T: std::str::FromStr>(name: &str, given: &str) -> Result<T, Problem> {
    given
        .parse()
        .map_err(|_| Problem::bad(format!("{name}: '{given}' is not a UUID, such as 0190a5f4-7a4c-7cc4-9d5b-3f1c2a8e6b70: copy the ID from the answer that made it")))
}

/// The query, as pairs: names may repeat.
pub(crate) struct Pairs(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Pairs {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(pairs)| Self(pairs))
            .map_err(|error| Problem::bad(format!("the query can't be read: {error}")))
    }
}

impl Pairs {
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let given = self.0.iter().filter(move |(n, _)| n == name);
        given.map(|(_, value)| value.as_str())
    }
    pub(crate) fn id<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Problem> {
        self.all(name).next().map(|v| uuid(name, v)).transpose()
    }
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Problem> {
        match self.all(name).next() {
            None => Ok(false),
            Some(v) if v.eq_ignore_ascii_case("true") => Ok(true),
            Some(v) if v.eq_ignore_ascii_case("false") => Ok(false),
            Some(v) => Err(Problem::bad(format!(
                "{name}: '{v}' is neither true nor false"
            ))),
        }
    }
}
