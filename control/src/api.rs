//! The lifecycle API: NVCF's paths under `/v2/nvcf`, Weir's own under
//! `/v2/weir`, described by `/openapi.json`, which is made from this code.
//!
//! What people ask for goes to the store by compare-and-set and is answered
//! when the directory shows it; no request is served here.

mod accounts;
mod authorizations;
mod clusters;
mod deployments;
mod description;
mod functions;
mod instances;
mod json;
mod keys;
mod problem;
mod queues;
#[cfg(test)]
mod tests;
mod unsupported;

use std::{
    collections::HashMap,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    extract::{FromRequestParts, State},
    middleware,
    routing::get,
};
use http::{header, request::Parts};
use jiff::Timestamp;
use utoipa::{
    OpenApi as _,
    openapi::{
        OpenApi,
        path::{Operation, ParameterBuilder, ParameterIn},
        security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use self::{json::Names, problem::Problem};
use crate::{
    agent::LogOwner,
    auth,
    directory::{Directory, FunctionView, VersionView, decode, encode, record},
    model::{AccountId, Deployment, FunctionId, InstanceId, Key, KeyId, Version, VersionId},
    store::{Change, Expect, Partition, Store},
};

/// What the API stands on.
pub struct Context {
    pub store: Arc<dyn Store>,
    pub directory: Arc<Directory>,
    pub runtime: Arc<dyn Runtime>,
    /// The key of `WEIR_ADMIN_KEY`, where there is one.
    pub admin: Option<Arc<Key>>,
    /// `--auth none`: everybody is the admin.
    pub open: bool,
    /// Weir's own listeners, which no endpoint may name.
    pub listeners: Vec<SocketAddr>,
    /// Functions an account may have.
    pub max_functions: usize,
    /// Those that this node's agent gives its instances.
    pub instance_ports: RangeInclusive<u16>,
}

/// What is so now and is in no store.
pub trait Runtime: Send + Sync {
    /// Invocations that wait.
    fn queue_depth(&self, version: VersionId) -> usize;
    /// Invocations that run.
    fn in_flight(&self, version: VersionId) -> usize;
    /// Where a waiting invocation is: 1 is next.
    fn position(&self, request: Uuid) -> Option<(FunctionId, VersionId, usize)>;
    /// The last `tail` lines that an instance wrote.
    fn logs(&self, instance: InstanceId, tail: usize) -> Option<String>;
    /// Whose those lines are, also of an instance that is gone.
    fn log_owner(&self, instance: InstanceId) -> Option<LogOwner>;
    /// The autoscaler's decisions, oldest first.
    fn decisions(&self, version: VersionId) -> Vec<serde_json::Value>;
    fn nodes(&self) -> Vec<serde_json::Value>;
    /// Names of the GPUs there are, and how many of each.
    fn gpus(&self) -> Vec<(String, u32)>;
}

/// How often a change is decided anew after another writer was first.
const ATTEMPTS: usize = 8;

/// The context and what only the handlers need.
pub(crate) struct Api {
    context: Arc<Context>,
    /// Functions of an account that are being made or were counted lately; held for one look.
    tallies: Mutex<HashMap<AccountId, Tally>>,
}

impl std::ops::Deref for Api {
    type Target = Context;
    fn deref(&self) -> &Context {
        &self.context
    }
}

#[derive(Default)]
struct Tally {
    /// At least as many as there are, as long as nobody else makes some.
    at_most: usize,
    /// Made since that was counted.
    since: usize,
    in_flight: usize,
}

/// The right to make one function; ends when the directory shows it or it failed.
pub(crate) struct Place<'a> {
    api: &'a Api,
    account: AccountId,
}
impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut tallies = self
            .api
            .tallies
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(tally) = tallies.get_mut(&self.account) {
            tally.in_flight -= 1;
        }
    }
}

