//! What runs, where, and why.

use axum::{Json, extract::State, response::IntoResponse};
use http::header;
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api, At, Caller, Problem,
    json::{Names, Pairs},
};
use crate::model::{Instance, InstanceId, VersionId};

#[derive(Serialize, ToSchema)]
pub(crate) struct InstanceReply {
    /// The instance.
    instance: Instance,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct InstancesReply {
    /// Oldest first.
    instances: Vec<Instance>,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct NodesReply {
    /// Each with its name, GPUs and instances.
    #[schema(value_type = Vec<Object>)]
    nodes: Vec<serde_json::Value>,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct DecisionsReply {
    /// Oldest first: what was seen, what was chosen, why.
    #[schema(value_type = Vec<Object>)]
    decisions: Vec<serde_json::Value>,
}

/// The instances of the functions that are the caller's.
fn own(api: &Api, caller: &Caller) -> Vec<Instance> {
    let views = api.directory.views();
    let own = views
        .iter()
        .filter(|view| caller.owns(view) && caller.names(view.id));
    own.flat_map(|view| &view.versions)
        .flat_map(|version| version.instances.iter().cloned())
        .collect()
}

fn find(api: &Api, caller: &Caller, names: &Names) -> Result<Instance, Problem> {
    let id: InstanceId = names.id("instanceId")?;
    let found = own(api, caller).into_iter().find(|i| i.id == id);
    found.ok_or_else(|| {
        Problem::missing(format!(
            "there is no instance {id}: GET /v2/weir/instances lists those there are"
        ))
    })
}

/// The account's instances, oldest first. Scope: list_functions_details.
#[utoipa::path(get, path = "/instances", params(("functionVersionId" = Option<VersionId>, Query, description = "Only of this version; default all")), responses((status = 200, body = InstancesReply)))]
pub(crate) async fn list(
    State(api): At,
    caller: Caller,
    query: Pairs,
) -> Result<Json<InstancesReply>, Problem> {
    caller.needs("list_functions_details")?;
    let version: Option<VersionId> = query.id("functionVersionId")?;
    let mut instances = own(&api, &caller);
    instances.retain(|i| version.is_none_or(|v| i.function_version_id == v));
    instances.sort_by_key(|i| (i.created_at, i.id));
    Ok(Json(InstancesReply { instances }))
}

/// One instance. Scope: list_functions_details.
#[utoipa::path(get, path = "/instances/{instanceId}", params(("instanceId" = InstanceId, Path)), responses((status = 200, body = InstanceReply)))]
pub(crate) async fn read(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<InstanceReply>, Problem> {
    caller.needs("list_functions_details")?;
    Ok(Json(InstanceReply {
        instance: find(&api, &caller, &names)?,
    }))
}

/// Whether an instance that is gone was the caller's.
fn was_own(api: &Api, caller: &Caller, instance: InstanceId) -> bool {
    api.runtime.log_owner(instance).is_some_and(|owner| {
        // Another tenant may have the account's name by now.
        let same = || {
            owner.account == caller.account
                && api
                    .directory
                    .account(&owner.account)
                    .is_none_or(|account| account.created_at <= owner.since)
        };
        caller.names(owner.function) && (caller.any || same())
    })
}

/// The last lines that an instance wrote, also one that is gone: the last hundred of those are kept. Scope: list_functions_details.
#[utoipa::path(get, path = "/instances/{instanceId}/logs", params(("instanceId" = InstanceId, Path), ("tail" = Option<usize>, Query, description = "Lines, 1 to 100000; default 1000")), responses((status = 200, body = String, content_type = "text/plain")))]
pub(crate) async fn logs(
    State(api): At,
    caller: Caller,
    names: Names,
    query: Pairs,
) -> Result<impl IntoResponse, Problem> {
    caller.needs("list_functions_details")?;
    let tail = match query.all("tail").next() {
        None => 1000,
        Some(given) => given
            .parse()
            .ok()
            .filter(|n| (1..=100_000).contains(n))
            .ok_or_else(|| Problem::bad("tail: has to be 1 to 100000 lines"))?,
    };
    let id: InstanceId = names.id("instanceId")?;
    if !was_own(&api, &caller, id) {
        // One that printed nothing yet, or no process.
        find(&api, &caller, &names)?;
    }
    let text = api.runtime.logs(id, tail).ok_or_else(|| {
        Problem::missing(
            "this instance has no logs here: it is no process of an agent of this Weir, or has printed nothing",
        )
    })?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text))
}

/// The machines that run instances. Scope: list_cluster_groups.
#[utoipa::path(get, path = "/nodes", responses((status = 200, body = NodesReply)))]
pub(crate) async fn nodes(State(api): At, caller: Caller) -> Result<Json<NodesReply>, Problem> {
    caller.needs("list_cluster_groups")?;
    Ok(Json(NodesReply {
        nodes: api.runtime.nodes(),
    }))
}

/// How a version was scaled. Scope: list_functions_details.
#[utoipa::path(get, path = "/decisions", params(("version" = VersionId, Query)), responses((status = 200, body = DecisionsReply)))]
pub(crate) async fn decisions(
    State(api): At,
    caller: Caller,
    query: Pairs,
) -> Result<Json<DecisionsReply>, Problem> {
    caller.needs("list_functions_details")?;
    let version: VersionId = query.id("version")?.ok_or_else(|| {
        Problem::bad("version: is needed, as in /v2/weir/decisions?version=<UUID>")
    })?;
    let views = api.directory.views();
    let own = views
        .iter()
        .any(|view| caller.owns(view) && caller.names(view.id) && view.version(version).is_some());
    if !own {
        return Err(Problem::unknown_function(format!(
            "there is no version {version} in this account"
        )));
    }
    Ok(Json(DecisionsReply {
        decisions: api.runtime.decisions(version),
    }))
}
