//! The six states of a version: a pure function of its deployment and its
//! instances, never stored.

use crate::model::{Deployment, FunctionState, GpuSpecification, Instance, InstanceState, Launch};

/// What a deployment has been through in this process; the caller keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Past {
    /// It has not been ACTIVE.
    #[default]
    New,
    /// It has, and no ready instance failed or went unasked since it last was.
    Reached,
    /// It has, and one did.
    Lost,
}

/// What a version's state is.
#[must_use]
pub fn state_of(
    launch: &Launch,
    deployment: Option<&Deployment>,
    instances: &[Instance],
    past: Past,
) -> FunctionState {
    let Some(deployment) = deployment else {
        return FunctionState::Inactive;
    };
    if deployment.undeploying {
        return FunctionState::Inactive;
    }
    let count = |spec: &GpuSpecification, state| {
        instances
            .iter()
            .filter(|i| i.gpu_specification_id == spec.id && i.state == state)
            .count()
    };
    let any_ready = instances.iter().any(|i| i.state == InstanceState::Ready);
    let alive = instances
        .iter()
        .any(|i| matches!(i.state, InstanceState::Ready | InstanceState::Starting));
    let mut failed = deployment
        .specifications
        .iter()
        .map(|spec| count(spec, InstanceState::Error));
    // Not while another specification or endpoint is left to try.
    let all_failed = match launch {
        Launch::Process(_) => failed.all(|failed| failed > 0),
        Launch::Endpoints(all) => {
            let places = all.len().min(deployment.max_instances() as usize);
            failed.sum::<usize>() >= places.max(1)
        }
    };
    if all_failed && !alive {
        return FunctionState::Error;
    }
    let enough = deployment
        .specifications
        .iter()
        .all(|s| count(s, InstanceState::Ready) >= s.min_instances as usize);
    if enough {
        return FunctionState::Active;
    }
    match past {
        Past::New => FunctionState::Deploying,
        Past::Lost if !any_ready => FunctionState::Degraded,
        // More was asked for, and comes: who calls waits for it.
        Past::Reached | Past::Lost => FunctionState::Degrading,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::*;

    fn deployment(mins: &[u32]) -> Deployment {
        let now = jiff::Timestamp::UNIX_EPOCH;
        Deployment {
            id: DeploymentId::random(),
            function: FunctionId::random(),
            version: VersionId::random(),
            specifications: mins
                .iter()
                .map(|min| GpuSpecification {
                    id: GpuSpecificationId::random(),
                    gpu: "none".into(),
                    instance_type: "none".into(),
                    min_instances: *min,
                    max_instances: 4,
                    max_request_concurrency: 1,
                    kept: serde_json::Map::new(),
                })
                .collect(),
            autoscaling: Autoscaling::default(),
            queue: QueueSettings::default(),
            routing: Routing::default(),
            traffic_weight: None,
            start_timeout: IsoDuration::secs(600),
            drain_timeout: IsoDuration::secs(300),
            cancel_timeout: IsoDuration::secs(5),
            created_at: now,
            updated_at: now,
            undeploying: false,
        }
    }

    fn instances(deployment: &Deployment, spec: usize, states: &[InstanceState]) -> Vec<Instance> {
        states
            .iter()
            .map(|state| Instance {
                id: InstanceId::random(),
                function_id: deployment.function,
                function_version_id: deployment.version,
                deployment_id: deployment.id,
                gpu_specification_id: deployment.specifications[spec].id,
                node: "local".into(),
                state: *state,
                address: None,
                server_name: None,
                capacity: 1,
                pid: None,
                created_at: jiff::Timestamp::UNIX_EPOCH,
                spawned_at: None,
                first_healthy_at: None,
                restarts: 0,
                error: None,
                failure: None,
                last_log_line: None,
                gpus: vec![],
            })
            .collect()
    }

    fn process() -> Launch {
        Launch::Process(ProcessSpec {
            command: vec![],
            env: vec![],
            working_dir: None,
        })
    }

    fn endpoints(count: usize) -> Launch {
        Launch::Endpoints(vec![String::new(); count])
    }

    /// Every mix of up to three instances, of a process or of so many endpoints, for every minimum up to three, before and after the
    /// first ACTIVE and a loss: the states against the sentences that define them.
    #[test]
    fn every_state_follows_its_definition() {
        use InstanceState::*;
        let states = [Starting, Ready, Draining, Error];
        let mut mixes: Vec<Vec<InstanceState>> = vec![vec![]];
        for length in 0..3 {
            let longer: Vec<_> = mixes
                .iter()
                .filter(|m| m.len() == length)
                .flat_map(|m| states.iter().map(|s| [m.as_slice(), &[*s]].concat()))
                .collect();
            mixes.extend(longer);
        }
        assert_eq!(mixes.len(), 1 + 4 + 16 + 64);
        for min in 0..=3u32 {
            let deployment = deployment(&[min]);
            for mix in &mixes {
                let count = |state| mix.iter().filter(|s| **s == state).count();
                let pasts = [Past::New, Past::Reached, Past::Lost];
                let launches = [process(), endpoints(1), endpoints(2), endpoints(3)];
                for (past, launch) in pasts
                    .iter()
                    .flat_map(|past| launches.iter().map(move |l| (*past, l)))
                {
                    let mixed = instances(&deployment, 0, mix);
                    let got = state_of(launch, Some(&deployment), &mixed, past);
                    let places = match launch {
                        Launch::Process(_) => 1,
                        Launch::Endpoints(all) => all.len(),
                    };
                    let all_in_error =
                        count(Error) >= places && count(Ready) + count(Starting) == 0;
                    let expected = if all_in_error {
                        FunctionState::Error
                    } else if count(Ready) >= min as usize {
                        FunctionState::Active
                    } else if past == Past::New {
                        FunctionState::Deploying
                    } else if count(Ready) > 0 || past == Past::Reached {
                        FunctionState::Degrading
                    } else {
                        FunctionState::Degraded
                    };
                    assert_eq!(got, expected, "min {min}, {mix:?}, {past:?}, {launch:?}");
                }
            }
        }
    }

    #[test]
    fn undeployed_and_undeploying_are_inactive() {
        let mut deployment = deployment(&[1]);
        let ready = instances(&deployment, 0, &[InstanceState::Ready]);
        assert_eq!(
            state_of(&process(), None, &ready, Past::Reached),
            FunctionState::Inactive
        );
        deployment.undeploying = true;
        assert_eq!(
            state_of(&process(), Some(&deployment), &ready, Past::Reached),
            FunctionState::Inactive
        );
    }

    #[test]
    fn it_is_no_error_while_another_specification_is_left_to_try() {
        let deployment = deployment(&[0, 0]);
        let mut failed = instances(&deployment, 0, &[InstanceState::Error]);
        let state =
            |failed: &[Instance]| state_of(&process(), Some(&deployment), failed, Past::New);
        assert_eq!(state(&failed), FunctionState::Active);
        failed.extend(instances(&deployment, 1, &[InstanceState::Error]));
        assert_eq!(state(&failed), FunctionState::Error);
    }

    #[test]
    fn each_specification_needs_its_own_minimum() {
        let deployment = deployment(&[1, 1]);
        let both_of_one = instances(
            &deployment,
            0,
            &[InstanceState::Ready, InstanceState::Ready],
        );
        assert_eq!(
            state_of(&process(), Some(&deployment), &both_of_one, Past::Lost),
            FunctionState::Degrading
        );
        let mut one_each = instances(&deployment, 0, &[InstanceState::Ready]);
        one_each.extend(instances(&deployment, 1, &[InstanceState::Ready]));
        assert_eq!(
            state_of(&process(), Some(&deployment), &one_each, Past::New),
            FunctionState::Active
        );
    }
}
