//! Reads a trace: when requests come, and how long an instance has each.
//!
//! Two formats, told apart by what the file begins with: the CSV of the Azure
//! LLM traces and the JSON lines of the Mooncake traces. Of both, all that
//! counts are arrival, prompt tokens and generated tokens.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Format {
    Azure,
    Mooncake,
}

/// One request of the trace, at the replay's speed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// After the trace's first request.
    pub(super) at: Duration,
    pub(super) service: Duration,
    pub(super) bytes: u64,
}

/// How a trace's requests become the replay's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) speed: f64,
    pub(super) prefill_ms: f64,
    pub(super) decode_ms: f64,
}

#[derive(Debug, PartialEq)]
struct Record {
    /// From a time that is the same for the whole trace.
    seconds: f64,
    context: u64,
    generated: u64,
}

pub(super) fn read(path: &Path, pace: Pace) -> anyhow::Result<(Format, Vec<Planned>)> {
    let bytes =
        std::fs::read(path).with_context(|| format!("could not open {}", path.display()))?;
    plan(&bytes, pace).with_context(|| format!("could not read {}", path.display()))
}

pub(super) fn plan(bytes: &[u8], pace: Pace) -> anyhow::Result<(Format, Vec<Planned>)> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = line_at(bytes, error.valid_up_to());
        anyhow!("line {line} is not UTF-8: this is no trace")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let format = recognise(text)?;
    let mut records = match format {
        Format::Azure => azure(text)?,
        Format::Mooncake => mooncake(text)?,
    };
    records.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
    let Some(first) = records.first().map(|record| record.seconds) else {
        bail!("the trace has no requests");
    };
    let plan = records
        .into_iter()
        .map(|record| {
            let service_ms =
                record.context as f64 * pace.prefill_ms + record.generated as f64 * pace.decode_ms;
            Ok(Planned {
                at: Duration::try_from_secs_f64((record.seconds - first) / pace.speed)?,
                service: Duration::try_from_secs_f64(service_ms / 1e3 / pace.speed)?,
                // A token of English is about four bytes.
                bytes: record.generated.saturating_mul(4),
            })
        })
        .collect::<anyhow::Result<_>>()?;
    Ok((format, plan))
}

fn recognise(text: &str) -> anyhow::Result<Format> {
    let mut lines = text.lines().zip(1..);
    let Some((line, number)) = lines.find(|(line, _)| !line.trim().is_empty()) else {
        bail!("the file is empty");
    };
    if line.trim_start().starts_with('{') {
        return Ok(Format::Mooncake);
    }
    let columns: Vec<&str> = line
        .split(',')
        .map(|column| column.trim().trim_matches('"'))
        .collect();
    if AZURE_COLUMNS.iter().all(|column| columns.contains(column)) {
        return Ok(Format::Azure);
    }
    let start: String = line.chars().take(60).collect();
    bail!(
        "line {number} begins neither an Azure LLM trace (a CSV header with {}) \
         nor a Mooncake trace (a JSON object with timestamp, input_length and \
         output_length): {start:?}",
        AZURE_COLUMNS.join(",")
    );
}

const AZURE_COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

fn azure(text: &str) -> anyhow::Result<Vec<Record>> {
    #[derive(Deserialize)]
    struct Row {
        #[serde(rename = "TIMESTAMP")]
        timestamp: String,
        #[serde(rename = "ContextTokens")]
        context: u64,
        #[serde(rename = "GeneratedTokens")]
        generated: u64,
    }
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let header = reader.headers()?.clone();
    let mut record = csv::StringRecord::new();
    let mut first = None;
    let mut records = Vec::new();
    loop {
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => return Ok(records),
            Err(error) => return Err(at_line(line_of(text, error.position()), &error, &header)),
        }
        let line = || line_of(text, record.position());
        let row: Row = record
            .deserialize(Some(&header))
            .map_err(|error| at_line(line(), &error, &header))?;
        let timestamp = timestamp(&row.timestamp)
            .with_context(|| format!("line {}: TIMESTAMP {:?}", line(), row.timestamp))?;
        let since = timestamp.duration_since(*first.get_or_insert(timestamp));
        records.push(Record {
            seconds: since.as_secs_f64(),
            context: row.context,
            generated: row.generated,
        });
    }
}

/// The traces of 2023 have no offset, which is UTC; later ones do.
fn timestamp(text: &str) -> Result<jiff::Timestamp, jiff::Error> {
    text.parse()
        .or_else(|_| jiff::tz::TimeZone::UTC.to_timestamp(text.parse::<jiff::civil::DateTime>()?))
}

fn at_line(line: usize, error: &csv::Error, header: &csv::StringRecord) -> anyhow::Error {
    match error.kind() {
        csv::ErrorKind::Deserialize { err, .. } => {
            let field = err.field().and_then(|field| header.get(field as usize));
            let field = field.map(|name| format!("{name}: ")).unwrap_or_default();
            anyhow!("line {line}: {field}{}", err.kind())
        }
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => anyhow!("line {line}: {len} fields, where the header has {expected_len}"),
        _ => anyhow!("line {line}: {error}"),
    }
}

/// A record's position is where the last one ended: line ends and empty lines
/// may be between.
fn line_of(text: &str, position: Option<&csv::Position>) -> usize {
    let from = position.map_or(0, |position| position.byte() as usize);
    let rest = text.as_bytes().iter().skip(from);
    let skipped = rest.take_while(|byte| b"\r\n".contains(byte)).count();
    line_at(text.as_bytes(), from + skipped)
}

/// The line that a byte is on.
fn line_at(bytes: &[u8], place: usize) -> usize {
    let before = bytes.iter().take(place);
    before.filter(|&&byte| byte == b'\n').count() + 1
}

fn mooncake(text: &str) -> anyhow::Result<Vec<Record>> {
    /// `hash_ids` is of no use here: no instance keeps a cache.
    #[derive(Deserialize)]
    struct Line {
        timestamp: f64,
        input_length: u64,
        output_length: u64,
    }
    text.lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, number)| {
            let line: Line = serde_json::from_str(line).map_err(|error| {
                // Its own line is always the first.
                let place = format!(" at line {} column {}", error.line(), error.column());
                let message = error.to_string();
                let message = message.strip_suffix(&place).unwrap_or(&message);
                anyhow!("line {number}, column {}: {message}", error.column())
            })?;
            Ok(Record {
                seconds: line.timestamp / 1e3,
                context: line.input_length,
                generated: line.output_length,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
