use proptest::prelude::*;

use super::*;

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn settings() -> Settings {
    Settings {
        max: 10,
        concurrency: 4,
        ..Settings::default()
    }
}

fn ready(ready: u32) -> Observed {
    Observed {
        ready,
        ..Observed::default()
    }
}

/// A load of whole invocations that changes at the given seconds, sampled each `step`.
fn constant(settings: &Settings, load: u32, from: u32, to: u32) -> History {
    let mut history = History::new(settings);
    for second in from..=to {
        history.push(Sample {
            at: Duration::from_secs(second.into()),
            area: f64::from(load) * f64::from(second - from),
            arrivals: 0,
            in_system: load,
            queued: 0,
        });
    }
    history
}

fn queued(history: &mut History, at: f64, count: u32) {
    history.push(Sample {
        at: seconds(at),
        area: 0.0,
        arrivals: count.into(),
        in_system: count,
        queued: count,
    });
}

#[test]
fn a_version_never_called_stays_at_zero() {
    let history = History::new(&settings());
    let (decision, _) = decide(
        &settings(),
        &history,
        ready(0),
        State::default(),
        seconds(1.0),
    );
    assert_eq!((decision.desired, decision.reason), (0, Reason::Idle));
}

#[test]
fn one_call_wakes_one_at_once() {
    let mut history = History::new(&settings());
    queued(&mut history, 5.0, 1);
    let (decision, _) = decide(
        &settings(),
        &history,
        ready(0),
        State::default(),
        seconds(5.0),
    );
    assert_eq!((decision.desired, decision.reason), (1, Reason::Wake));
}

#[test]
fn errors_do_not_count_as_capacity() {
    let mut history = History::new(&settings());
    queued(&mut history, 5.0, 1);
    let observed = Observed {
        error: 3,
        ..Observed::default()
    };
    let (decision, _) = decide(
        &settings(),
        &history,
        observed,
        State::default(),
        seconds(5.0),
    );
    assert_eq!((decision.desired, decision.error), (1, 3));
}

#[test]
fn a_flat_load_wants_the_average_over_the_target() {
    let history = constant(&settings(), 8, 0, 120);
    let (decision, _) = decide(
        &settings(),
        &history,
        ready(3),
        State::default(),
        seconds(120.0),
    );
    assert!((decision.stable_average - 8.0).abs() < 1e-9);
    assert!((decision.panic_average - 8.0).abs() < 1e-9);
    assert_eq!(decision.stable_desired, 3);
    // Found with more than one instance at its start, it waits a stable window first.
    assert_eq!(decision.reason, Reason::Panic);
}

#[test]
fn a_target_met_exactly_wants_no_more() {
    for count in 1..50_u32 {
        assert_eq!(instances(2.8 * f64::from(count), 4.0 * 0.7), count);
    }
}

#[test]
fn panic_holds_for_a_stable_window_and_then_falls() {
    let settings = settings();
    let mut history = constant(&settings, 1, 0, 100);
    let (_, state) = decide(
        &settings,
        &history,
        ready(1),
        State::default(),
        seconds(100.0),
    );
    let mut area = 100.0;
    let mut state = state;
    let mut most = 0;
    let mut fell = None;
    for second in 101..300_u32 {
        let load = if second <= 110 { 20 } else { 1 };
        area += f64::from(load);
        history.push(Sample {
            at: Duration::from_secs(second.into()),
            area,
            arrivals: second.into(),
            in_system: load,
            queued: 0,
        });
        let (decision, next) = decide(
            &settings,
            &history,
            ready(most.max(1)),
            state,
            Duration::from_secs(second.into()),
        );
        state = next;
        if decision.desired < most && fell.is_none() {
            fell = Some(second);
            assert!(!decision.panicking);
        }
        most = most.max(decision.desired);
    }
    assert_eq!(most, 8);
    let fell = fell.unwrap();
    assert!((160..=172).contains(&fell), "{fell}");
}

