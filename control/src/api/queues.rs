//! What waits.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{At, Caller, Problem, json::Names, no_version};
use crate::model::{FunctionId, FunctionState, VersionId};

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct QueuesReply {
    /// The function.
    function_id: FunctionId,
    /// One for each deployed version.
    queues: Vec<QueueDto>,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct QueueDto {
    /// The version.
    function_version_id: VersionId,
    /// The version's name.
    function_name: String,
    /// The version's state; INACTIVE while it is undeployed gracefully.
    function_status: FunctionState,
    /// Invocations that wait; those that run are not counted.
    queue_depth: usize,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PositionReply {
    /// Its function.
    function_id: FunctionId,
    /// The version it waits for.
    function_version_id: VersionId,
    /// 1 is next.
    position_in_queue: usize,
}

fn depth(
    api: &super::Api,
    caller: &Caller,
    function: FunctionId,
    version: Option<VersionId>,
) -> Result<Json<QueuesReply>, Problem> {
    caller.needs("queue_details")?;
    let view = caller.visible(api, function)?;
    let readable = view
        .versions
        .iter()
        .filter(|v| caller.owns(&view) || caller.shared(v))
        .filter(|v| version.is_none_or(|id| v.version.id == id));
    let mut any = false;
    let queues: Vec<QueueDto> = readable
        .inspect(|_| any = true)
        // Not by the state: one that is undeployed gracefully is INACTIVE and still has its queue.
        .filter(|v| v.deployment.is_some())
        .map(|v| QueueDto {
            function_version_id: v.version.id,
            function_name: v.version.name.clone(),
            function_status: v.state,
            queue_depth: api.runtime.queue_depth(v.version.id),
        })
        .collect();
    match version {
        Some(version) if !any => Err(no_version(function, version)),
        _ if queues.is_empty() => Err(Problem::missing(
            "nothing of this is deployed, so there is no queue: deploy a version first",
        )),
        _ => Ok(Json(QueuesReply {
            function_id: function,
            queues,
        })),
    }
}

/// The queues of a function's deployed versions, until the last invocation of a graceful undeploy is done. Scope: queue_details.
#[utoipa::path(get, path = "/queues/functions/{functionId}", params(("functionId" = FunctionId, Path)), responses((status = 200, body = QueuesReply)))]
pub(crate) async fn of_function(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<QueuesReply>, Problem> {
    depth(&api, &caller, names.function()?, None)
}

/// The queue of a version, until the last invocation of a graceful undeploy is done. Scope: queue_details.
#[utoipa::path(get, path = "/queues/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 200, body = QueuesReply)))]
pub(crate) async fn of_version(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<QueuesReply>, Problem> {
    let (function, version) = names.version()?;
    depth(&api, &caller, function, Some(version))
}

/// Where a waiting invocation is. What does not wait answers 404: what was dispatched is not told from what never came.
/// Scope: queue_details.
#[utoipa::path(get, path = "/queues/{requestId}/position", params(("requestId" = Uuid, Path)), responses((status = 200, body = PositionReply)))]
pub(crate) async fn position(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<PositionReply>, Problem> {
    caller.needs("queue_details")?;
    let request: Uuid = names.id("requestId")?;
    let found = api.runtime.position(request);
    let found = found.filter(|(function, _, _)| caller.visible(&api, *function).is_ok());
    let Some((function_id, function_version_id, position_in_queue)) = found else {
        return Err(Problem::missing(format!(
            "request {request} waits in no queue: it was dispatched, has ended, or never came"
        )));
    };
    Ok(Json(PositionReply {
        function_id,
        function_version_id,
        position_in_queue,
    }))
}
