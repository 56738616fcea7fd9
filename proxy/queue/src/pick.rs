//! Which of the free instances a request gets: a pure function of loads,
//! preference and a random number.
//!
//! It knows neither the lock nor the line. It costs one pass over the
//! instances that have a free slot; when there is a queue, that is one.

use crate::{InstanceKey, Preference};

/// An instance that may be given out now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// What `pick` answers with.
    pub(crate) id: usize,
    pub(crate) key: InstanceKey,
    pub(crate) busy: usize,
    /// More than `busy`.
    pub(crate) capacity: usize,
}

/// The sums over all ready instances, full ones included.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Crowd {
    pub(crate) busy: usize,
    pub(crate) capacity: usize,
}

/// `free` yields the instances with a free slot; `find` looks one of them up
/// by key. `None` only when nothing is free.
pub(crate) fn pick(
    preference: &Preference,
    free: impl Iterator<Item = Candidate>,
    find: impl Fn(InstanceKey) -> Option<usize>,
    crowd: Crowd,
    random: u64,
) -> Option<usize> {
    match preference {
        Preference::LeastLoaded => least_loaded(free, random),
        Preference::Hash(hash) => by_hash(free, *hash, crowd),
        Preference::Ranked(keys) => keys
            .iter()
            .find_map(|key| find(*key))
            .or_else(|| least_loaded(free, random)),
    }
}

/// The lowest busy share; each of the equal ones with the same chance (a
/// reservoir of one), so that an idle fleet wears evenly.
fn least_loaded(free: impl Iterator<Item = Candidate>, mut random: u64) -> Option<usize> {
    let mut best: Option<Candidate> = None;
    let mut equals: u64 = 0;
    for candidate in free {
        let order = best.map_or(std::cmp::Ordering::Less, |best| {
            share(&candidate, &best).cmp(&share(&best, &candidate))
        });
        match order {
            std::cmp::Ordering::Less => {
                best = Some(candidate);
                equals = 1;
            }
            std::cmp::Ordering::Equal => {
                equals += 1;
                random = mix(random);
                if (u128::from(random) * u128::from(equals)) >> 64 == 0 {
                    best = Some(candidate);
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    best.map(|candidate| candidate.id)
}

/// `a.busy / a.capacity` over the common denominator with `b`.
fn share(a: &Candidate, b: &Candidate) -> u128 {
    a.busy as u128 * b.capacity as u128
}

/// Rendezvous (highest random weight) hashing: Thaler and Ravishankar, "Using
/// name-based mappings to increase hit rates", 1998. An instance that comes or
/// goes moves only its own keys, and proxies agree without talking. A hot key
/// spills over by the rule of Mirrokni, Thorup and Zadimoghaddam, "Consistent
/// hashing with bounded loads", 2018: no instance takes more than 1.25 times
/// its part of the load (rounded up), as long as another may have it.
fn by_hash(free: impl Iterator<Item = Candidate>, hash: u64, crowd: Crowd) -> Option<usize> {
    free.map(|candidate| {
        (
            within_bound(&candidate, crowd),
            score(hash, candidate.key),
            candidate.key,
            candidate.id,
        )
    })
    .max()
    .map(|(.., id)| id)
}

fn within_bound(candidate: &Candidate, crowd: Crowd) -> bool {
    let part = 5 * (crowd.busy as u128 + 1) * candidate.capacity as u128;
    let bound = part.div_ceil(4 * (crowd.capacity as u128).max(1));
    (candidate.busy as u128) < bound
}

/// Fixed for good: proxies of different versions must agree, which no hasher
/// crate promises.
fn score(hash: u64, key: InstanceKey) -> u64 {
    let [high, low] = [(key >> 64) as u64, key as u64];
    mix(mix(mix(hash) ^ high) ^ low)
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
