//! Why Weir itself answers instead of an instance.
//!
//! A closed list: each refusal has a stable code (`x-weir-error`), a status and
//! a text that tells the caller what to do. Codes are never renamed. What the
//! text may not contain: secrets, and anything of another account.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use weir_control::model::FunctionState;

/// On Weir's own errors and on nobody else's answers.
pub static ERROR_HEADER: HeaderName = HeaderName::from_static("x-weir-error");

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request can't be understood.
    BadRequest(String),
    /// The caller left before its request was whole.
    BodyBrokeOff,
    /// The head can't be read, or is too large: 400, 414 or 431.
    Unreadable(StatusCode),
    UnknownFunction,
    /// The request names none.
    NoFunction,
    NotInvokable {
        state: FunctionState,
        why: String,
        retry_after: Option<Duration>,
    },
    Unauthenticated(&'static str),
    Forbidden(String),
    BodyTooLarge {
        limit: u64,
    },
    RateLimited {
        retry_after: Duration,
    },
    QueueFull {
        what: String,
        retry_after: Duration,
    },
    /// No capacity can come, and why.
    NoCapacity(Arc<str>),
    StartTimeout {
        waited: Duration,
        retry_after: Duration,
    },
    BusyTimeout {
        waited: Duration,
        retry_after: Duration,
    },
    /// No instance took the connection.
    InstanceRefused,
    /// The request was on an instance that went away: it may have had an effect.
    InstanceLost,
    InstanceTimeout,
    Draining,
    Internal,
}

