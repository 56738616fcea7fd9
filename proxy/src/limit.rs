//! Rate limits of a version: NVCF's strings (`100-S,5000-H`), counted exactly
//! and before the queue, by the generic cell rate algorithm (`governor`).
//!
//! Counted are a key's invocations by `perUserRate`, and then an account's: by
//! its own rate in `perNcaIdRate`, else by `rateLimit`, which is for each
//! account alike and which those in `exemptedNcaIds` skip. An invocation that
//! a later rate refuses has been counted by the earlier ones, as in NVCF.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use dashmap::DashMap;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter, clock::Clock};
use weir_control::model::{Key, RateLimit, VersionId};

use crate::{refusal::Refusal, table::VersionRoute};

/// Counters by version and by what they count.
#[derive(Default)]
pub struct Limits {
    counters: DashMap<(VersionId, String), Arc<Counters>>,
}

/// The rates of one string.
struct Counters {
    text: String,
    rates: Vec<DefaultDirectRateLimiter>,
}

impl Limits {
    pub fn check(&self, version: &VersionRoute, key: &Key) -> Result<(), Refusal> {
        let Some(limit) = &version.version.rate_limit else {
            return Ok(());
        };
        let id = version.version.id;
        for (who, text) in applicable(limit, key) {
            let counters = self.counters(id, who, text);
            for rate in &counters.rates {
                if let Err(over) = rate.check() {
                    let wait = over.wait_time_from(governor::clock::DefaultClock::default().now());
                    return Err(Refusal::RateLimited { retry_after: wait });
                }
            }
        }
        Ok(())
    }

    fn counters(&self, version: VersionId, who: String, text: &str) -> Arc<Counters> {
        let entry = self
            .counters
            .entry((version, who))
            .or_insert_with(|| Counters::of(text));
        if entry.text == text {
            return entry.value().clone();
        }
        // The version's limit was changed: count anew.
        let mut entry = entry;
        *entry.value_mut() = Counters::of(text);
        entry.value().clone()
    }

    /// Forgets versions that are gone.
    pub fn keep(&self, mut alive: impl FnMut(VersionId) -> bool) {
        self.counters.retain(|(version, _), _| alive(*version));
    }
}

impl Counters {
    fn of(text: &str) -> Arc<Self> {
        Arc::new(Self {
            text: text.to_owned(),
            rates: parse(text).into_iter().map(RateLimiter::direct).collect(),
        })
    }
}

fn applicable<'a>(limit: &'a RateLimit, key: &Key) -> Vec<(String, &'a str)> {
    let mut rates = Vec::new();
    if let Some(rate) = &limit.per_user_rate {
        rates.push((format!("key {}", key.id), rate.as_str()));
    }
    match limit.per_nca_id_rate.get(&*key.account.0) {
        Some(rate) => rates.push((format!("account {}", key.account), rate.as_str())),
        None if limit
            .exempted_nca_ids
            .iter()
            .any(|exempt| **exempt == *key.account.0) => {}
        None => rates.extend(
            limit
                .rate_limit
                .as_deref()
                .map(|rate| (format!("account {}", key.account), rate)),
        ),
    }
    rates
}

/// The quotas of a string; what is no rate counts as none (the API refuses such strings).
fn parse(text: &str) -> Vec<Quota> {
    text.split(',')
        .filter_map(|rate| {
            let (count, unit) = rate.trim().split_once('-')?;
            let count: NonZeroU32 = count.parse().ok()?;
            let seconds = match unit {
                "S" => 1,
                "M" => 60,
                "H" => 3600,
                "D" => 86_400,
                _ => return None,
            };
            let period = Duration::from_secs(seconds) / count.get();
            Some(Quota::with_period(period.max(Duration::from_nanos(1)))?.allow_burst(count))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(account: &str) -> Key {
        let mut key =
            weir_control::auth::admin_key(weir_control::auth::ENVIRONMENT_KEY, String::new());
        key.account = weir_control::model::AccountId(account.into());
        key
    }

    #[test]
    fn each_account_has_the_rate_to_itself() {
        let limit = RateLimit {
            rate_limit: Some("2-M".into()),
            exempted_nca_ids: vec!["exempt".into()],
            per_nca_id_rate: [("own".to_owned(), "5-M".to_owned())].into(),
            ..RateLimit::default()
        };
        let of = |account| applicable(&limit, &key(account));
        assert_eq!(of("a"), [("account a".to_owned(), "2-M")]);
        assert_eq!(of("b"), [("account b".to_owned(), "2-M")]);
        assert_eq!(of("own"), [("account own".to_owned(), "5-M")]);
        assert_eq!(of("exempt"), []);
    }

    #[test]
    fn a_rate_lets_its_count_through_at_once_and_no_more() {
        let counters = Counters::of("3-H,1000-D");
        let passed = (0..10)
            .filter(|_| counters.rates.iter().all(|rate| rate.check().is_ok()))
            .count();
        assert_eq!(passed, 3);
        assert!(parse("x-S,5,7-W").is_empty());
    }
}
