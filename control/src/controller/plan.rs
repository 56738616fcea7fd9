//! Which instances start and go so that as many are there as are wanted: a
//! pure function of those that are there and how they are.
//!
//! One that fails is no capacity: another starts beside it, as far as the
//! maximum allows, and it goes once what is ready suffices. Until then it is
//! kept, since its agent goes on trying. A specification that fails is filled
//! last.

use crate::{
    model::InstanceId,
    scale::{self, Share},
};

/// How an instance that stays is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Health {
    Ready,
    Starting,
    /// In error, or so late that it may never be ready.
    Failing,
}

/// An instance that stays, of the specification with this index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Present {
    pub(super) id: InstanceId,
    pub(super) specification: usize,
    pub(super) health: Health,
}

/// For one specification.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Step {
    /// How many start.
    pub(super) start: usize,
    /// How many more could, if as many that fail went.
    pub(super) instead: usize,
    /// Those that fail, in the order in which they go.
    pub(super) failing: Vec<InstanceId>,
    /// How many of those go.
    pub(super) failed: usize,
    /// Those that don't, in the order in which they go.
    pub(super) healthy: Vec<InstanceId>,
    /// How many of those go as soon as they are idle.
    pub(super) surplus: usize,
    /// How many of those go even if they are busy, and drain until they are not.
    pub(super) above: usize,
}

