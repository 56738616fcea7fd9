//! Which other accounts may call a function.

use std::collections::HashSet;

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api, At, Caller, Problem, accounts,
    json::{Body, Names},
    retried,
};
use crate::{
    directory::{decode, encode, record},
    model::{FunctionId, Sharing, VersionId},
    store::{Change, Expect, Partition},
};

/// An account, or `*`: all of them.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Party {
    /// The account's ID, or `*`.
    #[schema(
        pattern = "^(\\*|([A-Za-z0-9_:-]|\\.[A-Za-z0-9_:-]|\\.\\.[A-Za-z0-9._:-])[A-Za-z0-9._:-]*)$",
        max_length = 128
    )]
    nca_id: String,
    #[serde(skip_serializing)]
    #[schema(ignore)]
    client_id: Option<String>,
}
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"authorizedParties": [{"ncaId": "team-b"}]}))]
pub(crate) struct PartiesRequest {
    /// `*` alone; one that is there twice counts once.
    #[schema(min_items = 1)]
    authorized_parties: Vec<Party>,
}
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"authorizedParty": {"ncaId": "team-b"}}))]
pub(crate) struct PartyRequest {
    /// The account to add or to remove.
    authorized_party: Party,
}

/// Who may call a function (without `versionId`) or one version.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AuthorizedFunction {
    /// The function.
    id: FunctionId,
    /// The account that owns it.
    nca_id: String,
    /// The version; absent where all are meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    version_id: Option<VersionId>,
    /// Absent where nobody else may call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorized_parties: Vec<Party>,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct AuthorizationReply {
    /// Who may call it now.
    function: AuthorizedFunction,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct AuthorizationsReply {
    /// First the function, then each of its versions.
    functions: Vec<AuthorizedFunction>,
}

/// What is shared: a function, or one version.
#[derive(Clone, Copy)]
struct Target {
    function: FunctionId,
    version: Option<VersionId>,
}

impl Target {
    fn function(names: &Names) -> Result<Self, Problem> {
        Ok(Self {
            function: names.function()?,
            version: None,
        })
    }
    fn version(names: &Names) -> Result<Self, Problem> {
        let (function, version) = names.version()?;
        Ok(Self {
            function,
            version: Some(version),
        })
    }
}

fn allowed(api: &Api, caller: &Caller, target: Target) -> Result<String, Problem> {
    caller.needs("authorize_clients")?;
    if let Some(version) = target.version {
        caller.own_version(api, target.function, version)?;
    }
    Ok(caller.own(api, target.function)?.account.to_string())
}

fn dto(account: &str, target: Target, accounts: Vec<String>) -> AuthorizedFunction {
    AuthorizedFunction {
        id: target.function,
        nca_id: account.to_owned(),
        version_id: target.version,
        authorized_parties: accounts
            .into_iter()
            .map(|nca_id| Party {
                nca_id,
                client_id: None,
            })
            .collect(),
    }
}

async fn stored(api: &Api, target: Target) -> Result<(Vec<String>, Option<u64>), Problem> {
    let key = record::sharing(target.function, target.version);
    let found = api.store.get(Partition::of(target.function), &key).await?;
    Ok(match found {
        Some(found) => {
            let sharing: Sharing = decode(&key, &found.value)?;
            (sharing.accounts, Some(found.revision))
        }
        None => (vec![], None),
    })
}

/// Reads who may call, changes it, writes it back if nobody else did and it is still there.
async fn change(
    api: &Api,
    caller: &Caller,
    target: Target,
    change: impl Fn(Vec<String>) -> Result<Vec<String>, Problem>,
) -> Result<Json<AuthorizationReply>, Problem> {
    let account = allowed(api, caller, target)?;
    let accounts = retried!(
        async {
            let (before, revision) = stored(api, target).await?;
            let accounts = change(before)?;
            let sharing = Sharing {
                function: target.function,
                version: target.version,
                accounts: accounts.clone(),
            };
            let mut changes = vec![Change {
                key: record::sharing(target.function, target.version),
                expect: revision.map_or(Expect::Absent, Expect::Revision),
                value: (!accounts.is_empty()).then(|| encode(&sharing)),
            }];
            // A version that is deleted meanwhile must not leave its sharing behind.
            let view = api.directory.view(target.function);
            let newest = view.and_then(|v| v.versions.last().map(|v| v.version.id));
            let Some(anchor) = target.version.or(newest) else {
                return Err(super::no_function(target.function));
            };
            let version = api.stored(target.function, anchor).await?;
            changes.push(version.version_change(&version.version));
            api.commit(version.partition, changes).await?;
            Ok::<_, Problem>(accounts)
        }
        .await
    )?;
    Ok(Json(AuthorizationReply {
        function: dto(&account, target, accounts),
    }))
}

fn checked(at: &str, party: &Party) -> Result<String, Problem> {
    let id = &party.nca_id;
    if id == "*" && party.client_id.is_some() {
        return Err(Problem::bad(format!(
            "{at}.clientId: can't be given with ncaId *"
        )));
    }
    if id != "*" && !accounts::valid(id) {
        return Err(Problem::bad(format!(
            "{at}.ncaId: has to be * or 1 to 128 letters, digits or any of ._:-"
        )));
    }
    Ok(id.clone())
}

