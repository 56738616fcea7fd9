//! W3C Trace Context: `traceparent` and `tracestate`, in and out.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

static TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");

/// Of a `traceparent`: its sender records this trace.
const SAMPLED: u8 = 1;
/// The trace's ID is random (level 2); passed on and not set, since few know it yet.
const RANDOM: u8 = 2;

/// Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(pub u128);

/// Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(pub u64);

impl TraceId {
    fn random() -> Self {
        Self(rand::random::<u128>().max(1))
    }
}

impl SpanId {
    #[must_use]
    pub fn random() -> Self {
        Self(rand::random::<u64>().max(1))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A request's place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    pub trace: TraceId,
    /// The caller's span; absent where the trace begins here.
    pub parent: Option<SpanId>,
    flags: u8,
    /// Weir has spans: instances hear of those, and not of the caller's.
    takes_part: bool,
}

impl Context {
    /// Goes on with the caller's trace, or begins one where there is none or none that can be read. `takes_part`: Weir
    /// has spans, sampled as the caller says, else as `sample` does.
    pub fn of(headers: &HeaderMap, takes_part: bool, sample: impl FnOnce(TraceId) -> bool) -> Self {
        let mut parents = headers.get_all(&TRACE_PARENT).iter();
        let parent = match (parents.next(), parents.next()) {
            (Some(parent), None) => parse(parent.as_bytes()),
            // None, or several that contradict each other.
            _ => None,
        };
        if let Some((trace, parent, flags)) = parent {
            return Self {
                trace,
                parent: Some(parent),
                flags: flags & (SAMPLED | RANDOM),
                takes_part,
            };
        }
        let trace = TraceId::random();
        Self {
            trace,
            parent: None,
            flags: if takes_part && sample(trace) {
                SAMPLED
            } else {
                0
            },
            takes_part,
        }
    }

    /// Whether Weir records it.
    #[must_use]
    pub fn sampled(&self) -> bool {
        self.takes_part && self.flags & SAMPLED != 0
    }

    /// Tells an instance, whose request is this span.
    pub fn tell(&self, span: SpanId, headers: &mut HeaderMap) {
        if self.parent.is_none() {
            // It belongs to a trace that could not be read.
            headers.remove(&TRACE_STATE);
        } else if !self.takes_part {
            // The caller's own words.
            return;
        }
        if let Ok(value) = HeaderValue::from_bytes(&self.written(span)) {
            headers.insert(TRACE_PARENT.clone(), value);
        }
    }

    fn written(&self, span: SpanId) -> [u8; 55] {
        let mut text = *b"00-________________________________-________________-__";
        hex(self.trace.0, &mut text[3..35]);
        hex(span.0.into(), &mut text[36..52]);
        hex(self.flags.into(), &mut text[53..]);
        text
    }
}

fn hex(mut number: u128, out: &mut [u8]) {
    for digit in out.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

/// `VERSION-TRACE-PARENT-FLAGS`, all in lower hexadecimal digits.
fn parse(text: &[u8]) -> Option<(TraceId, SpanId, u8)> {
    let known = text.get(..55)?;
    let dashes = [2, 35, 52].iter().all(|&at| known[at] == b'-');
    let version = number(&known[..2])?;
    // Version 00 ends there, later ones may go on with another field.
    let ends = match version {
        0 => text.len() == 55,
        0xff => false,
        _ => text.get(55).is_none_or(|&next| next == b'-'),
    };
    let trace = number(&known[3..35])?;
    let parent = number(&known[36..52])?;
    let flags = number(&known[53..])?;
    (dashes && ends && trace != 0 && parent != 0).then_some((
        TraceId(trace),
        SpanId(u64::try_from(parent).ok()?),
        u8::try_from(flags).ok()?,
    ))
}

fn number(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, &digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, value);
        }
        headers
    }

    fn context(parent: &str, takes_part: bool) -> Context {
        Context::of(&headers(&[("traceparent", parent)]), takes_part, |_| false)
    }

    #[test]
    fn a_callers_trace_goes_on_as_sampled_as_it_was() {
        for (flags, sampled) in [("00", false), ("01", true), ("ff", true), ("02", false)] {
            let context = context(&format!("00-{TRACE}-{PARENT}-{flags}"), true);
            assert_eq!(context.trace.to_string(), TRACE);
            assert_eq!(context.parent.unwrap().to_string(), PARENT);
            assert_eq!(context.sampled(), sampled, "{flags}");
        }
        // A later version, of which only what is known is read.
        for rest in ["", "-more"] {
            let context = context(&format!("01-{TRACE}-{PARENT}-01{rest}"), true);
            assert_eq!(context.trace.to_string(), TRACE);
        }
    }

    #[test]
    fn what_is_no_traceparent_begins_a_new_trace() {
        let zeros = "0".repeat(32);
        let upper = TRACE.to_uppercase();
        for parent in [
            String::new(),
            "00".into(),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-01-more"),
            format!("01-{TRACE}-{PARENT}-01more"),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("00-{zeros}-{PARENT}-01"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{upper}-{PARENT}-01"),
            format!("00-{TRACE}-{PARENT}-0g"),
            format!("00_{TRACE}-{PARENT}-01"),
        ] {
            let context = context(&parent, true);
            assert_eq!((context.parent, context.sampled()), (None, false));
            assert_ne!(context.trace.to_string(), TRACE, "{parent}");
        }
        let parent = format!("00-{TRACE}-{PARENT}-01");
        let twice = headers(&[("traceparent", &parent), ("traceparent", &parent)]);
        assert_eq!(Context::of(&twice, true, |_| false).parent, None);
    }

    #[test]
    fn an_instance_hears_of_the_attempt() {
        let mut told = headers(&[
            ("traceparent", &format!("00-{TRACE}-{PARENT}-01")),
            ("tracestate", "a=b"),
        ]);
        let context = Context::of(&told, true, |_| false);
        context.tell(SpanId(0xab), &mut told);
        assert_eq!(
            told["traceparent"],
            format!("00-{TRACE}-00000000000000ab-01")
        );
        assert_eq!(told["tracestate"], "a=b");
    }

    #[test]
    fn without_spans_the_callers_words_pass() {
        let parent = format!("01-{TRACE}-{PARENT}-03-more");
        let mut told = headers(&[("traceparent", &parent)]);
        let context = Context::of(&told, false, |_| false);
        assert!(!context.sampled());
        context.tell(SpanId::random(), &mut told);
        assert_eq!(told["traceparent"], parent);
    }

    #[test]
    fn a_new_trace_is_told_without_a_foreign_state() {
        for takes_part in [false, true] {
            let mut told = headers(&[("traceparent", "nonsense"), ("tracestate", "a=b")]);
            let context = Context::of(&told, takes_part, |_| true);
            assert_eq!(context.sampled(), takes_part);
            context.tell(SpanId(1), &mut told);
            let parent = format!(
                "00-{}-0000000000000001-0{}",
                context.trace,
                u8::from(takes_part)
            );
            assert_eq!(told["traceparent"], parent);
            assert_eq!(told.get("tracestate"), None);
        }
    }
}