#[test]
fn scale_in_delay_keeps_the_most() {
    let settings = Settings {
        scale_in_delay: Duration::from_secs(100),
        stable_window: Duration::from_secs(10),
        panic_window: Duration::from_secs(1),
        ..settings()
    };
    let decided = |load, from, to, state| {
        let history = constant(&settings, load, from, to);
        decide(
            &settings,
            &history,
            ready(3),
            state,
            Duration::from_secs(to.into()),
        )
    };
    let (_, state) = decided(8, 0, 20, State::default());
    let (decision, state) = decided(1, 20, 100, state);
    assert_eq!(
        (decision.desired, decision.reason),
        (3, Reason::ScaleInDelay)
    );
    let (decision, _) = decided(1, 20, 123, state);
    assert_eq!((decision.desired, decision.reason), (1, Reason::Stable));
}

#[test]
fn a_call_between_two_samples_counts_as_activity() {
    let mut history = History::new(&settings());
    for (at, arrivals) in [(0.0, 0), (1.0, 0), (2.0, 1)] {
        history.push(Sample {
            at: seconds(at),
            arrivals,
            ..Sample::default()
        });
    }
    let decided = |at| decide(&settings(), &history, ready(1), State::default(), at).0;
    assert_eq!(history.last_activity(), Some(seconds(2.0)));
    assert_eq!(decided(seconds(10.0)).desired, 1);
    assert_eq!(decided(seconds(10.0)).reason, Reason::Hold);
}

#[test]
fn steps_go_up_hold_and_go_down() {
    let settings = Settings {
        policy: Policy::NvcfStep(Steps::default()),
        ..settings()
    };
    let decided = |load, observed| {
        let history = constant(&settings, load, 0, 120);
        let (decision, _) = decide(
            &settings,
            &history,
            observed,
            State::default(),
            seconds(120.0),
        );
        (decision.desired, decision.reason)
    };
    assert_eq!(decided(15, ready(5)), (6, Reason::StepUp));
    assert_eq!(decided(14, ready(5)), (5, Reason::Steady));
    assert_eq!(decided(6, ready(5)), (5, Reason::Steady));
    assert_eq!(decided(5, ready(5)), (4, Reason::StepDown));
    assert_eq!(decided(1, ready(1)), (1, Reason::StepDown));
    let starting = Observed {
        starting: 1,
        ..ready(5)
    };
    assert_eq!(decided(24, starting), (6, Reason::Steady));
}

#[test]
fn steps_are_those_of_the_configuration() {
    let configuration = |text: &str| Steps::of(&serde_json::from_str(text).unwrap());
    assert_eq!(configuration("{}"), Steps::default());
    let given = configuration(
        r#"{"scaleUpDetails": {"factor": 4, "threshold": 5},
            "scaleDownDetails": {"factor": 0.5, "threshold": 1, "stickiness": {"size": "PT5M", "threshold": "PT2M30S"}}}"#,
    );
    let expected = Steps {
        up_threshold: 5.0,
        up_factor: 4.0,
        up_stickiness: None,
        down_threshold: 1.0,
        down_factor: 0.5,
        down_stickiness: Some(Stickiness {
            size: 5,
            threshold: 3,
        }),
    };
    assert_eq!(given, expected);
    // Half of the slots: nothing by NVCF's own numbers, and four times as many by these.
    let decided = |steps| {
        let settings = Settings {
            policy: Policy::NvcfStep(steps),
            ..settings()
        };
        let history = constant(&settings, 2, 0, 120);
        let (decision, _) = decide(
            &settings,
            &history,
            ready(1),
            State::default(),
            seconds(120.0),
        );
        (decision.desired, decision.reason)
    };
    assert_eq!(decided(Steps::default()), (1, Reason::Steady));
    assert_eq!(decided(given), (4, Reason::StepUp));
}