fn replacement(request: &PartiesRequest) -> Result<Vec<String>, Problem> {
    let mut accounts = Vec::new();
    let mut seen = HashSet::new();
    for (at, party) in request.authorized_parties.iter().enumerate() {
        let at = format!("authorizedParties[{at}]");
        let id = checked(&at, party)?;
        // An account that is there twice, with other members that say nothing here, is still one.
        if seen.insert(id.clone()) {
            accounts.push(id);
        }
    }
    if accounts.is_empty() {
        return Err(Problem::bad(
            "authorizedParties: can't be empty; DELETE takes all of them back",
        ));
    }
    if accounts.len() > 1 && seen.contains("*") {
        return Err(Problem::bad(
            "authorizedParties: * means all accounts, and has to be alone",
        ));
    }
    Ok(accounts)
}

fn added(mut before: Vec<String>, id: &str) -> Result<Vec<String>, Problem> {
    if before.iter().any(|a| a == id) {
        return Ok(before);
    }
    if id == "*" && !before.is_empty() || before.iter().any(|a| a == "*") {
        return Err(Problem::conflict(
            "authorizedParty: * means all accounts, and has to be alone: POST replaces the list",
        ));
    }
    before.push(id.to_owned());
    Ok(before)
}

fn removed(mut before: Vec<String>, id: &str) -> Result<Vec<String>, Problem> {
    let count = before.len();
    before.retain(|a| a != id);
    if before.len() == count {
        return Err(Problem::conflict(format!(
            "authorizedParty: '{id}' is not among those that may call: GET lists them"
        )));
    }
    Ok(before)
}

// === Handlers ===

/// Who may call a function, and each of its versions. Scope: authorize_clients.
#[utoipa::path(get, path = "/authorizations/functions/{functionId}", params(("functionId" = FunctionId, Path)), responses((status = 200, body = AuthorizationsReply)))]
pub(crate) async fn read_function(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<AuthorizationsReply>, Problem> {
    let target = Target::function(&names)?;
    let account = allowed(&api, &caller, target)?;
    let mut functions = vec![dto(&account, target, stored(&api, target).await?.0)];
    let view = caller.own(&api, target.function)?;
    for version in &view.versions {
        let target = Target {
            version: Some(version.version.id),
            ..target
        };
        functions.push(dto(&account, target, stored(&api, target).await?.0));
    }
    Ok(Json(AuthorizationsReply { functions }))
}

/// Who may call a version, besides those who may call its function. Scope: authorize_clients.
#[utoipa::path(get, path = "/authorizations/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 200, body = AuthorizationReply)))]
pub(crate) async fn read_version(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<AuthorizationReply>, Problem> {
    let target = Target::version(&names)?;
    let account = allowed(&api, &caller, target)?;
    let (accounts, _) = stored(&api, target).await?;
    Ok(Json(AuthorizationReply {
        function: dto(&account, target, accounts),
    }))
}

macro_rules! handlers {
    ($target:ident, $set:ident, $clear:ident, $add:ident, $remove:ident, $path:literal, $add_path:literal, $remove_path:literal, ($($param:tt)*)) => {
        /// Says who may call, in place of what was said before. Scope: authorize_clients.
        #[utoipa::path(post, path = $path, params($($param)*), request_body = PartiesRequest, responses((status = 200, body = AuthorizationReply)))]
        pub(crate) async fn $set(
            State(api): At,
            caller: Caller,
            names: Names,
            Body(request): Body<PartiesRequest>,
        ) -> Result<Json<AuthorizationReply>, Problem> {
            let accounts = replacement(&request)?;
            change(&api, &caller, Target::$target(&names)?, |_| Ok(accounts.clone())).await
        }

        /// Takes all of it back. Scope: authorize_clients.
        #[utoipa::path(delete, path = $path, params($($param)*), responses((status = 200, body = AuthorizationReply)))]
        pub(crate) async fn $clear(
            State(api): At,
            caller: Caller,
            names: Names,
        ) -> Result<Json<AuthorizationReply>, Problem> {
            change(&api, &caller, Target::$target(&names)?, |_| Ok(vec![])).await
        }

        /// Lets one more account call. Scope: authorize_clients.
        #[utoipa::path(patch, path = $add_path, params($($param)*), request_body = PartyRequest, responses((status = 200, body = AuthorizationReply)))]
        pub(crate) async fn $add(
            State(api): At,
            caller: Caller,
            names: Names,
            Body(request): Body<PartyRequest>,
        ) -> Result<Json<AuthorizationReply>, Problem> {
            let id = checked("authorizedParty", &request.authorized_party)?;
            change(&api, &caller, Target::$target(&names)?, |before| added(before, &id)).await
        }

        /// Lets one account no longer call. Scope: authorize_clients.
        #[utoipa::path(patch, path = $remove_path, params($($param)*), request_body = PartyRequest, responses((status = 200, body = AuthorizationReply)))]
        pub(crate) async fn $remove(
            State(api): At,
            caller: Caller,
            names: Names,
            Body(request): Body<PartyRequest>,
        ) -> Result<Json<AuthorizationReply>, Problem> {
            let id = checked("authorizedParty", &request.authorized_party)?;
            change(&api, &caller, Target::$target(&names)?, |before| removed(before, &id)).await
        }
    };
}

handlers!(
    function,
    set_function,
    clear_function,
    add_function,
    remove_function,
    "/authorizations/functions/{functionId}",
    "/authorizations/functions/{functionId}/add",
    "/authorizations/functions/{functionId}/remove",
    (("functionId" = FunctionId, Path))
);
handlers!(
    version,
    set_version,
    clear_version,
    add_version,
    remove_version,
    "/authorizations/functions/{functionId}/versions/{functionVersionId}",
    "/authorizations/functions/{functionId}/versions/{functionVersionId}/add",
    "/authorizations/functions/{functionId}/versions/{functionVersionId}/remove",
    (
        ("functionId" = FunctionId, Path),
        ("functionVersionId" = VersionId, Path)
    )
);
