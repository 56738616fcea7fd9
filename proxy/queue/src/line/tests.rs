use proptest::prelude::*;

use super::*;

fn at(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn everyone(line: &mut Line) -> Vec<usize> {
    std::iter::from_fn(|| line.next()).collect()
}

#[test]
fn urgent_first_then_by_arrival() {
    let mut line = Line::default();
    line.join(0, 5, 1, at(0));
    line.join(1, 0, 1, at(9));
    line.join(2, 5, 1, at(2));
    line.join(3, 5, 1, at(1));
    line.join(4, 200, 1, at(0));
    assert_eq!(everyone(&mut line), [1, 0, 3, 2, 4]);
}

#[test]
fn accounts_take_turns() {
    let mut line = Line::default();
    for id in 0..4 {
        line.join(id, 5, 1, at(0));
    }
    line.join(4, 5, 2, at(1));
    line.join(5, 5, 2, at(1));
    line.join(6, 5, 3, at(2));
    assert_eq!(everyone(&mut line), [0, 4, 6, 1, 5, 2, 3]);
}

#[test]
fn one_that_requeues_is_before_its_accounts_younger_ones() {
    let mut line = Line::default();
    line.join(0, 5, 1, at(5));
    line.join(1, 5, 1, at(6));
    line.join(2, 5, 1, at(1));
    assert_eq!(everyone(&mut line), [2, 0, 1]);
}

#[test]
fn each_eighth_is_the_oldest() {
    let mut line = Line::default();
    line.join(100, 9, 1, at(0));
    line.join(101, 9, 1, at(1));
    for id in 0..20 {
        line.join(id, 0, 2, at(2));
    }
    let order = everyone(&mut line);
    assert_eq!(order[7], 100);
    assert_eq!(order[15], 101);
    assert_eq!(order[6], 6);
    assert_eq!(order[8], 7);
}

#[test]
fn who_leaves_is_not_met_and_leaves_nothing() {
    let mut line = Line::default();
    let places: Vec<_> = (0..1_000)
        .map(|id| line.join(id, (id % 10) as u8, id as u64 % 7, at(id as u64 % 13)))
        .collect();
    for place in places {
        line.leave(place);
    }
    assert!(line.is_empty());
    assert_eq!(line.next(), None);
    assert!(
        line.lanes
            .iter()
            .all(|lane| lane.turns.is_empty() && lane.accounts.is_empty())
    );
    assert_eq!(line.rank(&line_place()), 0);
}

fn line_place() -> Place {
    Line::default().join(0, 9, 0, at(1_000))
}

#[test]
fn drained_is_empty() {
    let mut line = Line::default();
    line.join(3, 1, 0, at(1));
    line.join(4, 0, 0, at(0));
    assert_eq!(line.drain(), [4, 3]);
    assert!(line.is_empty());
    assert_eq!(line.next(), None);
}

/// The rules again, the slow and plain way.
#[derive(Default)]
struct Plain {
    /// id, priority, account, age.
    waiters: Vec<(usize, u8, u64, Age)>,
    /// Accounts by turn, for each priority.
    turns: BTreeMap<u8, Vec<u64>>,
    granted: u64,
}

impl Plain {
    fn join(&mut self, id: usize, priority: u8, account: u64, age: Age) {
        self.waiters.push((id, priority, account, age));
        let turns = self.turns.entry(priority).or_default();
        if !turns.contains(&account) {
            turns.push(account);
        }
    }

    fn leave(&mut self, id: usize) {
        self.waiters.retain(|waiter| waiter.0 != id);
        let waiters = &self.waiters;
        for (priority, turns) in &mut self.turns {
            turns.retain(|account| waiters.iter().any(|w| w.1 == *priority && w.2 == *account));
        }
    }

    fn next(&mut self) -> Option<usize> {
        let urgent = self.waiters.iter().map(|waiter| waiter.1).min()?;
        self.granted += 1;
        let of_all = self.granted.is_multiple_of(8);
        let turn = self.turns[&urgent][0];
        let (id, priority, account, _) = *self
            .waiters
            .iter()
            .filter(|w| of_all || (w.1 == urgent && w.2 == turn))
            .min_by_key(|w| w.3)?;
        self.leave(id);
        let turns = self.turns.get_mut(&priority).unwrap();
        if let Some(at) = turns.iter().position(|other| *other == account) {
            let account = turns.remove(at);
            turns.push(account);
        }
        Some(id)
    }

    fn rank(&self, id: usize) -> usize {
        let me = self.waiters.iter().find(|waiter| waiter.0 == id).unwrap();
        self.waiters
            .iter()
            .filter(|w| (w.1, w.3) < (me.1, me.3))
            .count()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Join {
        priority: u8,
        account: u64,
        arrival: u64,
    },
    Leave(prop::sample::Index),
    Next,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u8..3, 0u64..3, 0u64..20).prop_map(|(priority, account, arrival)| Step::Join {
            priority, account, arrival
        }),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        2 => Just(Step::Next),
    ]
}

proptest! {
    #[test]
    fn does_as_the_plain_one(steps in prop::collection::vec(step(), 0..120)) {
        let mut line = Line::default();
        let mut plain = Plain::default();
        let mut places = BTreeMap::new();
        for (id, step) in steps.into_iter().enumerate() {
            match step {
                Step::Join { priority, account, arrival } => {
                    let place = line.join(id, priority, account, at(arrival));
                    plain.join(id, priority, account, place.age);
                    places.insert(id, place);
                }
                Step::Leave(index) if !places.is_empty() => {
                    let id = *places.keys().nth(index.index(places.len())).unwrap();
                    line.leave(places.remove(&id).unwrap());
                    plain.leave(id);
                }
                Step::Leave(_) => {}
                Step::Next => {
                    let next = line.next();
                    prop_assert_eq!(next, plain.next());
                    if let Some(id) = next {
                        places.remove(&id);
                    }
                }
            }
            prop_assert_eq!(line.len(), places.len());
            for (id, place) in &places {
                prop_assert_eq!(line.rank(place), plain.rank(*id));
            }
        }
    }

    #[test]
    fn ranks_count_as_a_sorted_vector(
        keys in prop::collection::vec(0u32..5_000, 0..2_000),
        gone in prop::collection::vec(0u32..5_000, 0..2_000),
    ) {
        let mut ranks = Ranks::default();
        let mut plain = std::collections::BTreeSet::new();
        for key in keys {
            ranks.insert(key);
            plain.insert(key);
        }
        for key in gone {
            ranks.remove(&key);
            plain.remove(&key);
        }
        for (before, key) in plain.iter().enumerate() {
            prop_assert_eq!(ranks.rank(key), before);
        }
        prop_assert_eq!(ranks.rank(&5_000), plain.len());
    }
}