impl Api {
    /// A place for one more function, or the limit.
    fn place(&self, account: &AccountId) -> Result<Place<'_>, Problem> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        let tally = tallies.entry(account.clone()).or_default();
        // Counting is a walk over all functions: not for each one that is made.
        if tally.at_most == 0 || tally.since >= 256 || tally.at_most >= self.max_functions {
            let views = self.directory.views();
            let there = views.iter().filter(|view| view.account == *account).count();
            tally.at_most = there + tally.in_flight;
            tally.since = 0;
        }
        if tally.at_most >= self.max_functions {
            return Err(Problem::bad(format!(
                "account '{account}' has {} functions, the limit (--max-functions {}): delete some, or raise it",
                tally.at_most, self.max_functions
            )));
        }
        tally.at_most += 1;
        tally.since += 1;
        tally.in_flight += 1;
        Ok(Place {
            api: self,
            account: account.clone(),
        })
    }

    /// Commits, and waits a moment until readers see it.
    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<(), Problem> {
        let revision = self.store.commit(partition, changes).await?;
        self.settle(partition, revision).await;
        Ok(())
    }

    async fn settle(&self, partition: Partition, revision: u64) {
        let applied = self.directory.applied(partition, revision);
        if tokio::time::timeout(Duration::from_secs(2), applied)
            .await
            .is_err()
        {
            tracing::warn!(
                ?partition,
                revision,
                "the directory is slow to show a change"
            );
        }
    }

    /// A version and its deployment, as stored, with their revisions.
    async fn stored(&self, function: FunctionId, version: VersionId) -> Result<Stored, Problem> {
        let partition = Partition::of(function);
        let key = record::version(function, version);
        let Some(found) = self.store.get(partition, &key).await? else {
            return Err(no_version(function, version));
        };
        let deployment_key = record::deployment(function, version);
        let deployment = match self.store.get(partition, &deployment_key).await? {
            Some(d) => Some((decode(&deployment_key, &d.value)?, d.revision)),
            None => None,
        };
        Ok(Stored {
            partition,
            version: decode(&key, &found.value)?,
            revision: found.revision,
            deployment,
        })
    }

    fn shown(&self, function: FunctionId, version: VersionId) -> Option<VersionView> {
        self.directory.view(function)?.version(version).cloned()
    }
}

struct Stored {
    partition: Partition,
    version: Version,
    revision: u64,
    deployment: Option<(Deployment, u64)>,
}

impl Stored {
    /// The version must still be as it was read; `new` replaces it.
    fn version_change(&self, new: &Version) -> Change {
        Change {
            key: record::version(new.function, new.id),
            expect: Expect::Revision(self.revision),
            value: Some(encode(new)),
        }
    }
    /// The deployment must still be as it was read; `new` replaces it.
    fn deployment_change(&self, new: Option<&Deployment>) -> Change {
        Change {
            key: record::deployment(self.version.function, self.version.id),
            expect: match &self.deployment {
                Some((_, revision)) => Expect::Revision(*revision),
                None => Expect::Absent,
            },
            value: new.map(encode),
        }
    }
}

/// Decides and commits anew as long as another writer was first.
macro_rules! retried {
    ($attempt:expr) => {{
        let mut left = $crate::api::ATTEMPTS;
        loop {
            left -= 1;
            match $attempt {
                Err(problem) if problem.status == http::StatusCode::CONFLICT && left > 0 => {}
                other => break other,
            }
        }
    }};
}
use retried;

fn no_function(function: FunctionId) -> Problem {
    Problem::unknown_function(format!(
        "there is no function {function} in this account: GET /v2/nvcf/functions lists those there are"
    ))
}

fn no_version(function: FunctionId, version: VersionId) -> Problem {
    Problem::unknown_function(format!(
        "function {function} has no version {version}: GET /v2/nvcf/functions/{function}/versions lists those there are"
    ))
}

/// Who asks, and for which account.
pub(crate) struct Caller {
    key: Arc<Key>,
    account: AccountId,
    /// The admin on a path without an account: any account's function is meant by its ID.
    any: bool,
}

impl FromRequestParts<Arc<Api>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let key = if api.open {
            Arc::new(auth::admin_key(KeyId(Uuid::nil()), String::new()))
        } else {
            auth::authenticate(
                &api.directory,
                api.admin.as_ref(),
                parts.headers.get(header::AUTHORIZATION),
                Timestamp::now(),
            )?
        };
        let names = Names::from_request_parts(parts, api).await?;
        // `/accounts/{ncaId}` itself is no twin of a tenant's path: its handlers look on their own.
        let twin = names.find("ncaId").filter(|_| {
            parts
                .extensions
                .get::<axum::extract::MatchedPath>()
                .is_some_and(|path| !path.as_str().ends_with("/accounts/{ncaId}"))
        });
        match twin {
            Some(_) if !key.admin => Err(Problem::forbidden(
                "paths under /accounts/{ncaId} are the admin key's: use the path without it",
            )),
            Some(account) => {
                let account = AccountId(account.into());
                if !accounts::exists(api, &account) {
                    return Err(accounts::none(&account));
                }
                Ok(Self {
                    account,
                    key,
                    any: false,
                })
            }
            None => Ok(Self {
                account: key.account.clone(),
                any: key.admin,
                key,
            }),
        }
    }
}

