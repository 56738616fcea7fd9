//! What changes on a head between caller and instance.

use std::{sync::LazyLock, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use uuid::Uuid;
use weir_control::model::{Key, Version};

use crate::{
    core::{Caller, Settings},
    refusal::{ERROR_HEADER, Refusal},
};

pub static REQUEST_ID: HeaderName = HeaderName::from_static("nvcf-reqid");
static STATUS: HeaderName = HeaderName::from_static("nvcf-status");

/// Fields that concern one connection, besides those that `Connection` names.
static HOP_BY_HOP: LazyLock<[HeaderName; 9]> = LazyLock::new(|| {
    [
        header::CONNECTION,
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("keep-alive"),
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
    ]
});

/// Fields by which an instance knows who calls it and where it is: Weir alone sets them.
const TRUSTED: [&str; 3] = ["forwarded", "x-real-ip", "x-weir-error"];
const TRUSTED_PREFIXES: [&str; 2] = ["nvcf-", "x-forwarded-"];

/// Servers that hand fields on as variables (CGI, WSGI) take `_` and `-` for the same.
fn trusted(name: &HeaderName) -> bool {
    let same = |name: &[u8], other: &str| {
        let dashed = name.iter().map(|&b| if b == b'_' { b'-' } else { b });
        dashed.eq(other.bytes())
    };
    let name = name.as_str().as_bytes();
    let begins = |prefix: &&str| {
        let start = name.get(..prefix.len());
        start.is_some_and(|start| same(start, prefix))
    };
    TRUSTED.iter().any(|other| same(name, other)) || TRUSTED_PREFIXES.iter().any(begins)
}

fn drop_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
            .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
            // Framing and the host can't be named away.
            .filter(|name| *name != header::CONTENT_LENGTH && *name != header::HOST)
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in HOP_BY_HOP.iter() {
        headers.remove(name);
    }
}

/// Refuses heads whose framing or host could be read in two ways.
pub fn check(request: &Parts) -> Result<(), Refusal> {
    let bad = |why: &str| Err(Refusal::BadRequest(why.into()));
    if request.method == http::Method::CONNECT {
        return bad("CONNECT asks for a tunnel, and Weir makes none.");
    }
    if request.uri.path() == "*" && request.method != http::Method::OPTIONS {
        return bad("The target '*' is for OPTIONS alone.");
    }
    let mut hosts = request.headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => {
            let valid = host.to_str().is_ok_and(|host| {
                host.is_empty()
                    || (!host.contains('@') && host.parse::<http::uri::Authority>().is_ok())
            });
            if !valid {
                return bad("The Host field is no host name.");
            }
        }
        (None, _) if request.version == http::Version::HTTP_11 => {
            return bad("HTTP/1.1 needs one Host field.");
        }
        (None, _) => {}
        (Some(_), Some(_)) => return bad("There are two Host fields. Send one."),
    }
    if request.version < http::Version::HTTP_2 {
        let mut codings = request.headers.get_all(header::TRANSFER_ENCODING).iter();
        if let Some(coding) = codings.next() {
            let chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked");
            if !chunked || codings.next().is_some() || request.version == http::Version::HTTP_10 {
                return bad("Transfer-Encoding may be 'chunked', once, on HTTP/1.1.");
            }
        }
    }
    Ok(())
}

/// Refuses heads that are larger than allowed. The whole head's size is hyper's to watch.
pub fn within(request: &Parts, settings: &Settings) -> Result<(), Refusal> {
    let bad = |why: String| Err(Refusal::BadRequest(why));
    let path = request.uri.path_and_query();
    let limit = settings.max_uri;
    if path.is_some_and(|path| path.as_str().len() as u64 > limit) {
        return bad(format!("The path and query are longer than {limit} bytes."));
    }
    let limit = settings.max_fields;
    if request.headers.len() > limit {
        return bad(format!("There are more than {limit} header fields."));
    }
    Ok(())
}

/// Makes the caller's head into the instance's. `left` is what is left of the time that the caller gave. Each attempt
/// tells of the trace besides.
pub fn forward(
    request: &mut Parts,
    caller: &Caller,
    version: &Version,
    key: &Key,
    left: Option<Duration>,
) {
    // What the target itself names comes before the Host field (RFC 9112, 3.2.2).
    let host = request
        .uri
        .authority()
        .and_then(|authority| {
            let name = authority.as_str().rsplit('@').next()?;
            HeaderValue::from_str(name).ok()
        })
        .or_else(|| request.headers.get(header::HOST).cloned());
    let headers = &mut request.headers;
    drop_hop_by_hop(headers);
    join_cookies(headers);
    // A credential is for Weir alone.
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::EXPECT);
    let spoofed: Vec<HeaderName> = headers
        .keys()
        .filter(|name| trusted(name))
        .cloned()
        .collect();
    for name in spoofed {
        headers.remove(name);
    }
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    set(
        "nvcf-reqid",
        caller
            .request_id
            .as_hyphenated()
            .encode_lower(&mut Uuid::encode_buffer()),
    );
    set("nvcf-sub", &key.id.to_string());
    set("nvcf-ncaid", &key.account.0);
    if let Some(left) = left {
        let seconds = left.as_secs_f64().ceil().max(1.0);
        set("nvcf-poll-seconds", &seconds.to_string());
    }
    set("nvcf-function-name", &version.name);
    set(
        "nvcf-function-id",
        version
            .function
            .0
            .as_hyphenated()
            .encode_lower(&mut Uuid::encode_buffer()),
    );
    set(
        "nvcf-function-version-id",
        version
            .id
            .0
            .as_hyphenated()
            .encode_lower(&mut Uuid::encode_buffer()),
    );
    set("x-forwarded-for", &caller.peer.to_string());
    set("x-forwarded-proto", caller.scheme.spoken());
    if let Some(host) = &host {
        headers.insert(HeaderName::from_static("x-forwarded-host"), host.clone());
    }
    // HTTP/1.1 has one, if an empty one.
    headers.insert(
        header::HOST,
        host.unwrap_or_else(|| HeaderValue::from_static("")),
    );
    request.version = http::Version::HTTP_11;
}