impl Refusal {
    /// For HTTP where TLS is asked for.
    #[must_use]
    pub fn without_tls() -> Self {
        let why =
            "This port speaks TLS. Use https://, and make a new key if one was sent in the clear.";
        Self::BadRequest(why.into())
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::BodyBrokeOff | Self::Unreadable(_) => "bad-request",
            Self::UnknownFunction | Self::NoFunction => "unknown-function",
            Self::NotInvokable { .. } => "not-invokable",
            Self::Unauthenticated(_) => "unauthenticated",
            Self::Forbidden(_) => "forbidden",
            Self::BodyTooLarge { .. } => "body-too-large",
            Self::RateLimited { .. } => "rate-limited",
            Self::QueueFull { .. } => "queue-full",
            Self::NoCapacity(_) => "no-capacity",
            Self::StartTimeout { .. } => "start-timeout",
            Self::BusyTimeout { .. } => "busy-timeout",
            Self::InstanceRefused => "instance-refused",
            Self::InstanceLost => "instance-lost",
            Self::InstanceTimeout => "instance-timeout",
            Self::Draining => "draining",
            Self::Internal => "internal",
        }
    }

    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::BodyBrokeOff => StatusCode::BAD_REQUEST,
            Self::Unreadable(status) => *status,
            Self::UnknownFunction | Self::NoFunction => StatusCode::NOT_FOUND,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RateLimited { .. } | Self::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::NotInvokable { .. } | Self::NoCapacity(_) | Self::Draining => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::StartTimeout { .. } | Self::BusyTimeout { .. } | Self::InstanceTimeout => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::InstanceRefused | Self::InstanceLost => StatusCode::BAD_GATEWAY,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotInvokable { retry_after, .. } => *retry_after,
            Self::RateLimited { retry_after }
            | Self::QueueFull { retry_after, .. }
            | Self::StartTimeout { retry_after, .. }
            | Self::BusyTimeout { retry_after, .. } => Some(*retry_after),
            Self::Draining => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// What happened and what the caller can do about it.
    #[must_use]
    pub fn detail(&self) -> String {
        match self {
            Self::BadRequest(why) => why.clone(),
            Self::BodyBrokeOff => "The body broke off before its end. Send it whole.".into(),
            Self::Unreadable(status) if *status == StatusCode::BAD_REQUEST => {
                "This is no request of HTTP/1.1 that can be read. Look at its first line, its fields \
                 and its length."
                    .into()
            }
            Self::Unreadable(_) => {
                "The head of the request is longer, or has more fields, than --max-head and \
                 --max-fields allow, or its content-length is no length that a body can have. Send less."
                    .into()
            }
            Self::UnknownFunction => {
                "There is no such function or version that this key may call, or it is not \
                 deployed. Check the ID, and deploy the version first."
                    .into()
            }
            Self::NoFunction => {
                "The request names no function: send the header function-id, call the host \
                 <functionId>.<anything>, or the path /v2/nvcf/pexec/functions/<functionId>."
                    .into()
            }
            Self::NotInvokable { state, why, .. } => format!(
                "The function is {}{why}; invocations are taken in ACTIVE and DEGRADING. Try again later, or look at \
                 the deployment.",
                state.as_str()
            ),
            Self::Unauthenticated(why) => {
                format!("{why} Send a valid key as 'Authorization: Bearer weir_...'.")
            }
            Self::Forbidden(why) => why.clone(),
            Self::BodyTooLarge { limit } => {
                format!("The body is larger than {limit} bytes. Send a smaller one.")
            }
            Self::RateLimited { .. } => {
                "Too many invocations. Wait for the time that Retry-After says.".into()
            }
            Self::QueueFull { what, .. } => {
                format!(
                    "The function's queue is full ({what}). Wait for the time that Retry-After says, or raise the limit."
                )
            }
            Self::NoCapacity(why) => format!(
                "No instance can serve this: {why}. Look at the deployment, and try again once it is mended."
            ),
            Self::StartTimeout { waited, .. } => format!(
                "No instance became ready within {:.1} s. Try again: a start may be under way.",
                waited.as_secs_f64()
            ),
            Self::BusyTimeout { waited, .. } => format!(
                "Every instance was busy for {:.1} s. Try again, or raise maxInstances or maxRequestConcurrency.",
                waited.as_secs_f64()
            ),
            Self::InstanceRefused => {
                "The instance did not take the connection; nothing was sent. Try again.".into()
            }
            Self::InstanceLost => {
                "The instance went away while it had the request, which may have had an effect. \
                 Repeat it only if that is safe."
                    .into()
            }
            Self::InstanceTimeout => {
                "The instance did not answer in time; the request may have had an effect. Repeat it \
                 only if that is safe, or raise --request-timeout."
                    .into()
            }
            Self::Draining => "Weir is stopping. Try again: another one, or the next, takes it.".into(),
            Self::Internal => "Something broke inside Weir; the log has the request ID.".into(),
        }
    }

    /// The problem document (RFC 9457).
    #[must_use]
    pub fn response(&self, request_id: uuid::Uuid) -> Response<Bytes> {
        let status = self.status();
        let body = serde_json::json!({
            "type": format!("urn:weir:problem:{}", self.code()),
            "title": status.canonical_reason().unwrap_or("Error"),
            "status": status.as_u16(),
            "detail": self.detail(),
            "requestId": request_id,
        });
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(ERROR_HEADER.clone(), HeaderValue::from_static(self.code()));
        if let Some(retry_after) = self.retry_after() {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from(retry_after_seconds(retry_after)),
            );
        }
        if matches!(self, Self::Unauthenticated(_)) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Whole seconds, from 1 to 60.
fn retry_after_seconds(wait: Duration) -> u64 {
    (wait.as_secs_f64().ceil() as u64).clamp(1, 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_a_problem_document_with_a_stable_code() {
        let id = uuid::Uuid::new_v4();
        let refusal = Refusal::QueueFull {
            what: "1000 requests".into(),
            retry_after: Duration::from_millis(2100),
        };
        let response = refusal.response(id);
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["x-weir-error"], "queue-full");
        assert_eq!(response.headers()["retry-after"], "3");
        let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(body["type"], "urn:weir:problem:queue-full");
        assert_eq!(body["requestId"], id.to_string());
    }

    #[test]
    fn retry_after_stays_between_a_second_and_a_minute() {
        assert_eq!(retry_after_seconds(Duration::ZERO), 1);
        assert_eq!(retry_after_seconds(Duration::from_secs(3600)), 60);
    }
}