impl Caller {
    fn needs(&self, scope: &str) -> Result<(), Problem> {
        self.needs_one(&[scope])
    }

    fn needs_one(&self, scopes: &[&str]) -> Result<(), Problem> {
        if scopes.iter().any(|scope| self.has(scope)) {
            return Ok(());
        }
        Err(Problem::forbidden(format!(
            "key '{}' lacks the scope {}: use a key that has it",
            self.key.name,
            scopes.join(" or ")
        )))
    }

    fn has(&self, scope: &str) -> bool {
        auth::allows(&self.key, scope)
    }

    /// Whether the key may name the function at all.
    fn names(&self, function: FunctionId) -> bool {
        self.limits().is_none_or(|all| all.contains(&function))
    }

    /// The functions it is limited to, where it is.
    fn limits(&self) -> Option<&[FunctionId]> {
        let limited = self.key.functions.as_deref();
        limited.filter(|_| !self.key.admin)
    }

    /// For what goes beyond any single function.
    fn unlimited(&self, what: &str) -> Result<(), Problem> {
        if self.limits().is_none() {
            return Ok(());
        }
        Err(Problem::forbidden(format!(
            "key '{}' may name certain functions only, so it can't {what}: use a key without such a list",
            self.key.name
        )))
    }

    fn owns(&self, view: &FunctionView) -> bool {
        self.any || view.account == self.account
    }

    fn shared(&self, version: &VersionView) -> bool {
        version
            .shared_with
            .iter()
            .any(|a| a == "*" || **a == *self.account.0)
    }

    /// A function of the account itself, or why not.
    fn own(&self, api: &Api, function: FunctionId) -> Result<Arc<FunctionView>, Problem> {
        let view = self.visible(api, function)?;
        if self.owns(&view) {
            return Ok(view);
        }
        Err(Problem::forbidden(format!(
            "function {function} is another account's, and shared to be called only"
        )))
    }

    /// A function of the account, or one with a version shared with it.
    fn visible(&self, api: &Api, function: FunctionId) -> Result<Arc<FunctionView>, Problem> {
        let view = api.directory.view(function);
        let view = view
            .filter(|view| self.owns(view) || view.versions.iter().any(|v| self.shared(v)))
            .ok_or_else(|| no_function(function))?;
        if self.names(function) {
            return Ok(view);
        }
        Err(Problem::forbidden(format!(
            "key '{}' may not name function {function}: use a key that may",
            self.key.name
        )))
    }

    /// A version of the account itself.
    fn own_version(
        &self,
        api: &Api,
        function: FunctionId,
        version: VersionId,
    ) -> Result<VersionView, Problem> {
        let view = self.own(api, function)?;
        view.version(version)
            .cloned()
            .ok_or_else(|| no_version(function, version))
    }
}

/// NVCF's answers of one kind, in OpenAPI's words.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Weir",
        description = "Serverless GPU functions: the lifecycle API of NVIDIA Cloud Functions, and Weir's own. \
            Errors are RFC 9457 problem documents; every answer has an NVCF-REQID header. Members that are not described \
            are ignored, and a `null` member is the same as none, but for a deployment's `trafficWeight`; names of \
            enumerations are taken in any case. Durations are ISO 8601, moments RFC 3339. Invocations are not here: they \
            go to the data plane, as plain HTTP with a `function-id` header or to \
            /v2/nvcf/pexec/functions/{functionId}. Paths under /v2/nvcf/accounts/{ncaId} act for that account and are \
            the admin key's."
    ),
    components(schemas(problem::ProblemDocument))
)]
struct Description;

