//! The least possible instance-seconds; defined and reasoned in `replay`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// In seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) arrival: f64,
    pub(super) service: f64,
}

/// `jobs` by arrival. An instance serves `slots` at once; there are at most
/// `max_instances`, and each takes `start` seconds to start.
pub(super) fn least_instance_seconds(
    jobs: &[Job],
    slots: usize,
    max_instances: usize,
    start: f64,
) -> f64 {
    let intervals = serve(jobs, slots * max_instances);
    levels(&intervals, slots)
        .iter()
        .map(|busy| level_cost(busy, start))
        .sum()
}

/// When each job is in service, with so many slots and first come first
/// served.
fn serve(jobs: &[Job], slots: usize) -> Vec<(f64, f64)> {
    let mut free_at: BinaryHeap<Reverse<Time>> = BinaryHeap::new();
    jobs.iter()
        .map(|job| {
            let begin = if free_at.len() < slots {
                job.arrival
            } else {
                let Reverse(Time(free)) = free_at.pop().expect("there is at least one slot");
                job.arrival.max(free)
            };
            let end = begin + job.service;
            free_at.push(Reverse(Time(end)));
            (begin, end)
        })
        .collect()
}

/// For each level, when at least so many instances are needed.
fn levels(intervals: &[(f64, f64)], slots: usize) -> Vec<Vec<(f64, f64)>> {
    let mut edges: Vec<(Time, i32)> = intervals
        .iter()
        .filter(|(begin, end)| begin < end)
        .flat_map(|&(begin, end)| [(Time(begin), 1), (Time(end), -1)])
        .collect();
    // At one instant, ends go first: the next one takes over the slot.
    edges.sort();
    let mut levels: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut running = 0usize;
    for (Time(at), change) in edges {
        if change > 0 {
            if running.is_multiple_of(slots) {
                let level = running / slots;
                if level == levels.len() {
                    levels.push(Vec::new());
                }
                levels[level].push((at, f64::INFINITY));
            }
            running += 1;
        } else {
            running -= 1;
            if running.is_multiple_of(slots)
                && let Some(last) = levels[running / slots].last_mut()
            {
                last.1 = at;
            }
        }
    }
    levels
}

fn level_cost(busy: &[(f64, f64)], start: f64) -> f64 {
    let serving: f64 = busy.iter().map(|(begin, end)| end - begin).sum();
    let between: f64 = busy
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].1).min(start))
        .sum();
    let first = if busy.is_empty() { 0.0 } else { start };
    first + serving + between
}

/// Seconds, ordered.
#[derive(Clone, Copy)]
struct Time(f64);

impl PartialEq for Time {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn least(jobs: &[(f64, f64)], slots: usize, max: usize, start: f64) -> f64 {
        let jobs: Vec<Job> = jobs
            .iter()
            .map(|&(arrival, service)| Job { arrival, service })
            .collect();
        least_instance_seconds(&jobs, slots, max, start)
    }

    #[test]
    fn no_work_is_free_and_one_request_costs_a_start() {
        assert_eq!(least(&[], 4, 8, 5.0), 0.0);
        assert_eq!(least(&[(0.0, 2.0)], 4, 8, 5.0), 7.0);
    }

    #[test]
    fn a_gap_costs_itself_or_a_start_whichever_is_less() {
        assert_eq!(least(&[(0.0, 1.0), (3.0, 1.0)], 1, 8, 5.0), 5.0 + 2.0 + 2.0);
        assert_eq!(
            least(&[(0.0, 1.0), (100.0, 1.0)], 1, 8, 5.0),
            5.0 + 2.0 + 5.0
        );
    }

    #[test]
    fn slots_share_an_instance() {
        let together = [(0.0, 4.0), (0.0, 4.0), (0.0, 4.0)];
        assert_eq!(least(&together, 3, 8, 1.0), 5.0);
        assert_eq!(least(&together, 2, 8, 1.0), 10.0);
        assert_eq!(least(&together, 1, 8, 1.0), 15.0);
    }

    #[test]
    fn the_second_level_bridges_its_own_gaps() {
        // Level 1 busy 0..10; level 2 busy 1..2 and 4..5.
        let jobs = [(0.0, 10.0), (1.0, 1.0), (4.0, 1.0)];
        assert_eq!(least(&jobs, 1, 8, 3.0), (3.0 + 10.0) + (3.0 + 2.0 + 2.0));
        assert_eq!(least(&jobs, 1, 8, 0.5), (0.5 + 10.0) + (0.5 + 2.0 + 0.5));
    }

    #[test]
    fn over_the_cap_requests_wait_in_turn() {
        // One slot: served 0..2, 2..4, 4..6 without a gap.
        let jobs = [(0.0, 2.0), (0.5, 2.0), (1.0, 2.0)];
        assert_eq!(least(&jobs, 1, 1, 1.0), 7.0);
        // Two slots of two instances: 0..2, 0.5..2.5, then 2..4.
        assert_eq!(least(&jobs, 1, 2, 1.0), (1.0 + 4.0) + (1.0 + 2.0));
    }

    #[test]
    fn back_to_back_is_no_gap_and_nothing_takes_no_instance() {
        assert_eq!(least(&[(0.0, 1.0), (1.0, 1.0)], 1, 8, 5.0), 7.0);
        assert_eq!(least(&[(0.0, 0.0)], 1, 8, 5.0), 0.0);
    }

    #[test]
    fn starts_for_nothing_leave_the_integral_of_the_need() {
        // A brute-force integral agrees when starting is free.
        let jobs: Vec<(f64, f64)> = (0..200)
            .map(|i| (f64::from(i) * 0.5, f64::from(i * 7 % 13) + 0.25))
            .collect();
        let step = 0.25;
        let mut sum = 0.0;
        for tick in 0..2000 {
            let now = f64::from(tick) * step + step / 2.0;
            let running = jobs.iter().filter(|(a, s)| *a <= now && now < a + s);
            sum += running.count().div_ceil(3) as f64 * step;
        }
        assert!((least(&jobs, 3, 1000, 0.0) - sum).abs() < 1e-6);
    }
}