#[test]
fn a_sticky_step_waits_for_so_many_minutes() {
    let settings = Settings {
        policy: Policy::NvcfStep(Steps {
            up_stickiness: Some(Stickiness {
                size: 4,
                threshold: 2,
            }),
            ..Steps::default()
        }),
        stable_window: seconds(10.0),
        ..settings()
    };
    // By minutes: whether the load is beyond the threshold at their ends.
    let steps = |minutes: &[bool]| {
        let mut history = History::new(&settings);
        let (mut state, mut area, mut steps) = (State::default(), 0.0, Vec::new());
        for second in 0..minutes.len() as u32 * 60 {
            let load = if minutes[second as usize / 60] {
                15
            } else {
                10
            };
            area += f64::from(load);
            history.push(Sample {
                at: Duration::from_secs(second.into()),
                area,
                arrivals: 1,
                in_system: load,
                queued: 0,
            });
            let now = Duration::from_secs(second.into());
            let (decision, next) = decide(&settings, &history, ready(5), state, now);
            state = next;
            if decision.reason == Reason::StepUp {
                steps.push(second / 60);
            }
        }
        steps.dedup();
        steps
    };
    assert_eq!(steps(&[false, true, false, false, false]), [0_u32; 0]);
    assert_eq!(steps(&[false, true, true, false]), [3]);
    assert_eq!(steps(&[true, false, false, true, false]), [4]);
    assert_eq!(steps(&[true, false, false, false, true, false]), [0_u32; 0]);
}

fn share((min, max): (u32, u32)) -> Share {
    Share {
        min,
        max,
        failed: false,
    }
}

fn failed(bounds: (u32, u32)) -> Share {
    Share {
        failed: true,
        ..share(bounds)
    }
}

#[test]
fn instances_spread_over_specifications() {
    let two = [(1, 2), (2, 5)].map(share);
    assert_eq!(spread(0, &two), [1, 2]);
    assert_eq!(spread(4, &two), [2, 2]);
    assert_eq!(spread(6, &two), [2, 4]);
    assert_eq!(spread(100, &two), [2, 5]);
    assert_eq!(spread(3, &[]), [0_u32; 0]);
    let odd = [(7, 3), (u32::MAX, u32::MAX)].map(share);
    assert_eq!(spread(9, &odd), [3, u32::MAX]);
}

#[test]
fn specifications_that_failed_are_taken_last() {
    let first_failed = [failed((0, 2)), share((0, 2))];
    assert_eq!(spread(1, &first_failed), [0, 1]);
    assert_eq!(spread(3, &first_failed), [1, 2]);
    let minimum = [failed((1, 2)), share((0, 2))];
    assert_eq!(
        spread(1, &minimum),
        [1, 1],
        "a minimum that fails is no capacity"
    );
    assert_eq!(spread(3, &minimum), [1, 2]);
    let all_failed = [failed((0, 1)), failed((0, 1))];
    assert_eq!(spread(1, &all_failed), [1, 0]);
}

#[test]
fn ticks_follow_the_panic_window() {
    let tick = |window| {
        next_tick(&Settings {
            panic_window: window,
            ..settings()
        })
    };
    assert_eq!(tick(Duration::from_secs(6)), Duration::from_secs(1));
    assert_eq!(tick(Duration::ZERO), Duration::from_millis(50));
    assert_eq!(tick(Duration::MAX), Duration::from_secs(2));
}

#[test]
fn decisions_read_back_in_camel_case() {
    let history = constant(&settings(), 8, 0, 120);
    let (decision, _) = decide(
        &settings(),
        &history,
        ready(1),
        State::default(),
        seconds(120.0),
    );
    let json = serde_json::to_value(&decision).unwrap();
    assert_eq!(json["stableDesired"], 3);
    assert_eq!(json["reason"], decision.reason.to_string());
}

