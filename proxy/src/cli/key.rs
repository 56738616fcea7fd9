//! `weir key`.

use anyhow::Context;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;
use weir_control::model::SCOPES;

use super::{
    Common, Output,
    api::Client,
    id::Id,
    list, moment, note, print,
    table::{self, Column},
    text,
};

#[derive(Debug, clap::Args)]
pub struct Keys {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, clap::Subcommand)]
enum KeyCommand {
    /// Create a key; its secret is shown once
    Create(NewKey),
    /// List the keys
    List,
    /// Revoke a key
    Revoke {
        /// The key's ID, or its beginning
        id: Id,
    },
}

#[derive(Debug, clap::Args)]
struct NewKey {
    /// What people call it
    name: String,
    /// The account it acts for [default: default]
    #[arg(long)]
    account: Option<String>,
    /// What it may do (may be given again)
    #[arg(long, default_value = "invoke_function",
          value_parser = clap::builder::PossibleValuesParser::new(SCOPES), hide_possible_values = false)]
    scope: Vec<String>,
    /// A function it may name, by ID or unique name (may be given again) [default: all of the account]
    #[arg(long)]
    function: Vec<String>,
    /// Its requests' priority, 0 (most urgent) to 9 [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: Option<u8>,
    /// When it ends, such as 2027-01-31T00:00:00Z [default: never]
    #[arg(long, value_name = "TIME")]
    expires_at: Option<Timestamp>,
}

impl NewKey {
    fn body(&self, functions: &[Uuid]) -> Value {
        let mut body = Map::new();
        body.insert("name".into(), json!(self.name));
        body.insert("scopes".into(), json!(self.scope));
        if let Some(account) = &self.account {
            body.insert("account".into(), json!(account));
        }
        if !functions.is_empty() {
            body.insert("functions".into(), json!(functions));
        }
        if let Some(priority) = self.priority {
            body.insert("priority".into(), json!(priority));
        }
        if let Some(expires_at) = self.expires_at {
            body.insert("expiresAt".into(), json!(expires_at));
        }
        body.into()
    }
}

const COLUMNS: &[Column] = &[
    table::id("id"),
    table::name("name"),
    table::plain("account"),
    table::plain("scopes"),
    table::plain("functions"),
    table::number("priority"),
    table::plain("expires"),
];

fn row(key: &Value) -> Vec<String> {
    let joined = |member: &str| {
        let entries: Vec<&str> = list(key, member).iter().filter_map(Value::as_str).collect();
        entries.join(" ")
    };
    let admin = key["admin"] == true;
    let or = |text: String, default: &str| {
        if text.is_empty() {
            default.to_owned()
        } else {
            text
        }
    };
    vec![
        text(key, "id"),
        text(key, "name"),
        text(key, "account"),
        if admin {
            "all (admin)".into()
        } else {
            joined("scopes")
        },
        or(joined("functions"), "all"),
        text(key, "priority"),
        or(moment(key, "expiresAt"), "never"),
    ]
}

impl Keys {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let common = self.common;
        let client = Client::new(&common)?;
        match self.command {
            KeyCommand::Create(new) => {
                let mut functions = Vec::new();
                for wanted in &new.function {
                    match wanted.parse() {
                        Ok(id) => functions.push(id),
                        Err(_) => {
                            functions.extend(client.function(wanted).await?.first().map(|r| r.id));
                        }
                    }
                }
                let answer = client.post("/v2/weir/keys", &new.body(&functions)).await?;
                if common.output == Output::Json {
                    return print(&serde_json::to_string_pretty(&answer)?);
                }
                // The secret alone on standard output: KEY=$(weir key create ci)
                note(&format!(
                    "key {} ({}); its secret is not shown again:",
                    text(&answer["key"], "id"),
                    new.name
                ));
                print(&text(&answer, "secret"))
            }
            KeyCommand::List => {
                let answer = client.get("/v2/weir/keys").await?;
                let rows = list(&answer, "keys").iter().map(row).collect();
                common.show(&answer, COLUMNS, rows)
            }
            KeyCommand::Revoke { id } => {
                let id = match id.whole() {
                    Some(id) => id,
                    None => {
                        let answer = client.get("/v2/weir/keys").await?;
                        let ids = list(&answer, "keys")
                            .iter()
                            .filter_map(|key| text(key, "id").parse().ok());
                        id.pick(ids, |id: &Uuid| *id, "keys")?.with_context(|| {
                            format!(
                                "no key has an ID that begins with {id}; `weir key list` shows them"
                            )
                        })?
                    }
                };
                let answer = client.delete(&format!("/v2/weir/keys/{id}")).await?;
                common.say(&answer, &format!("revoked key {id}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        key: NewKey,
    }

    #[test]
    fn bodies_of_keys() {
        let plain = Line::parse_from(["x", "ci"]).key;
        assert_eq!(
            plain.body(&[]),
            json!({"name": "ci", "scopes": ["invoke_function"]})
        );

        let full = Line::parse_from([
            "x",
            "ci",
            "--account",
            "a",
            "--scope",
            "deploy_function",
            "--scope",
            "list_functions",
            "--priority",
            "0",
            "--expires-at",
            "2027-01-31T00:00:00Z",
        ])
        .key;
        assert_eq!(
            full.body(&[Uuid::from_u128(1)]),
            json!({
                "name": "ci", "account": "a", "priority": 0,
                "scopes": ["deploy_function", "list_functions"],
                "functions": ["00000000-0000-0000-0000-000000000001"],
                "expiresAt": "2027-01-31T00:00:00Z",
            })
        );
        assert!(Line::try_parse_from(["x", "ci", "--scope", "nope"]).is_err());
        assert!(Line::try_parse_from(["x", "ci", "--priority", "10"]).is_err());
    }
}
