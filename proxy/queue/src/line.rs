//! The order of those who wait.
//!
//! Priority 0 goes before 9. Inside one priority the accounts take turns, so
//! one account's thousand do not stand before another's one; inside one
//! account the earlier arrival goes first. Every eighth grant goes to the
//! oldest of all, so the least urgent still get on. The line knows ids and
//! places; what waits there, and for what, is the queue's business.

use std::collections::BTreeMap;
use std::time::Duration;

mod ranks;
use ranks::Ranks;

const PRIORITIES: usize = 10;

/// Each grant whose number this divides goes to the oldest.
pub(crate) const OLDEST_EVERY: u64 = 8;

/// When, and as which, it came. A re-queued request keeps its first arrival,
/// so the sequence number decides only between equal times.
type Age = (Duration, u64);

/// Where a waiter stands; needed to leave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    priority: u8,
    account: u64,
    age: Age,
}

#[derive(Debug, Default)]
pub(crate) struct Line {
    lanes: [Lane; PRIORITIES],
    oldest: BTreeMap<Age, (usize, Place)>,
    ranks: Ranks<(u8, Age)>,
    joined: u64,
    granted: u64,
    /// The next turn's number, rising over all lanes.
    turn: u64,
}

/// The waiters of one priority.
#[derive(Debug, Default)]
struct Lane {
    /// Turn number to account; the lowest is next.
    turns: BTreeMap<u64, u64>,
    accounts: BTreeMap<u64, Account>,
}

/// Exists only while one of it waits.
#[derive(Debug)]
struct Account {
    turn: u64,
    waiters: BTreeMap<Age, usize>,
}

impl Line {
    pub(crate) fn len(&self) -> usize {
        self.oldest.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.oldest.is_empty()
    }

    pub(crate) fn join(
        &mut self,
        id: usize,
        priority: u8,
        account: u64,
        arrival: Duration,
    ) -> Place {
        let age = (arrival, self.joined);
        self.joined += 1;
        let priority = priority.min(PRIORITIES as u8 - 1);
        let place = Place {
            priority,
            account,
            age,
        };
        let lane = &mut self.lanes[usize::from(priority)];
        lane.accounts
            .entry(account)
            .or_insert_with(|| {
                self.turn += 1;
                lane.turns.insert(self.turn, account);
                Account {
                    turn: self.turn,
                    waiters: BTreeMap::new(),
                }
            })
            .waiters
            .insert(age, id);
        self.oldest.insert(age, (id, place));
        self.ranks.insert((priority, age));
        place
    }

    pub(crate) fn leave(&mut self, place: Place) {
        let lane = &mut self.lanes[usize::from(place.priority)];
        if let Some(account) = lane.accounts.get_mut(&place.account) {
            account.waiters.remove(&place.age);
            if account.waiters.is_empty() {
                lane.turns.remove(&account.turn);
                lane.accounts.remove(&place.account);
            }
        }
        self.oldest.remove(&place.age);
        self.ranks.remove(&(place.priority, place.age));
    }

    /// Takes the one whose turn it is out of the line.
    pub(crate) fn next(&mut self) -> Option<usize> {
        let (id, place) = if (self.granted + 1).is_multiple_of(OLDEST_EVERY) {
            self.oldest.values().next().copied()
        } else {
            self.by_turn()
        }?;
        self.granted += 1;
        self.leave(place);
        // Served, by turn or by age: to the end of the lane with the account.
        let lane = &mut self.lanes[usize::from(place.priority)];
        if let Some(account) = lane.accounts.get_mut(&place.account) {
            lane.turns.remove(&account.turn);
            self.turn += 1;
            account.turn = self.turn;
            lane.turns.insert(self.turn, place.account);
        }
        Some(id)
    }

    fn by_turn(&self) -> Option<(usize, Place)> {
        self.lanes.iter().find_map(|lane| {
            let account = lane.turns.values().next()?;
            let age = lane.accounts.get(account)?.waiters.keys().next()?;
            self.oldest.get(age).copied()
        })
    }

    /// How many stand before it, by priority and age.
    pub(crate) fn rank(&self, place: &Place) -> usize {
        self.ranks.rank(&(place.priority, place.age))
    }

    /// Sends everyone home.
    pub(crate) fn drain(&mut self) -> Vec<usize> {
        let ids = self.oldest.values().map(|(id, _)| *id).collect();
        self.oldest.clear();
        self.lanes = Default::default();
        self.ranks = Ranks::default();
        ids
    }
}

#[cfg(test)]
mod tests;
