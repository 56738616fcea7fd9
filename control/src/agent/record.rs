//! What the agent says about one instance, each change once.

use jiff::Timestamp;
use tokio::sync::mpsc::UnboundedSender;

use super::{Assignment, Report};
use crate::model::{Instance, InstanceState};

pub(super) struct Record {
    pub(super) instance: Instance,
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
        let capacity = deployment
            .specifications
            .iter()
            .find(|s| s.id == assignment.specification)
            .map_or(1, |s| s.max_request_concurrency);
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
                capacity,
                pid: None,
                created_at: Timestamp::now(),
                spawned_at: None,
                first_healthy_at: None,
                restarts: 0,
                error: None,
                gpus: Vec::new(),
            },
            told: None,
            reports,
            draining: false,
        };
        record.tell();
        record
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
        instance.first_healthy_at.get_or_insert_with(Timestamp::now);
        self.tell();
    }

    pub(super) fn error(&mut self, why: String) {
        self.instance.state = InstanceState::Error;
        self.instance.error = Some(why);
        self.tell();
    }
}
