//! What to do, from what the file says and what is there: a pure function.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use uuid::Uuid;

use super::{
    super::api::Row,
    diff::{Difference, Update, difference},
    file::{DIGEST, NAME, OWNER, Wanted},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) function: Uuid,
    pub(super) id: Uuid,
    pub(super) deployed: bool,
}

impl From<&Row> for Version {
    fn from(row: &Row) -> Self {
        Self {
            function: row.id,
            id: row.version_id,
            deployed: row.deployed(),
        }
    }
}

/// One function's part of a plan: the change, and after it the removals.
#[derive(Debug, PartialEq)]
pub(super) struct Step<'a> {
    pub(super) name: String,
    pub(super) change: Change<'a>,
    /// Old versions, which serve until the change is done.
    pub(super) remove: Vec<Version>,
}

#[derive(Debug, PartialEq)]
pub(super) enum Change<'a> {
    Nothing,
    CreateFunction(&'a Wanted),
    CreateVersion(Uuid, &'a Wanted),
    /// It was made and not deployed: an earlier apply was cut off, or it was undeployed since.
    Deploy(Version, &'a Wanted),
    /// It is in ERROR.
    Redeploy(Version, &'a Wanted),
    /// Its deployment is not as the file says.
    Update(Version, &'a Wanted, Update),
    /// It is as the file says, and in this state on its way.
    Await(Version, String),
    /// Old versions wait for it.
    Replace(Version, &'a Wanted),
    /// No longer in the file.
    Delete,
    /// No longer in the file, and not to be pruned.
    Keep,
}

impl Change<'_> {
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Self::Nothing => "unchanged",
            Self::CreateFunction(_) => "created",
            Self::CreateVersion(..) => "new version",
            Self::Deploy(..) => "deployed",
            Self::Redeploy(..) => "deployed again",
            Self::Update(..) => "deployment changed",
            Self::Await(..) => "waited for",
            Self::Replace(..) => "replaced",
            Self::Delete => "deleted",
            Self::Keep => "not in the file; --prune deletes it",
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::CreateFunction(_) => Kind::Created,
            Self::CreateVersion(..)
            | Self::Deploy(..)
            | Self::Redeploy(..)
            | Self::Update(..)
            | Self::Replace(..) => Kind::Updated,
            Self::Nothing | Self::Await(..) | Self::Keep => Kind::Unchanged,
            Self::Delete => Kind::Deleted,
        }
    }
}

/// What a step comes to for its function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Created,
    Updated,
    Unchanged,
    Deleted,
}

/// What applies of an owner made, by the names in the file; oldest first, as `there` is.
fn made<'a>(there: &'a [Row], owner: &str) -> BTreeMap<&'a str, Vec<&'a Row>> {
    let owner = format!("{OWNER}{owner}");
    let mut made: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in there.iter().filter(|row| row.tags.contains(&owner)) {
        if let Some(name) = row.tags.iter().find_map(|tag| tag.strip_prefix(NAME)) {
            made.entry(name).or_default().push(row);
        }
    }
    made
}

/// The version that is as the file says, but perhaps for its deployment.
fn current<'a>(wanted: &Wanted, rows: &[&'a Row]) -> Option<&'a Row> {
    let digest = format!("{DIGEST}{}", wanted.digest);
    rows.iter()
        .rev()
        .find(|row| row.tags.contains(&digest))
        .copied()
}

/// The versions whose deployments a plan looks at.
pub(super) fn looked_at(wanted: &[Wanted], there: &[Row], owner: &str) -> Vec<Version> {
    let made = made(there, owner);
    wanted
        .iter()
        .filter(|wanted| wanted.deployment.is_some())
        .filter_map(|wanted| current(wanted, made.get(wanted.name.as_str())?))
        .filter(|row| row.deployed())
        .map(Version::from)
        .collect()
}

/// The file's functions in its order, then those it no longer has. `there` is
/// oldest first, `deployments` are those of the versions [`looked_at`].
pub(super) fn plan<'a>(
    wanted: &'a [Wanted],
    there: &[Row],
    deployments: &BTreeMap<Uuid, Value>,
    owner: &str,
    prune: bool,
) -> Vec<Step<'a>> {
    let made = made(there, owner);
    let mut steps: Vec<Step<'a>> = wanted
        .iter()
        .map(|wanted| {
            let rows = made
                .get(wanted.name.as_str())
                .map_or(&[][..], Vec::as_slice);
            step(wanted, rows, deployments)
        })
        .collect();

    let named: BTreeSet<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
    for (name, rows) in made.iter().filter(|(name, _)| !named.contains(*name)) {
        steps.push(Step {
            name: (*name).to_owned(),
            change: if prune { Change::Delete } else { Change::Keep },
            remove: if prune {
                rows.iter().map(|row| Version::from(*row)).collect()
            } else {
                Vec::new()
            },
        });
    }
    steps
}