/// `present` is in the order in which they were asked for. Answers a step for each specification.
pub(super) fn plan(desired: u32, shares: &[Share], present: &[Present]) -> Vec<Step> {
    let ready = |of: &[Present]| of.iter().filter(|p| p.health == Health::Ready).count();
    let missing = (desired as usize).saturating_sub(ready(present));
    let wanted = scale::spread(desired, shares);
    let steps = shares.iter().zip(wanted).enumerate();
    steps
        .map(|(specification, (share, wanted))| {
            let (wanted, max) = (wanted as usize, share.max as usize);
            let mut own: Vec<Present> = present
                .iter()
                .filter(|p| p.specification == specification)
                .copied()
                .collect();
            let ready = ready(&own);
            // The youngest goes first, and before it what serves nothing yet.
            own.reverse();
            own.sort_by_key(|p| p.health == Health::Ready);
            let ids = |failing: bool| -> Vec<InstanceId> {
                own.iter()
                    .filter(|p| (p.health == Health::Failing) == failing)
                    .map(|p| p.id)
                    .collect()
            };
            let (failing, healthy) = (ids(true), ids(false));
            let staying = healthy.len().min(wanted);
            let kept = wanted
                .saturating_sub(ready)
                .max(missing)
                .min(max.saturating_sub(staying))
                .min(failing.len());
            let lacking = wanted - staying;
            let start = lacking.min(max - staying - kept);
            Step {
                start,
                instead: (lacking - start).min(kept),
                failed: failing.len() - kept,
                surplus: healthy.len() - staying,
                above: healthy.len().saturating_sub(max),
                failing,
                healthy,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Health::*, *};

    fn share(min: u32, max: u32, failed: bool) -> Share {
        Share { min, max, failed }
    }

    fn present(all: &[(usize, Health)]) -> Vec<Present> {
        let one = |&(specification, health): &(usize, Health)| Present {
            id: InstanceId::random(),
            specification,
            health,
        };
        all.iter().map(one).collect()
    }

    /// By specification: how many start, and how many that fail and that don't go.
    fn numbers(
        desired: u32,
        shares: &[Share],
        all: &[(usize, Health)],
    ) -> Vec<(usize, usize, usize)> {
        let steps = plan(desired, shares, &present(all));
        let numbers = |step: &Step| (step.start, step.failed, step.surplus);
        steps.iter().map(numbers).collect()
    }

    #[test]
    fn another_starts_beside_one_that_fails_and_it_goes_once_that_is_ready() {
        let one = [share(1, 2, false)];
        assert_eq!(numbers(1, &one, &[]), [(1, 0, 0)]);
        assert_eq!(numbers(1, &one, &[(0, Failing)]), [(1, 0, 0)]);
        assert_eq!(
            numbers(1, &one, &[(0, Failing), (0, Starting)]),
            [(0, 0, 0)]
        );
        assert_eq!(numbers(1, &one, &[(0, Failing), (0, Ready)]), [(0, 1, 0)]);
        // Both are wanted: the one that fails goes on trying.
        assert_eq!(numbers(2, &one, &[(0, Failing), (0, Ready)]), [(0, 0, 0)]);
        // At the maximum there is no place beside it, but one instead of it.
        let full = plan(1, &[share(0, 1, false)], &present(&[(0, Failing)]));
        assert_eq!((full[0].start, full[0].instead), (0, 1));
    }

    #[test]
    fn a_specification_that_fails_is_passed_over() {
        let two = |failed| [share(0, 1, failed), share(0, 1, false)];
        assert_eq!(
            numbers(1, &two(true), &[(0, Failing)]),
            [(0, 0, 0), (1, 0, 0)]
        );
        assert_eq!(
            numbers(1, &two(true), &[(0, Failing), (1, Ready)]),
            [(0, 1, 0), (0, 0, 0)],
            "what works is kept"
        );
        assert_eq!(numbers(1, &two(true), &[(1, Ready)]), [(0, 0, 0); 2]);
        assert_eq!(
            numbers(2, &two(true), &[(1, Ready)]),
            [(1, 0, 0), (0, 0, 0)],
            "taken last, and not never"
        );
        // A minimum is tried for ever, and does without nobody's capacity.
        let minimum = [share(1, 1, true), share(0, 1, false)];
        assert_eq!(
            numbers(1, &minimum, &[(0, Failing)]),
            [(0, 0, 0), (1, 0, 0)]
        );
        assert_eq!(
            numbers(1, &minimum, &[(0, Failing), (1, Ready)]),
            [(0, 0, 0), (0, 0, 0)]
        );
    }

    #[test]
    fn what_is_above_the_maximum_goes_busy_or_not() {
        let all = present(&[(0, Ready), (0, Ready), (0, Ready), (0, Starting)]);
        let step = &plan(1, &[share(0, 2, false)], &all)[0];
        assert_eq!((step.surplus, step.above), (3, 2));
        let order = [all[3].id, all[2].id, all[1].id, all[0].id];
        assert_eq!(step.healthy, order, "the oldest that is ready goes last");
    }

    prop_compose! {
        fn any_share()(min in 0u32..4, more in 0u32..4, failed in any::<bool>()) -> Share {
            share(min, (min + more).max(1), failed)
        }
    }

    fn any_present() -> impl Strategy<Value = Vec<(usize, Health)>> {
        let health = prop_oneof![Just(Ready), Just(Starting), Just(Failing)];
        prop::collection::vec((0usize..3, health), 0..12)
    }

    proptest! {
        /// Whatever is there: no more start than may be, nothing both starts and goes for the
        /// same place, and what is done once need not be done again.
        #[test]
        fn a_plan_keeps_to_its_bounds_and_settles(
            desired in 0u32..12,
            shares in prop::collection::vec(any_share(), 3),
            all in any_present(),
        ) {
            let steps = plan(desired, &shares, &present(&all));
            let mut after = Vec::new();
            for (at, (step, share)) in steps.iter().zip(&shares).enumerate() {
                let max = share.max as usize;
                let (failing, healthy) = (step.failing.len(), step.healthy.len());
                prop_assert!(step.failed <= failing && step.surplus <= healthy);
                prop_assert!(step.start == 0 || step.start + failing - step.failed + healthy <= max);
                prop_assert!(step.start == 0 || step.surplus == 0);
                prop_assert!(step.instead <= failing - step.failed);
                let left = failing - step.failed + healthy - step.surplus + step.start;
                prop_assert!(left <= max, "{left} of {max} are left");
                let of = |health| all.iter().filter(move |p| **p == (at, health)).count();
                let starting = (of(Starting) + step.start).saturating_sub(step.surplus);
                let ready = healthy - step.surplus + step.start - starting;
                after.extend(std::iter::repeat_n((at, Ready), ready));
                after.extend(std::iter::repeat_n((at, Starting), starting));
                after.extend(std::iter::repeat_n((at, Failing), failing - step.failed));
            }
            for (step, before) in plan(desired, &shares, &present(&after)).iter().zip(&steps) {
                prop_assert_eq!((step.start, step.surplus), (0, 0), "after {:?}", before);
            }
        }

        /// Where nothing else can be had, as many are healthy or tried as are wanted.
        #[test]
        fn capacity_that_can_be_had_is_had(desired in 0u32..12, shares in prop::collection::vec(any_share(), 1..4)) {
            let sound: u32 = shares.iter().filter(|s| !s.failed).map(|s| s.max).sum();
            let steps = plan(desired, &shares, &[]);
            let started: usize = steps.iter().zip(&shares).filter(|(_, s)| !s.failed).map(|(step, _)| step.start).sum();
            prop_assert!(started >= desired.min(sound) as usize);
        }
    }
}