/// HTTP/2 may send each cookie in a field of its own, HTTP/1.1 has one field for all (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies = headers.get_all(header::COOKIE);
    if cookies.iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = cookies.iter().map(HeaderValue::as_bytes).collect();
    if let Ok(all) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(header::COOKIE, all);
    }
}

/// Makes the instance's head into the caller's.
pub fn answer(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // The coding says where the body ends.
        headers.remove(header::CONTENT_LENGTH);
    }
    drop_hop_by_hop(headers);
    headers.remove(&ERROR_HEADER);
}

/// Makes the instance's trailers into the caller's: what Weir says in a head, nobody else says in a trailer.
pub fn trailers(trailers: &mut HeaderMap) {
    for name in [&ERROR_HEADER, &REQUEST_ID, &STATUS] {
        trailers.remove(name);
    }
}

/// The two fields that every answer has; `identified` says whether the request named a function.
pub fn mark(headers: &mut HeaderMap, request_id: Uuid, status: StatusCode, identified: bool) {
    let mut buffer = Uuid::encode_buffer();
    if let Ok(value) = HeaderValue::from_str(request_id.as_hyphenated().encode_lower(&mut buffer)) {
        headers.insert(REQUEST_ID.clone(), value);
    }
    if identified {
        let text = match status.as_u16() {
            202 => "in-progress",
            200..=399 => "fulfilled",
            _ => "errored",
        };
        headers.insert(STATUS.clone(), HeaderValue::from_static(text));
    } else {
        headers.remove(&STATUS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_and_named_fields_go() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-mine, content-length"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("content-length", "3"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        drop_hop_by_hop(&mut headers);
        assert_eq!(headers.len(), 1);
        assert_eq!(headers["content-length"], "3");
        // One name that is none does not save the others.
        let named = HeaderValue::from_bytes(b"x-mine, \xe9").unwrap();
        headers.insert("connection", named);
        headers.insert("x-mine", HeaderValue::from_static("1"));
        drop_hop_by_hop(&mut headers);
        assert_eq!(headers.len(), 1);
    }

    #[test]
    fn cookies_are_one_field() {
        let mut headers = HeaderMap::new();
        for cookie in ["a=1", "b=2; c=3"] {
            headers.append("cookie", HeaderValue::from_static(cookie));
        }
        join_cookies(&mut headers);
        assert_eq!(headers.get_all("cookie").iter().count(), 1);
        assert_eq!(headers["cookie"], "a=1; b=2; c=3");
    }

    #[test]
    fn what_weir_tells_an_instance_no_caller_can_tell() {
        for spoofed in [
            "nvcf-sub",
            "nvcf_sub",
            "nvcf-asset-dir",
            "nvcf-poll-seconds",
            "x-forwarded-user",
            "x_forwarded_for",
        ] {
            assert!(trusted(&HeaderName::from_static(spoofed)), "{spoofed}");
        }
        for plain in ["x-mine", "x-nvcf", "nvcf", "x-forwarded"] {
            assert!(!trusted(&HeaderName::from_static(plain)), "{plain}");
        }
    }

    #[test]
    fn ambiguous_heads_are_refused() {
        let head = |fields: &[(&str, &str)]| {
            let mut request = http::Request::get("/");
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            check(&request.body(()).unwrap().into_parts().0)
        };
        assert!(head(&[("host", "a.example")]).is_ok());
        assert!(head(&[]).is_err());
        assert!(head(&[("host", "a"), ("host", "b")]).is_err());
        assert!(head(&[("host", "a@b")]).is_err());
        assert!(head(&[("host", "a"), ("transfer-encoding", "chunked")]).is_ok());
        assert!(head(&[("host", "a"), ("transfer-encoding", "gzip, chunked")]).is_err());
        let over_http2 = |host: &str| {
            let request = http::Request::get("/").version(http::Version::HTTP_2);
            let request = request.header("host", host).body(()).unwrap();
            check(&request.into_parts().0)
        };
        assert!(over_http2("a.example").is_ok());
        assert!(over_http2("a b,c@d").is_err());
    }
}
