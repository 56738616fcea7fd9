//! Keys: who may do what. The secret is answered once, when the key is made.

use std::sync::Arc;

use axum::{Json, extract::State};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use utoipa::ToSchema;

use super::{
    Api, At, Caller, Problem, accounts,
    json::{Body, Names, checked_label},
};
use crate::{
    auth,
    directory::{encode, record},
    model::{AccountId, FunctionId, Key, KeyId, SCOPES},
    store::{Change, Expect, Partition},
};

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"name": "caller", "scopes": ["invoke_function"]}))]
pub(crate) struct CreateKeyRequest {
    /// 1 to 128 characters, none of them a control character; need not be unique.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]+$"
    )]
    name: String,
    /// Only the admin may name another. Default: the caller's.
    account: Option<String>,
    /// What it may do; none that the caller lacks.
    scopes: Vec<String>,
    /// Functions it may name. Default: all of the account.
    functions: Option<Vec<FunctionId>>,
    /// 0 (most urgent) to 9. Default: 5.
    #[schema(minimum = 0, maximum = 9)]
    priority: Option<u8>,
    /// When it ends; not in the past. Default: never.
    #[serde(default, deserialize_with = "time")]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let given = String::deserialize(deserializer)?;
    let time = given.parse().map_err(|_| {
        D::Error::custom(format!(
            "'{given}' is not a time such as 2027-01-31T12:00:00Z"
        ))
    })?;
    Ok(Some(time))
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KeyDto {
    /// Its ID, which is no secret.
    id: KeyId,
    /// For people.
    name: String,
    /// Whose it is.
    account: String,
    /// What it may do.
    scopes: Vec<String>,
    /// Functions it may name; absent: all of the account.
    #[serde(skip_serializing_if = "Option::is_none")]
    functions: Option<Vec<FunctionId>>,
    /// Of its invocations: 0 (most urgent) to 9.
    priority: u8,
    /// When it ends; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Whether it has every scope, for every account.
    admin: bool,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct NewKeyReply {
    /// The key.
    key: KeyDto,
    /// Never told again.
    secret: String,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct KeyReply {
    /// The key.
    key: KeyDto,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct KeysReply {
    /// Oldest first.
    keys: Vec<KeyDto>,
}

fn dto(key: &Key) -> KeyDto {
    KeyDto {
        id: key.id,
        name: key.name.clone(),
        account: key.account.to_string(),
        scopes: key.scopes.clone(),
        functions: key.functions.clone(),
        priority: key.priority,
        expires_at: key.expires_at,
        created_at: key.created_at,
        admin: key.admin,
    }
}

/// Makes a key. Scope: account_setup.
#[utoipa::path(post, path = "/keys", request_body = CreateKeyRequest, responses((status = 200, body = NewKeyReply)))]
pub(crate) async fn create(
    State(api): At,
    caller: Caller,
    Body(request): Body<CreateKeyRequest>,
) -> Result<Json<NewKeyReply>, Problem> {
    caller.needs("account_setup")?;
    checked_label(&request.name)?;
    let mut scopes = request.scopes;
    scopes.sort();
    scopes.dedup();
    if let Some(unknown) = scopes.iter().find(|s| !SCOPES.contains(&s.as_str())) {
        return Err(Problem::bad(format!(
            "scopes: there is no scope '{unknown}'; those there are: {}",
            SCOPES.join(", ")
        )));
    }
    let priority = request.priority.unwrap_or(5);
    if priority > 9 {
        return Err(Problem::bad("priority: has to be 0 (most urgent) to 9"));
    }
    let now = Timestamp::now();
    if request.expires_at.is_some_and(|at| at <= now) {
        return Err(Problem::conflict(
            "expiresAt: is in the past: give a later time, or leave it out",
        ));
    }
    let given = request.account.map(|id| AccountId(id.into()));
    let account = given.unwrap_or_else(|| caller.account.clone());
    if !(caller.any || account == caller.account) || !accounts::exists(&api, &account) {
        return Err(accounts::none(&account));
    }
    if !caller.key.admin {
        may_give(
            &caller,
            &scopes,
            request.functions.as_deref(),
            priority,
            request.expires_at,
        )?;
    }
    let secret = auth::generate();
    let key = Key {
        id: KeyId::random(),
        name: request.name,
        account,
        scopes,
        functions: request.functions,
        priority,
        expires_at: request.expires_at,
        created_at: now,
        hash: auth::hash(secret.expose()),
        admin: false,
    };
    let change = Change {
        key: record::key(key.id),
        expect: Expect::Absent,
        value: Some(encode(&key)),
    };
    api.commit(Partition::Keys, vec![change]).await?;
    Ok(Json(NewKeyReply {
        key: dto(&key),
        secret: secret.expose().to_owned(),
    }))
}

/// Whether a key of these functions names none that the caller may not.
fn within(caller: &Caller, functions: Option<&[FunctionId]>) -> bool {
    caller
        .limits()
        .is_none_or(|own| functions.is_some_and(|all| all.iter().all(|f| own.contains(f))))
}

/// A key gives no more than it has.
fn may_give(
    caller: &Caller,
    scopes: &[String],
    functions: Option<&[FunctionId]>,
    priority: u8,
    expires_at: Option<Timestamp>,
) -> Result<(), Problem> {
    if let Some(lacking) = scopes.iter().find(|scope| !caller.has(scope)) {
        return Err(Problem::forbidden(format!(
            "scopes: this key lacks {lacking}, so it can't give it: use a key that has it"
        )));
    }
    if !within(caller, functions) {
        return Err(Problem::forbidden(
            "functions: this key may name certain functions only: list some of these",
        ));
    }
    if priority < caller.key.priority.min(5) {
        return Err(Problem::forbidden(format!(
            "priority: this key can't give one more urgent than {}",
            caller.key.priority.min(5)
        )));
    }
    if let Some(end) = caller.key.expires_at
        && expires_at.is_none_or(|at| at > end)
    {
        return Err(Problem::forbidden(format!(
            "expiresAt: this key ends {end}, and can't give one that lives longer"
        )));
    }
    Ok(())
}

fn find(api: &Api, caller: &Caller, names: &Names) -> Result<Arc<Key>, Problem> {
    let id: KeyId = names.id("keyId")?;
    let key = api.directory.key(id);
    let key = key.filter(|key| caller.any || key.account == caller.account && !key.admin);
    let key = key.ok_or_else(|| {
        Problem::missing(format!(
            "there is no key {id}: GET /v2/weir/keys lists those there are"
        ))
    })?;
    if within(caller, key.functions.as_deref()) {
        return Ok(key);
    }
    Err(Problem::forbidden(format!(
        "key '{}' may name certain functions only, and key {id} more than these: use a key that may",
        caller.key.name
    )))
}

/// The keys of the account; the admin's, all; for a key limited to some functions, those with none besides. Scope: account_setup.
#[utoipa::path(get, path = "/keys", responses((status = 200, body = KeysReply)))]
pub(crate) async fn list(State(api): At, caller: Caller) -> Result<Json<KeysReply>, Problem> {
    caller.needs("account_setup")?;
    let mut keys: Vec<KeyDto> = api
        .directory
        .keys()
        .iter()
        .filter(|key| caller.any || key.account == caller.account && !key.admin)
        .filter(|key| within(&caller, key.functions.as_deref()))
        .map(|key| dto(key))
        .collect();
    keys.sort_by_key(|key| (key.created_at, key.id));
    Ok(Json(KeysReply { keys }))
}

/// One key. Scope: account_setup.
#[utoipa::path(get, path = "/keys/{keyId}", params(("keyId" = KeyId, Path)), responses((status = 200, body = KeyReply)))]
pub(crate) async fn read(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<KeyReply>, Problem> {
    caller.needs("account_setup")?;
    let key = find(&api, &caller, &names)?;
    Ok(Json(KeyReply { key: dto(&key) }))
}

/// Revokes a key. Scope: account_setup.
#[utoipa::path(delete, path = "/keys/{keyId}", params(("keyId" = KeyId, Path)), responses((status = 204)))]
pub(crate) async fn delete(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<StatusCode, Problem> {
    caller.needs("account_setup")?;
    if caller.any && names.id::<KeyId>("keyId")? == auth::ENVIRONMENT_KEY {
        return Err(Problem::conflict(
            "this key is the one of WEIR_ADMIN_KEY: start with another, or without",
        ));
    }
    let key = find(&api, &caller, &names)?;
    if key.admin && (key.hash == caller.key.hash || api.open) {
        return Err(Problem::conflict(
            "the admin key can't revoke itself: start with WEIR_ADMIN_KEY, revoke it with that one, \
             and remove <data-dir>/admin.key",
        ));
    }
    let mut changes = vec![Change {
        key: record::key(key.id),
        expect: Expect::Anything,
        value: None,
    }];
    if key.admin {
        changes.push(auth::revocation(&key));
    }
    api.commit(Partition::Keys, changes).await?;
    Ok(StatusCode::NO_CONTENT)
}