/// What a tenant has; also under `/accounts/{ncaId}` for the admin.
fn tenant() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(functions::create, functions::list))
        .routes(routes!(functions::ids))
        .routes(routes!(functions::create_version, functions::versions))
        .routes(routes!(
            functions::read,
            functions::update,
            functions::delete
        ))
        .routes(routes!(functions::update_metadata))
        .routes(routes!(
            functions::set_rate_limit,
            functions::remove_rate_limit
        ))
        .routes(routes!(
            deployments::create,
            deployments::read,
            deployments::update,
            deployments::delete
        ))
        .routes(routes!(deployments::read_by_id))
        .routes(routes!(deployments::patch))
        .routes(routes!(
            authorizations::read_function,
            authorizations::set_function,
            authorizations::clear_function
        ))
        .routes(routes!(
            authorizations::read_version,
            authorizations::set_version,
            authorizations::clear_version
        ))
        .routes(routes!(authorizations::add_function))
        .routes(routes!(authorizations::remove_function))
        .routes(routes!(authorizations::add_version))
        .routes(routes!(authorizations::remove_version))
        .routes(routes!(queues::of_function))
        .routes(routes!(queues::of_version))
        .routes(routes!(queues::position))
        .routes(routes!(clusters::groups))
        .routes(routes!(clusters::gpus))
}

/// The whole API and its description.
pub fn router(context: Arc<Context>) -> axum::Router {
    let (router, description) = parts();
    let text: Arc<str> = description::finished(&description).to_string().into();
    let api = Arc::new(Api {
        context,
        tallies: Mutex::default(),
    });
    router
        .merge(unsupported::routes())
        .route(
            "/openapi.json",
            get(move || async move {
                (
                    [(header::CONTENT_TYPE, "application/json")],
                    text.to_string(),
                )
            }),
        )
        .fallback(problem::no_path)
        .method_not_allowed_fallback(problem::no_method)
        .layer(middleware::from_fn(problem::answer))
        .with_state(api)
}

fn parts() -> (axum::Router<Arc<Api>>, OpenApi) {
    let admin = OpenApiRouter::new()
        .routes(routes!(accounts::create, accounts::list))
        .routes(routes!(accounts::read, accounts::update, accounts::delete));
    let twins = tenant().routes(routes!(deployments::list));
    let own = OpenApiRouter::new()
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::read, keys::delete))
        .routes(routes!(instances::list))
        .routes(routes!(instances::read))
        .routes(routes!(instances::logs))
        .routes(routes!(instances::nodes))
        .routes(routes!(instances::decisions));
    let (router, mut description) = OpenApiRouter::with_openapi(Description::openapi())
        .nest("/v2/nvcf", tenant().merge(admin))
        .nest("/v2/nvcf/accounts/{ncaId}", twins)
        .nest("/v2/weir", own)
        .split_for_parts();
    complete(&mut description);
    (router, description)
}

/// What the macros can't say: the twins' parameter and names, and that keys are bearer tokens.
fn complete(description: &mut OpenApi) {
    for (path, item) in &mut description.paths.paths {
        let twin = path.starts_with("/v2/nvcf/accounts/{ncaId}/");
        let methods: [&mut Option<Operation>; 5] = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.delete,
            &mut item.patch,
        ];
        for operation in methods.into_iter().flatten() {
            // Handlers of different things share names: the path tells them apart.
            let name = operation.operation_id.take().unwrap_or_default();
            let kind = path
                .split('/')
                .nth(if twin { 5 } else { 3 })
                .unwrap_or("weir");
            let who = if twin { "admin_" } else { "" };
            operation.operation_id = Some(format!("{who}{kind}_{name}"));
            operation.tags = Some(vec![kind.to_owned()]);
            if twin {
                let account = ParameterBuilder::new()
                    .name("ncaId")
                    .parameter_in(ParameterIn::Path)
                    .required(utoipa::openapi::Required::True)
                    .description(Some("The account acted for"))
                    .schema(Some(utoipa::schema!(String)))
                    .build();
                operation
                    .parameters
                    .get_or_insert_default()
                    .insert(0, account.into());
            }
        }
    }
    let components = description.components.get_or_insert_default();
    components.add_security_scheme(
        "key",
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    description.security = Some(vec![SecurityRequirement::new("key", Vec::<String>::new())]);
}

/// Shorthand of every handler.
type At = State<Arc<Api>>;
