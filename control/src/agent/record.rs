//! What the agent says about one instance, each change once.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::mpsc::UnboundedSender;

use super::{Assignment, Report};
use crate::model::{Deployment, Instance, InstanceState};

/// Why an instance fails.
#[derive(Clone, Debug)]
pub(super) struct Why {
    /// For its owner.
    pub(super) error: String,
    /// For whoever calls it: nothing of the node, of how it is started, or of what it printed.
    kind: String,
}

impl Why {
    pub(super) fn hidden(kind: &str, error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            kind: kind.to_owned(),
        }
    }
}

/// What hides nothing.
impl From<String> for Why {
    fn from(error: String) -> Self {
        Self {
            kind: error.clone(),
            error,
        }
    }
}

pub(super) struct Record {
    pub(super) instance: Instance,
    /// As it is now: it may change while the instance runs.
    pub(super) deployment: Arc<Deployment>,
    told: Option<Instance>,
    reports: UnboundedSender<Report>,
    pub(super) draining: bool,
}

impl Record {
    pub(super) fn new(
        node: &str,
        assignment: &Assignment,
        reports: UnboundedSender<Report>,
    ) -> Self {
        let (version, deployment) = (&assignment.version, &assignment.deployment);
        let mut record = Self {
            instance: Instance {
                id: assignment.instance,
                function_id: version.function,
                function_version_id: version.id,
                deployment_id: deployment.id,
                gpu_specification_id: assignment.specification,
                node: node.to_owned(),
                state: InstanceState::Starting,
                address: None,
                server_name: None,
                capacity: 1,
                pid: None,
                created_at: Timestamp::now(),
                spawned_at: None,
                first_healthy_at: None,
                restarts: 0,
                error: None,
                failure: None,
                last_log_line: None,
                gpus: Vec::new(),
            },
            deployment: deployment.clone(),
            told: None,
            reports,
            draining: false,
        };
        record.deployed(deployment.clone());
        record
    }

    /// The deployment is so from now on: its capacity binds the next grants, the rest whatever comes next.
    pub(super) fn deployed(&mut self, deployment: Arc<Deployment>) {
        let mut specifications = deployment.specifications.iter();
        let own = specifications.find(|s| s.id == self.instance.gpu_specification_id);
        self.instance.capacity = own.map_or(1, |s| s.max_request_concurrency);
        self.deployment = deployment;
        self.tell();
    }

    /// Reports what has changed, if anything has.
    pub(super) fn tell(&mut self) {
        if self.draining {
            self.instance.state = InstanceState::Draining;
        }
        if self.told.as_ref() != Some(&self.instance) {
            self.told = Some(self.instance.clone());
            // Nobody listens any more only when the whole process ends.
            drop(self.reports.send(Report::Changed(self.instance.clone())));
        }
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.tell();
    }

    pub(super) fn ready(&mut self) {
        let instance = &mut self.instance;
        instance.state = InstanceState::Ready;
        instance.error = None;
        instance.failure = None;
        instance.last_log_line = None;
        instance.first_healthy_at.get_or_insert_with(Timestamp::now);
        self.tell();
    }

    pub(super) fn error(&mut self, why: impl Into<Why>) {
        self.instance.state = InstanceState::Error;
        self.fails(why.into());
        self.tell();
    }

    /// Notes why, without telling it yet.
    pub(super) fn fails(&mut self, why: Why) {
        self.instance.error = Some(why.error);
        self.instance.failure = Some(why.kind);
    }
}
