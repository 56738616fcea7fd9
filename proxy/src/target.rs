//! Which function, and perhaps which version, a request is for.
//!
//! The first source that is there decides: the headers `function-id` and
//! `function-version-id`, then the host name, then the pexec path. A header
//! that is there and is no UUID is an error, and so are two sources that name
//! different functions: guessing would send one caller's data to another's
//! function.

use http::{HeaderMap, Uri, request::Parts};
use uuid::Uuid;
use weir_control::model::{FunctionId, VersionId};

use crate::refusal::Refusal;

const PEXEC: &str = "/v2/nvcf/pexec/functions/";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub function: FunctionId,
    pub version: Option<VersionId>,
    pub path: PathRule,
}

/// Which path the instance gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathRule {
    /// The caller's own path and query.
    Callers,
    /// The version's `inferenceUrl` with the caller's query.
    InferenceUrl,
}

impl Target {
    /// `None`: the request names no function at all.
    pub fn of(request: &Parts) -> Result<Option<Self>, Refusal> {
        let by_header = Self::of_headers(&request.headers)?;
        let by_host = host_of(request).and_then(Self::of_host);
        let by_path = Self::of_path(&request.uri)?;
        let sources = [by_header, by_host, by_path];
        let mut named = sources.into_iter().flatten();
        let Some(first) = named.next() else {
            return Ok(None);
        };
        for other in named {
            let versions_differ =
                matches!((first.version, other.version), (Some(a), Some(b)) if a != b);
            if other.function != first.function || versions_differ {
                return Err(Refusal::BadRequest(
                    "The headers, the host name and the path name different functions. Name one."
                        .into(),
                ));
            }
        }
        Ok(Some(first))
    }

    fn of_headers(headers: &HeaderMap) -> Result<Option<Self>, Refusal> {
        let function = uuid_header(headers, "function-id")?;
        let version = uuid_header(headers, "function-version-id")?;
        match (function, version) {
            (Some(function), version) => Ok(Some(Self {
                function: FunctionId(function),
                version: version.map(VersionId),
                path: PathRule::Callers,
            })),
            (None, Some(_)) => Err(Refusal::BadRequest(
                "The header function-version-id needs function-id beside it. Send both.".into(),
            )),
            (None, None) => Ok(None),
        }
    }

    /// `<functionId>.<anything>` or `<versionId>.<functionId>.<anything>`.
    fn of_host(host: &str) -> Option<Self> {
        let mut labels = host.split('.');
        let first: Uuid = hyphenated(labels.next()?)?;
        let second = labels.next()?;
        Some(match hyphenated(second) {
            Some(function) => {
                labels.next()?;
                Self {
                    function: FunctionId(function),
                    version: Some(VersionId(first)),
                    path: PathRule::Callers,
                }
            }
            None => Self {
                function: FunctionId(first),
                version: None,
                path: PathRule::Callers,
            },
        })
    }

    fn of_path(uri: &Uri) -> Result<Option<Self>, Refusal> {
        let Some(rest) = uri.path().strip_prefix(PEXEC) else {
            return Ok(None);
        };
        let mut parts = rest.trim_end_matches('/').split('/');
        let id = |text: &str, what: &str| {
            text.parse::<Uuid>().map_err(|_| {
                Refusal::BadRequest(format!(
                    "'{}' in the path is no {what} ID (a UUID). Copy it from `weir function list`.",
                    shown(text)
                ))
            })
        };
        let function = id(parts.next().unwrap_or_default(), "function")?;
        let version = match (parts.next(), parts.next(), parts.next()) {
            (None, _, _) => None,
            (Some("versions"), Some(version), None) => Some(id(version, "version")?),
            _ => {
                return Err(Refusal::BadRequest(format!(
                    "The path must be {PEXEC}ID or {PEXEC}ID/versions/ID."
                )));
            }
        };
        Ok(Some(Self {
            function: FunctionId(function),
            version: version.map(VersionId),
            path: PathRule::InferenceUrl,
        }))
    }
}

