use proptest::prelude::*;

use super::*;

fn seat(id: usize, busy: usize, capacity: usize) -> Candidate {
    Candidate {
        id,
        key: InstanceKey::from(mix(id as u64)) << 64 | id as InstanceKey,
        busy,
        capacity,
    }
}

/// Offers the ones with a free slot, as the queue does.
fn choose(preference: &Preference, seats: &[Candidate], random: u64) -> Option<usize> {
    let crowd = Crowd {
        busy: seats.iter().map(|seat| seat.busy).sum(),
        capacity: seats.iter().map(|seat| seat.capacity).sum(),
    };
    let free = || {
        seats
            .iter()
            .copied()
            .filter(|seat| seat.busy < seat.capacity)
    };
    let find = |key| free().find(|seat| seat.key == key).map(|seat| seat.id);
    pick(preference, free(), find, crowd, random)
}

#[test]
fn nothing_free_is_none() {
    let ranked = Preference::Ranked([seat(0, 1, 1).key].into());
    for preference in [Preference::LeastLoaded, Preference::Hash(7), ranked] {
        assert_eq!(choose(&preference, &[seat(0, 1, 1)], 0), None);
        assert_eq!(choose(&preference, &[], 0), None);
    }
}

#[test]
fn least_loaded_is_by_share_not_count() {
    let seats = [seat(0, 1, 2), seat(1, 3, 10), seat(2, 1, 3)];
    assert_eq!(choose(&Preference::LeastLoaded, &seats, 0), Some(1));
}

#[test]
fn ties_spread_evenly() {
    let seats = [
        seat(0, 1, 2),
        seat(1, 2, 4),
        seat(2, 0, 0),
        seat(3, 3, 6),
        seat(4, 1, 1),
    ];
    let mut hits = [0; 5];
    for random in 0..3_000 {
        hits[choose(&Preference::LeastLoaded, &seats, mix(random)).unwrap()] += 1;
    }
    for id in [0, 1, 3] {
        assert!((900..1_100).contains(&hits[id]), "{hits:?}");
    }
    assert_eq!([hits[2], hits[4]], [0, 0]);
}

#[test]
fn ranked_takes_the_first_that_is_free() {
    let seats = [seat(0, 0, 4), seat(1, 1, 1), seat(2, 3, 4)];
    let ranked = |ids: &[usize]| {
        let keys = ids.iter().map(|&id| seat(id, 0, 0).key).collect();
        choose(&Preference::Ranked(keys), &seats, 0)
    };
    assert_eq!(ranked(&[1, 2, 0]), Some(2));
    assert_eq!(ranked(&[1, 9]), Some(0), "else the least loaded");
    assert_eq!(ranked(&[]), Some(0));
}

#[test]
fn hash_is_steady_and_moves_only_the_lost_ones_keys() {
    let all: Vec<_> = (0..8).map(|id| seat(id, 0, 4)).collect();
    let fewer: Vec<_> = all.iter().copied().filter(|seat| seat.id != 3).collect();
    let mut hits = [0; 8];
    for hash in 0..8_000 {
        let before = choose(&Preference::Hash(hash), &all, hash).unwrap();
        hits[before] += 1;
        assert_eq!(
            choose(&Preference::Hash(hash), &all, hash + 1),
            Some(before)
        );
        if before != 3 {
            assert_eq!(choose(&Preference::Hash(hash), &fewer, 0), Some(before));
        }
    }
    assert!(
        hits.iter().all(|hits| (850..1_150).contains(hits)),
        "{hits:?}"
    );
}

/// Proxies of other versions must agree: these values are a protocol.
#[test]
fn scores_stay_as_they_are() {
    assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    assert_eq!(score(1, 2), mix(mix(mix(1)) ^ 2));
}

#[test]
fn a_hot_key_spills_over_by_the_bound() {
    let mut seats: Vec<_> = (0..4).map(|id| seat(id, 0, 100)).collect();
    for total in 1..=100usize {
        let id = choose(&Preference::Hash(42), &seats, 0).unwrap();
        seats[id].busy += 1;
        let bound = (5 * total).div_ceil(16);
        assert!(seats.iter().all(|seat| seat.busy <= bound), "{seats:?}");
    }
}

#[test]
fn when_all_are_over_their_bound_the_best_free_one_is_taken() {
    // The full one holds the load of all; a small free one is over its bound.
    let seats = [seat(0, 1, 2), seat(1, 0, 400)];
    assert_eq!(choose(&Preference::Hash(1), &seats, 0), Some(1));
    let seats = [seat(0, 1, 2), seat(1, 0, 0), seat(2, 1, 1)];
    assert_eq!(choose(&Preference::Hash(1), &seats, 0), Some(0));
}

proptest! {
    #[test]
    fn always_one_that_is_free(
        loads in prop::collection::vec((0usize..5, 0usize..5), 0..8),
        hash: u64,
        random: u64,
    ) {
        let seats: Vec<_> = loads
            .iter()
            .enumerate()
            .map(|(id, &(busy, capacity))| seat(id, busy, capacity))
            .collect();
        let any = seats.iter().any(|seat| seat.busy < seat.capacity);
        let ranked = seats.iter().map(|seat| seat.key).collect();
        for preference in [
            Preference::LeastLoaded,
            Preference::Hash(hash),
            Preference::Ranked(ranked),
        ] {
            let picked = choose(&preference, &seats, random);
            prop_assert_eq!(picked.is_some(), any);
            if let Some(id) = picked {
                prop_assert!(seats[id].busy < seats[id].capacity);
            }
        }
    }
}