fn step<'a>(wanted: &'a Wanted, rows: &[&Row], deployments: &BTreeMap<Uuid, Value>) -> Step<'a> {
    let current = current(wanted, rows);
    let others = |kept: Option<&Row>| -> Vec<Version> {
        rows.iter()
            .filter(|row| kept.is_none_or(|kept| kept.version_id != row.version_id))
            .map(|row| Version::from(*row))
            .collect()
    };
    let mut remove = others(current);
    let change = match (current, rows.last(), &wanted.deployment) {
        (None, None, _) => Change::CreateFunction(wanted),
        (None, Some(newest), _) => Change::CreateVersion(newest.id, wanted),
        (Some(_), _, None) => Change::Nothing,
        (Some(row), _, Some(deployment)) => {
            let version = Version::from(row);
            let there = deployments.get(&row.version_id);
            let differs = there.map_or(Difference::None, |there| difference(there, deployment));
            match (row.status.as_str(), differs) {
                ("INACTIVE", _) => Change::Deploy(version, wanted),
                ("ERROR", _) => Change::Redeploy(version, wanted),
                (_, Difference::Fixed) => {
                    remove = others(None);
                    Change::CreateVersion(row.id, wanted)
                }
                (_, Difference::Update(update)) => Change::Update(version, wanted, update),
                (_, Difference::None) if !remove.is_empty() => Change::Replace(version, wanted),
                ("ACTIVE", Difference::None) => Change::Nothing,
                (status, Difference::None) => Change::Await(version, status.to_owned()),
            }
        }
    };
    Step {
        name: wanted.name.clone(),
        change,
        remove,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str, deployed: bool) -> Wanted {
        let deployment = if deployed { "{}" } else { "null" };
        let text =
            format!("functions: [{{name: {name}, endpoints: [x], deployment: {deployment}}}]");
        super::super::file::parse(&text, "f.yaml", std::path::Path::new("/"), "weir")
            .unwrap()
            .remove(0)
    }

    /// A version that an apply of `owner` made.
    fn row(ids: (u128, u128), owner: &str, name: &str, digest: &str, status: &str) -> Row {
        Row {
            id: Uuid::from_u128(ids.0),
            version_id: Uuid::from_u128(ids.1),
            name: name.into(),
            status: status.into(),
            tags: vec![
                format!("{OWNER}{owner}"),
                format!("{NAME}{name}"),
                format!("{DIGEST}{digest}"),
            ],
            inference_url: None,
            created_at: None,
        }
    }

    fn removed(step: &Step<'_>) -> Vec<u128> {
        step.remove.iter().map(|v| v.id.as_u128()).collect()
    }

    #[test]
    fn one_function_in_every_situation() {
        let w = wanted("f", true);
        let new = w.digest.as_str();
        let r = |id, digest: &str, status| row((1, id), "me", "f", digest, status);
        let cases: Vec<(&str, Vec<Row>, &str, &[u128])> = vec![
            ("nothing there", vec![], "created", &[]),
            (
                "someone else's of that name",
                vec![row((1, 1), "you", "f", new, "ACTIVE")],
                "created",
                &[],
            ),
            ("so already", vec![r(1, new, "ACTIVE")], "unchanged", &[]),
            ("coming up", vec![r(1, new, "DEPLOYING")], "waited for", &[]),
            ("lost", vec![r(1, new, "DEGRADED")], "waited for", &[]),
            (
                "cut off before deploying",
                vec![r(1, new, "INACTIVE")],
                "deployed",
                &[],
            ),
            ("failed", vec![r(1, new, "ERROR")], "deployed again", &[]),
            ("changed", vec![r(1, "old", "ACTIVE")], "new version", &[1]),
            (
                "changed, after an earlier change failed",
                vec![r(1, "older", "ACTIVE"), r(2, "old", "ERROR")],
                "new version",
                &[1, 2],
            ),
            (
                "cut off before the old one went",
                vec![r(1, "old", "ACTIVE"), r(2, new, "ACTIVE")],
                "replaced",
                &[1],
            ),
            (
                "back to what it was before a change that failed",
                vec![r(1, new, "ACTIVE"), r(2, "old", "ERROR")],
                "replaced",
                &[2],
            ),
            (
                "made twice",
                vec![r(1, new, "ACTIVE"), r(2, new, "ACTIVE")],
                "replaced",
                &[1],
            ),
        ];
        for (case, there, change, remove) in cases {
            let steps = plan(
                std::slice::from_ref(&w),
                &there,
                &BTreeMap::new(),
                "me",
                true,
            );
            assert_eq!(steps.len(), 1, "{case}");
            assert_eq!(steps[0].change.as_str(), change, "{case}");
            assert_eq!(removed(&steps[0]), remove, "{case}");
        }
    }

    #[test]
    fn a_deployment_is_changed_where_it_can_be() {
        let text = |min| {
            let deployment = format!("{{minInstances: {min}}}");
            format!("functions: [{{name: f, endpoints: [x], deployment: {deployment}}}]")
        };
        let parse = |text: &str| {
            let dir = std::path::Path::new("/");
            super::super::file::parse(text, "f.yaml", dir, "weir").unwrap()
        };
        let (one, two) = (parse(&text(1)), parse(&text(2)));
        let told = |wanted: &[Wanted]| {
            let deployment = wanted[0].deployment.clone().unwrap().into();
            BTreeMap::from([(Uuid::from_u128(1), deployment)])
        };
        let r = |status| row((1, 1), "me", "f", &one[0].digest, status);
        let looked = looked_at(&two, &[r("ACTIVE")], "me");
        assert_eq!(looked.len(), 1);
        assert!(looked_at(&two, &[r("INACTIVE")], "me").is_empty());
        assert!(looked_at(&two, &[r("ACTIVE")], "you").is_empty());
        for status in ["ACTIVE", "DEPLOYING", "DEGRADED"] {
            let steps = plan(&two, &[r(status)], &told(&one), "me", true);
            let Change::Update(version, _, update) = &steps[0].change else {
                panic!("{status}: {steps:?}");
            };
            assert_eq!(version.id, Uuid::from_u128(1), "no new version");
            assert_eq!(
                update.body["deploymentSpecifications"][0]["minInstances"],
                2
            );
            assert!(steps[0].remove.is_empty());
        }
        let steps = plan(&two, &[r("ERROR")], &told(&one), "me", true);
        assert_eq!(steps[0].change.as_str(), "deployed again");

        // What is fixed takes a new version, and the old one serves until it is there.
        let mut gpu = told(&one);
        let spec = gpu.get_mut(&Uuid::from_u128(1)).unwrap();
        spec["deploymentSpecifications"][0]["gpu"] = "H100".into();
        let steps = plan(&one, &[r("ACTIVE")], &gpu, "me", true);
        assert_eq!(steps[0].change.as_str(), "new version");
        assert_eq!(removed(&steps[0]), [1]);
    }

    #[test]
    fn a_new_version_is_of_the_same_function() {
        let w = wanted("f", true);
        let there = [row((7, 1), "me", "f", "old", "ACTIVE")];
        let steps = plan(
            std::slice::from_ref(&w),
            &there,
            &BTreeMap::new(),
            "me",
            false,
        );
        assert_eq!(
            steps[0].change,
            Change::CreateVersion(Uuid::from_u128(7), &w)
        );
        assert!(steps[0].remove[0].deployed);
    }

    #[test]
    fn without_a_deployment_the_version_is_enough() {
        let w = wanted("f", false);
        for status in ["INACTIVE", "ACTIVE", "ERROR"] {
            let there = [row((1, 1), "me", "f", &w.digest, status)];
            let steps = plan(
                std::slice::from_ref(&w),
                &there,
                &BTreeMap::new(),
                "me",
                true,
            );
            assert_eq!(steps[0].change, Change::Nothing, "{status}");
        }
    }

    #[test]
    fn only_the_owners_own_is_pruned_and_only_when_told() {
        let w = wanted("f", true);
        let mut by_hand = row((4, 4), "me", "h", "x", "ACTIVE");
        by_hand.tags.clear();
        let there = [
            row((1, 1), "me", "f", &w.digest, "ACTIVE"),
            row((2, 2), "me", "gone", "x", "INACTIVE"),
            row((2, 5), "me", "gone", "y", "ACTIVE"),
            row((3, 3), "you", "theirs", "x", "ACTIVE"),
            by_hand,
        ];
        let steps = plan(
            std::slice::from_ref(&w),
            &there,
            &BTreeMap::new(),
            "me",
            true,
        );
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[1].name, "gone");
        assert_eq!(steps[1].change, Change::Delete);
        assert_eq!(removed(&steps[1]), [2, 5]);

        let steps = plan(
            std::slice::from_ref(&w),
            &there,
            &BTreeMap::new(),
            "me",
            false,
        );
        assert_eq!(steps[1].change, Change::Keep);
        assert!(steps[1].remove.is_empty());
    }

    #[test]
    fn applying_what_was_applied_changes_nothing() {
        let all = [wanted("a", true), wanted("b", true)];
        let there: Vec<Row> = all
            .iter()
            .zip(1..)
            .map(|(w, id)| row((id, id), "me", &w.name, &w.digest, "ACTIVE"))
            .collect();
        let steps = plan(&all, &there, &BTreeMap::new(), "me", true);
        assert!(
            steps
                .iter()
                .all(|s| s.change == Change::Nothing && s.remove.is_empty())
        );
    }
}