/// The host a request is for: the URI's authority (HTTP/2), else the Host field; without its port.
fn host_of(request: &Parts) -> Option<&str> {
    let host = match request.uri.authority() {
        Some(authority) => authority.host(),
        None => request.headers.get(http::header::HOST)?.to_str().ok()?,
    };
    Some(host.split_once(':').map_or(host, |(name, _)| name))
}

fn uuid_header(headers: &HeaderMap, name: &'static str) -> Result<Option<Uuid>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Refusal::BadRequest(format!(
            "The header {name} is there twice. Send it once."
        )));
    }
    let text = value.to_str().unwrap_or_default();
    hyphenated(text).map(Some).ok_or_else(|| {
        Refusal::BadRequest(format!(
            "The header {name} is '{}', which is no UUID. Copy it from `weir function list`.",
            shown(text)
        ))
    })
}

fn hyphenated(text: &str) -> Option<Uuid> {
    (text.len() == 36).then(|| text.parse().ok()).flatten()
}

/// At most 64 characters of what the caller sent.
fn shown(text: &str) -> &str {
    text.char_indices()
        .nth(64)
        .map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    const F: &str = "11111111-1111-4111-8111-111111111111";
    const V: &str = "22222222-2222-4222-8222-222222222222";

    fn target(uri: &str, headers: &[(&str, &str)]) -> Result<Option<Target>, Refusal> {
        let mut request = http::Request::get(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Target::of(&request.body(()).unwrap().into_parts().0)
    }

    fn found(version: bool, path: PathRule) -> Result<Option<Target>, Refusal> {
        let version = version.then(|| V.parse().unwrap());
        Ok(Some(Target {
            function: F.parse().unwrap(),
            version,
            path,
        }))
    }

    #[test]
    fn each_source_names_function_and_version() {
        assert_eq!(
            target("/x", &[("function-id", F)]),
            found(false, PathRule::Callers)
        );
        assert_eq!(
            target("/x", &[("function-id", F), ("function-version-id", V)]),
            found(true, PathRule::Callers)
        );
        assert_eq!(
            target("/x", &[("host", &format!("{F}.weir.local:80"))]),
            found(false, PathRule::Callers)
        );
        assert_eq!(
            target("/x", &[("host", &format!("{V}.{F}.weir.local"))]),
            found(true, PathRule::Callers)
        );
        assert_eq!(
            target(&format!("http://{V}.{F}.weir.local/x"), &[]),
            found(true, PathRule::Callers)
        );
        assert_eq!(
            target(&format!("{PEXEC}{F}"), &[]),
            found(false, PathRule::InferenceUrl)
        );
        assert_eq!(
            target(&format!("{PEXEC}{F}/versions/{V}?a=b"), &[]),
            found(true, PathRule::InferenceUrl)
        );
        assert_eq!(target("/x", &[("host", "weir.local")]), Ok(None));
    }

    #[test]
    fn headers_win_and_contradictions_are_refused() {
        assert_eq!(
            target(&format!("{PEXEC}{F}"), &[("function-id", F)]),
            found(false, PathRule::Callers)
        );
        assert!(target(&format!("{PEXEC}{V}"), &[("function-id", F)]).is_err());
        assert!(target("/x", &[("function-id", F), ("host", &format!("{V}.x.y"))]).is_err());
    }

    #[test]
    fn what_is_no_uuid_is_refused_not_ignored() {
        assert!(target("/x", &[("function-id", "abc")]).is_err());
        assert!(target("/x", &[("function-version-id", V)]).is_err());
        assert!(target(&format!("{PEXEC}abc"), &[]).is_err());
        assert!(target(&format!("{PEXEC}{F}/versions"), &[]).is_err());
        assert!(target(&format!("{PEXEC}{F}/other/{V}"), &[]).is_err());
        assert!(target("/x", &[("function-id", F), ("function-id", F)]).is_err());
    }
}