#[test]
fn averages_are_those_of_the_area() {
    let settings = settings();
    let mut history = History::new(&settings);
    let (mut area, mut before, mut load) = (0.0, 0.0, 0_u32);
    let mut exact: Vec<(f64, f64)> = Vec::new();
    for step in 0..200_000_u32 {
        let at = f64::from(step) * 0.001;
        area += f64::from(load) * (at - before);
        before = at;
        load = (step / 777) % 13;
        history.push(Sample {
            at: seconds(at),
            area,
            arrivals: step.into(),
            in_system: load,
            queued: 0,
        });
        exact.push((at, area));
        assert!(history.len() <= 200);
    }
    for window in [6.0, 60.0] {
        let old = exact[exact.len() - 1 - (window * 1000.0) as usize].1;
        let expected = (area - old) / window;
        let average = history.average(seconds(window), seconds(before), None, seconds(1.0));
        assert!(
            (average - expected).abs() < 0.08,
            "{window}: {average} {expected}"
        );
    }
}

#[test]
fn a_load_that_has_just_begun_is_averaged_since_then() {
    let settings = settings();
    let mut history = constant(&settings, 0, 0, 1000);
    for (at, area) in [(1000.5, 5.0), (1003.0, 30.0)] {
        history.push(Sample {
            at: seconds(at),
            area,
            arrivals: 2000,
            in_system: 10,
            queued: 0,
        });
    }
    let average = history.average(seconds(60.0), seconds(1005.0), None, seconds(1.0));
    assert!((average - 10.0).abs() < 1e-9, "{average}");
}

fn any_duration() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        Just(Duration::from_nanos(1)),
        (0_u64..100_000).prop_map(Duration::from_millis),
        any::<Duration>(),
    ]
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::Concurrency),
        Just(Policy::NvcfStep(Steps::default())),
        (any::<f64>(), any::<f64>(), any::<f64>(), any::<f64>()).prop_map(|(a, b, c, d)| {
            Policy::NvcfStep(Steps {
                up_threshold: a,
                up_factor: b,
                up_stickiness: None,
                down_threshold: c,
                down_factor: d,
                down_stickiness: Some(Stickiness {
                    size: 3,
                    threshold: 2,
                }),
            })
        }),
    ]
}

prop_compose! {
    fn any_settings()(
        policy in any_policy(),
        target_utilization in any::<f64>(),
        stable_window in any_duration(),
        panic_window in any_duration(),
        scale_in_delay in any_duration(),
        idle_timeout in any_duration(),
        min in prop_oneof![0_u32..5, any::<u32>()],
        max in prop_oneof![0_u32..50, any::<u32>()],
        concurrency in prop_oneof![0_u32..10, any::<u32>()],
    ) -> Settings {
        Settings {
            policy, target_utilization, stable_window, panic_window, scale_in_delay, idle_timeout,
            min, max, concurrency,
        }
    }
}

prop_compose! {
    fn any_sample()(
        at in any_duration(),
        area in prop_oneof![any::<f64>(), 0.0..1e6],
        arrivals in any::<u64>(),
        in_system in any::<u32>(),
        queued in any::<u32>(),
    ) -> Sample {
        Sample { at, area, arrivals, in_system, queued }
    }
}

