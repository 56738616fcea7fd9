//! Accounts: the tenants.

use std::collections::HashMap;

use axum::{Json, extract::State};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api, At, Caller, Problem,
    json::{Body, Names, checked_label},
    retried,
};
use crate::{
    directory::{decode, encode, record},
    model::{Account, AccountId},
    store::{Change, Expect, Partition, StoreError},
};

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"ncaId": "team-a", "name": "Team A"}))]
pub(crate) struct CreateAccountRequest {
    /// Its ID: 1 to 128 letters, digits, `.`, `_`, `:`, `-`, but neither `.` nor `..`; not one of a deleted account.
    #[schema(
        pattern = "^([A-Za-z0-9_:-]|\\.[A-Za-z0-9_:-]|\\.\\.[A-Za-z0-9._:-])[A-Za-z0-9._:-]*$",
        min_length = 1,
        max_length = 128
    )]
    nca_id: String,
    /// 1 to 128 characters, none of them a control character.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]+$"
    )]
    name: String,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"name": "Team A"}))]
pub(crate) struct UpdateAccountRequest {
    /// 1 to 128 characters, none of them a control character.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]+$"
    )]
    name: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AccountDto {
    /// Its ID.
    nca_id: String,
    /// For people.
    name: String,
    /// Absent for the account that is there from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct AccountReply {
    /// The account.
    account: AccountDto,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct AccountsReply {
    /// In the order of their IDs.
    accounts: Vec<AccountDto>,
}

pub(crate) fn valid(id: &str) -> bool {
    // `.` and `..` would go from a path before they arrive.
    (1..=128).contains(&id.len())
        && !matches!(id, "." | "..")
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._:-".contains(c))
}

pub(crate) fn exists(api: &Api, id: &AccountId) -> bool {
    *id == AccountId::default_account() || api.directory.account(id).is_some()
}

pub(crate) fn none(id: &AccountId) -> Problem {
    Problem::missing(format!(
        "there is no account '{id}': POST /v2/nvcf/accounts makes one"
    ))
}

fn dto(account: &Account) -> AccountDto {
    AccountDto {
        nca_id: account.id.to_string(),
        name: account.name.clone(),
        created_at: (account.id != AccountId::default_account()).then_some(account.created_at),
    }
}

fn find(api: &Api, id: &AccountId) -> Option<AccountDto> {
    let default = || AccountDto {
        nca_id: id.to_string(),
        name: id.to_string(),
        created_at: None,
    };
    let found = api.directory.account(id).map(|account| dto(&account));
    found.or_else(|| (*id == AccountId::default_account()).then(default))
}

/// Makes an account. Scope: account_setup.
#[utoipa::path(post, path = "/accounts", request_body = CreateAccountRequest, responses((status = 200, body = AccountReply)))]
pub(crate) async fn create(
    State(api): At,
    caller: Caller,
    Body(request): Body<CreateAccountRequest>,
) -> Result<Json<AccountReply>, Problem> {
    caller.needs("account_setup")?;
    caller.unlimited("make an account")?;
    if !valid(&request.nca_id) {
        return Err(Problem::bad(
            "ncaId: has to be 1 to 128 letters, digits or any of ._:-",
        ));
    }
    checked_label(&request.name)?;
    let account = Account {
        id: AccountId(request.nca_id.into()),
        name: request.name,
        created_at: Timestamp::now(),
        deleted_at: None,
    };
    let taken = |how: &str| {
        Problem::conflict(format!(
            "account '{}' {how}: choose another ncaId",
            account.id
        ))
    };
    if exists(&api, &account.id) {
        return Err(taken("is there already"));
    }
    let change = Change {
        key: record::account(&account.id),
        expect: Expect::Absent,
        value: Some(encode(&account)),
    };
    match api.store.commit(Partition::Accounts, vec![change]).await {
        Ok(revision) => api.settle(Partition::Accounts, revision).await,
        Err(StoreError::Conflict { .. }) => {
            return Err(taken("is there already, or was deleted"));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(Json(AccountReply {
        account: dto(&account),
    }))
}

/// The accounts: the admin's all, others' their own. Scope: account_setup.
#[utoipa::path(get, path = "/accounts", responses((status = 200, body = AccountsReply)))]
pub(crate) async fn list(State(api): At, caller: Caller) -> Result<Json<AccountsReply>, Problem> {
    caller.needs("account_setup")?;
    let mut all: HashMap<AccountId, AccountDto> = api
        .directory
        .accounts()
        .iter()
        .map(|account| (account.id.clone(), dto(account)))
        .collect();
    let default = AccountId::default_account();
    if let Some(found) = find(&api, &default) {
        all.entry(default).or_insert(found);
    }
    let mut accounts: Vec<AccountDto> = all
        .into_iter()
        .filter(|(id, _)| caller.any || *id == caller.account)
        .map(|(_, account)| account)
        .collect();
    accounts.sort_by(|a, b| a.nca_id.cmp(&b.nca_id));
    Ok(Json(AccountsReply { accounts }))
}

fn named(api: &Api, caller: &Caller, names: &Names) -> Result<AccountId, Problem> {
    let id = AccountId(names.find("ncaId").unwrap_or_default().into());
    let visible = (caller.any || id == caller.account) && exists(api, &id);
    if visible { Ok(id) } else { Err(none(&id)) }
}

/// One account. Scope: account_setup.
#[utoipa::path(get, path = "/accounts/{ncaId}", params(("ncaId" = String, Path)), responses((status = 200, body = AccountReply)))]
pub(crate) async fn read(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<AccountReply>, Problem> {
    caller.needs("account_setup")?;
    let id = named(&api, &caller, &names)?;
    let account = find(&api, &id).ok_or_else(|| none(&id))?;
    Ok(Json(AccountReply { account }))
}

/// Reads an account, changes it, writes it back if nobody else did.
async fn change(
    api: &Api,
    id: &AccountId,
    change: impl Fn(&mut Account),
) -> Result<Account, Problem> {
    let key = record::account(id);
    retried!(
        async {
            let found = api.store.get(Partition::Accounts, &key).await?;
            let (mut account, expect) = match found {
                Some(found) => (
                    decode::<Account>(&key, &found.value)?,
                    Expect::Revision(found.revision),
                ),
                None if *id == AccountId::default_account() => {
                    let account = Account {
                        id: id.clone(),
                        name: id.to_string(),
                        created_at: Timestamp::now(),
                        deleted_at: None,
                    };
                    (account, Expect::Absent)
                }
                None => return Err(none(id)),
            };
            if account.deleted_at.is_some() {
                return Err(none(id));
            }
            change(&mut account);
            let written = Change {
                key: key.clone(),
                expect,
                value: Some(encode(&account)),
            };
            api.commit(Partition::Accounts, vec![written]).await?;
            Ok(account)
        }
        .await
    )
}

/// Gives an account another name. Scope: account_setup.
#[utoipa::path(patch, path = "/accounts/{ncaId}", params(("ncaId" = String, Path)), request_body = UpdateAccountRequest, responses((status = 200, body = AccountReply)))]
pub(crate) async fn update(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(request): Body<UpdateAccountRequest>,
) -> Result<Json<AccountReply>, Problem> {
    caller.needs("account_setup")?;
    caller.unlimited("change an account")?;
    let id = named(&api, &caller, &names)?;
    checked_label(&request.name)?;
    let account = change(&api, &id, |account| account.name.clone_from(&request.name)).await?;
    Ok(Json(AccountReply {
        account: dto(&account),
    }))
}

/// Deletes an account that has neither functions nor keys. Its ncaId is not given again, since other accounts'
/// functions may still name it. Scope: account_setup.
#[utoipa::path(delete, path = "/accounts/{ncaId}", params(("ncaId" = String, Path)), responses((status = 204)))]
pub(crate) async fn delete(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<StatusCode, Problem> {
    caller.needs("account_setup")?;
    caller.unlimited("delete an account")?;
    let id = named(&api, &caller, &names)?;
    if id == AccountId::default_account() {
        return Err(Problem::conflict("the account 'default' is always there"));
    }
    let functions = api
        .directory
        .views()
        .iter()
        .filter(|v| v.account == id)
        .count();
    let keys = api
        .directory
        .keys()
        .iter()
        .filter(|k| k.account == id)
        .count();
    if functions + keys > 0 {
        return Err(Problem::conflict(format!(
            "account '{id}' still has {functions} functions and {keys} keys: delete them first"
        )));
    }
    change(&api, &id, |account| {
        account.deleted_at = Some(Timestamp::now());
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
