//! Errors as RFC 9457 problem documents, and the request ID of every answer.

use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{auth::Denied, store::StoreError};

const REQUEST_ID: HeaderName = HeaderName::from_static("nvcf-reqid");
/// Characters of a detail.
const LONGEST: usize = 1000;
const CODE: HeaderName = HeaderName::from_static("x-weir-error");

/// What went wrong and what to do about it. It becomes a document in [`answer`].
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    /// Stable; the `x-weir-error` header.
    pub(crate) code: &'static str,
    pub(crate) detail: String,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        // It may quote what was sent.
        if let Some((end, _)) = detail.char_indices().nth(LONGEST) {
            detail.truncate(end);
            detail.push('…');
        }
        Self {
            status,
            code,
            detail,
        }
    }
    pub(crate) fn bad(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad-request", detail)
    }
    pub(crate) fn missing(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }
    pub(crate) fn unknown_function(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown-function", detail)
    }
    pub(crate) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }
    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", detail)
    }
    pub(crate) fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", detail)
    }
    fn method() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "bad-request",
            "this path does not take that method: see the Allow header, or /openapi.json",
        )
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            denied.to_string(),
        )
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict { .. } => {
                Self::conflict(format!("{error}: read it and try again"))
            }
            StoreError::Unavailable(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "store-unavailable",
                format!("{error}; nothing was changed, try again later"),
            ),
            StoreError::Unknown(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "store-unavailable",
                format!(
                    "{error}; the change may have been made: read it again before you repeat it"
                ),
            ),
            StoreError::Damaged(_) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                error.to_string(),
            ),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The document itself, RFC 9457.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Problem)]
pub(crate) struct ProblemDocument {
    /// Stable: `urn:weir:problem:` and the code of the `x-weir-error` header.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The status' name.
    pub(crate) title: String,
    /// The HTTP status.
    pub(crate) status: u16,
    /// What happened, and what to do.
    pub(crate) detail: String,
    /// The path that was asked for.
    pub(crate) instance: String,
    /// The `NVCF-REQID` of the answer.
    #[schema(value_type = String)]
    pub(crate) request_id: Uuid,
}

/// Writes problems out and gives every answer its request ID.
pub(crate) async fn answer(request: Request, next: Next) -> Response {
    let request_id = Uuid::now_v7();
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        let document = ProblemDocument {
            kind: format!("urn:weir:problem:{}", problem.code),
            title: problem
                .status
                .canonical_reason()
                .unwrap_or("Error")
                .to_owned(),
            status: problem.status.as_u16(),
            detail: problem.detail,
            instance: path,
            request_id,
        };
        let (parts, _) = response.into_parts();
        response = (problem.status, axum::Json(document)).into_response();
        if let Some(allow) = parts.headers.get(header::ALLOW) {
            response.headers_mut().insert(header::ALLOW, allow.clone());
        }
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(CODE, HeaderValue::from_static(problem.code));
        if problem.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
    if let Ok(id) = HeaderValue::from_str(&request_id.to_string()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// What NVCF has under `/v2/nvcf` and this build has not.
const ABSENT: [&str; 7] = [
    "assets",
    "clients",
    "recognized-registries",
    "registry-credentials",
    "secrets",
    "telemetries",
    "tokens",
];

pub(crate) async fn no_path(request: Request) -> Problem {
    let path = request.uri().path();
    let absent = ABSENT.iter().find(|part| {
        path.strip_prefix("/v2/nvcf/")
            .is_some_and(|rest| rest.split('/').any(|segment| segment == **part))
    });
    Problem::missing(match absent {
        Some(part) => format!(
            "this build has no {part}, so nothing was done: leave the call out; /openapi.json lists what there is"
        ),
        None => format!("there is nothing at '{path}': see /openapi.json for the paths there are"),
    })
}

pub(crate) async fn no_method() -> Problem {
    Problem::method()
}
