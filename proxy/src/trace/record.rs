//! What a sampled request leaves behind, in plain values.

use std::{
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use weir_control::model::{FunctionId, InstanceId, VersionId};

use super::{Context, SpanId};
use crate::target::PathRule;

/// Written by the account, and whole once the request is over.
#[derive(Debug)]
pub struct Record {
    pub context: Context,
    /// Of the request's own span.
    pub span: SpanId,
    pub request_id: Uuid,
    pub peer: IpAddr,
    /// `http` or `https`, as the caller used it.
    pub scheme: &'static str,
    pub method: &'static str,
    pub protocol: http::Version,
    /// The same moment, by both clocks.
    pub arrived: (Instant, SystemTime),
    pub ended: Instant,
    /// How the path was used; absent as long as no function is known.
    pub path: Option<PathRule>,
    /// Whether the caller named the version.
    pub version_named: bool,
    pub function: Option<FunctionId>,
    pub version: Option<VersionId>,
    pub status: u16,
    pub error: Option<&'static str>,
    /// Of the answer's body, in bytes.
    pub sent: u64,
    pub phases: Vec<Phase>,
}

/// In the order of their beginnings.
#[derive(Debug)]
pub enum Phase {
    Queue(Queue),
    Start(Start),
    Attempt(Attempt),
}

#[derive(Debug)]
pub struct Queue {
    pub from: Instant,
    /// Absent where the request ended as it waited.
    pub to: Option<Instant>,
    /// No instance was ready when it began.
    pub cold: bool,
}

/// An instance's start that a request waited for. By the clock of the instance's node.
#[derive(Debug)]
pub struct Start {
    pub instance: InstanceId,
    pub from: SystemTime,
    pub to: SystemTime,
}

#[derive(Debug)]
pub struct Attempt {
    pub span: SpanId,
    pub instance: InstanceId,
    pub address: SocketAddr,
    /// Over TLS.
    pub secure: bool,
    pub from: Instant,
    /// Absent where the request ended before the instance was done.
    pub to: Option<Instant>,
    /// Of the instance's answer.
    pub status: Option<u16>,
    /// The instance took no connection.
    pub refused: bool,
}

impl Record {
    pub fn queued(&mut self, cold: bool) {
        self.phases.push(Phase::Queue(Queue {
            from: Instant::now(),
            to: None,
            cold,
        }));
    }

    /// It has a slot. `started`: when the instance was spawned and when it first was healthy, as far as known.
    pub fn attempt(
        &mut self,
        span: SpanId,
        (instance, address, secure): (InstanceId, SocketAddr, bool),
        started: Option<(Timestamp, Timestamp)>,
    ) {
        let now = Instant::now();
        let mut cold_since = None;
        if let Some(Phase::Queue(queue)) = self.phases.last_mut()
            && queue.to.is_none()
        {
            queue.to = Some(now);
            cold_since = queue.cold.then_some(queue.from);
        }
        if let (Some(since), Some((spawned, healthy))) = (cold_since, started)
            && let Ok(spawned) = SystemTime::try_from(spawned)
            && let Ok(healthy) = SystemTime::try_from(healthy)
        {
            // As much of it as this request waited for.
            let (from, to) = (spawned.max(self.wall(since)), healthy.min(self.wall(now)));
            if from < to {
                self.phases.push(Phase::Start(Start { instance, from, to }));
            }
        }
        self.phases.push(Phase::Attempt(Attempt {
            span,
            instance,
            address,
            secure,
            from: now,
            to: None,
            status: None,
            refused: false,
        }));
    }

    /// The attempt that runs.
    pub fn running(&mut self) -> Option<&mut Attempt> {
        match self.phases.last_mut() {
            Some(Phase::Attempt(attempt)) if attempt.to.is_none() => Some(attempt),
            _ => None,
        }
    }

    /// A moment of this request by the clock on the wall.
    #[must_use]
    pub fn wall(&self, at: Instant) -> SystemTime {
        self.arrived.1 + at.saturating_duration_since(self.arrived.0)
    }
}