proptest! {
    #[test]
    fn bounds_win_whatever_the_input(
        settings in any_settings(),
        steps in prop::collection::vec(
            (any_sample(), any::<(u32, u32, u32)>(), any_duration()), 1..30),
    ) {
        let mut history = History::new(&settings);
        let mut state = State::default();
        for (sample, (ready, starting, error), now) in steps {
            history.push(sample);
            let observed = Observed { ready, starting, error };
            let (decision, next) = decide(&settings, &history, observed, state, now);
            state = next;
            prop_assert!(decision.desired <= settings.max);
            prop_assert!(decision.desired >= settings.min.min(settings.max));
            prop_assert!(history.len() <= 200);
        }
    }

    /// Two versions with the same instances: the one with the larger load never wants fewer.
    #[test]
    fn more_load_never_wants_fewer(
        steps in prop::collection::vec((1_u32..40, 0_u32..20, 100_u64..5000, 0_u32..8), 1..200),
        delay in 0_u64..100,
    ) {
        let settings = Settings {
            max: 1000,
            scale_in_delay: Duration::from_secs(delay),
            ..settings()
        };
        let mut small = (History::new(&settings), State::default(), 0.0, 0);
        let mut large = small.clone();
        let mut now = Duration::ZERO;
        for (load, more, passed, count) in steps {
            now += Duration::from_millis(passed);
            let mut desired = [0, 0];
            for (index, (history, state, area, before)) in
                [&mut small, &mut large].into_iter().enumerate()
            {
                *area += f64::from(*before) * passed as f64 / 1000.0;
                *before = load + if index == 0 { 0 } else { more };
                history.push(Sample {
                    at: now, area: *area, arrivals: 0, in_system: *before, queued: 0,
                });
                let (decision, next) =
                    decide(&settings, history, ready(count), std::mem::take(state), now);
                *state = next;
                desired[index] = decision.desired;
            }
            prop_assert!(desired[1] >= desired[0], "{desired:?}");
        }
    }

    /// Without a minimum, zero means nothing in the system and no activity for the idle time.
    #[test]
    fn zero_only_when_idle(
        steps in prop::collection::vec((0_u32..2, 0_u32..3, 100_u64..30_000, 0_u32..4), 1..200),
        policy in any_policy(),
    ) {
        let settings = Settings {
            policy,
            idle_timeout: Duration::from_secs(20),
            ..settings()
        };
        let mut history = History::new(&settings);
        let mut state = State::default();
        let (mut now, mut area, mut before) = (Duration::ZERO, 0.0, 0);
        let mut last = None;
        for (load, factor, passed, count) in steps {
            now += Duration::from_millis(passed);
            area += f64::from(before) * passed as f64 / 1000.0;
            if before > 0 || load * factor > 0 {
                last = Some(now);
            }
            before = load * factor;
            history.push(Sample { at: now, area, arrivals: 0, in_system: before, queued: before });
            let (decision, next) = decide(&settings, &history, ready(count), state, now);
            state = next;
            let idle = before == 0
                && last.is_none_or(|at| now - at >= settings.idle_timeout);
            if !idle {
                prop_assert!(decision.desired >= 1);
            } else if last.is_some() {
                prop_assert_eq!(decision.desired, 0);
            }
        }
    }

    #[test]
    fn spreading_keeps_every_bound(
        desired in any::<u32>(),
        specs in prop::collection::vec((0_u32..100, 0_u32..100, any::<bool>()), 0..8),
    ) {
        let shares: Vec<Share> = specs
            .iter()
            .map(|&(min, max, failed)| Share { min, max, failed })
            .collect();
        let counts = spread(desired, &shares);
        let sum = |of: fn(&Share) -> u32| shares.iter().map(of).sum::<u32>();
        let (least, most) = (sum(|s| s.min.min(s.max)), sum(|s| s.max));
        let all: u32 = counts.iter().sum();
        prop_assert!(all >= desired.clamp(least, most) && all <= most);
        // Those that did not fail have what is wanted, as far as they may.
        let sound = |of: fn(&Share) -> u32| shares.iter().filter(|s| !s.failed).map(of).sum::<u32>();
        let had: u32 = counts.iter().zip(&shares).filter(|(_, s)| !s.failed).map(|(count, _)| count).sum();
        prop_assert_eq!(had, desired.clamp(sound(|s| s.min.min(s.max)), sound(|s| s.max)));
        for (count, share) in counts.iter().zip(&shares) {
            prop_assert!((share.min.min(share.max)..=share.max).contains(count));
        }
    }
}
