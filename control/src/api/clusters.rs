//! Which GPUs there are, by NVCF's names.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{At, Caller, Problem};

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterGroupsReply {
    /// Always one, `default`.
    cluster_groups: Vec<ClusterGroup>,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ClusterGroup {
    /// Always `default`.
    id: &'static str,
    /// Always `default`.
    name: &'static str,
    /// Always `default`.
    nca_id: String,
    /// Always `*`.
    authorized_nca_ids: Vec<&'static str>,
    /// The GPUs that nodes have.
    gpus: Vec<Gpu>,
    /// Always one, `default`.
    clusters: Vec<Cluster>,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Gpu {
    /// Such as `H100`.
    name: String,
    /// How many of them one instance may have.
    instance_types: Vec<InstanceType>,
}
#[derive(Serialize, ToSchema)]
struct InstanceType {
    /// For `instanceType`.
    name: String,
    /// For people.
    description: String,
    /// Whether it is the one to take when in doubt.
    default: bool,
}
/// Weir's nodes. There is no `k8sVersion`, since no Kubernetes runs them.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Cluster {
    /// Always `default`.
    id: &'static str,
    /// Always `default`.
    name: &'static str,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct SupportedGpu {
    /// Its name, for `gpu`.
    gpu: String,
    /// Always `default`.
    backend: &'static str,
}

/// The cluster group `default` and the GPUs that nodes have. Scope: list_cluster_groups.
#[utoipa::path(get, path = "/clusterGroups", responses((status = 200, body = ClusterGroupsReply)))]
pub(crate) async fn groups(
    State(api): At,
    caller: Caller,
) -> Result<Json<ClusterGroupsReply>, Problem> {
    caller.needs("list_cluster_groups")?;
    let gpus = api.runtime.gpus().into_iter().map(|(name, count)| Gpu {
        instance_types: (0..32)
            .map(|power| 1_u32 << power)
            .take_while(|n| *n <= count)
            .map(|n| InstanceType {
                name: format!("NCP.GPU.{name}_{n}x"),
                description: format!("{n} of {name}"),
                default: n == 1,
            })
            .collect(),
        name,
    });
    Ok(Json(ClusterGroupsReply {
        cluster_groups: vec![ClusterGroup {
            id: "default",
            name: "default",
            nca_id: "default".into(),
            authorized_nca_ids: vec!["*"],
            gpus: gpus.collect(),
            clusters: vec![Cluster {
                id: "default",
                name: "default",
            }],
        }],
    }))
}

/// The GPUs that nodes have. Scope: register_function.
#[utoipa::path(get, path = "/supportedGpus", responses((status = 200, body = Vec<SupportedGpu>)))]
pub(crate) async fn gpus(
    State(api): At,
    caller: Caller,
) -> Result<Json<Vec<SupportedGpu>>, Problem> {
    caller.needs("register_function")?;
    let gpus = api.runtime.gpus().into_iter().map(|(gpu, _)| SupportedGpu {
        gpu,
        backend: "default",
    });
    Ok(Json(gpus.collect()))
}
