//! The status of four functions, as it looks at 80 and at 200 columns.

use std::collections::HashMap;

use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    super::{
        super::api::Row,
        seen::{Load, Seen},
    },
    *,
};

fn version(number: u128) -> Uuid {
    Uuid::from_u128((0xabcd_0000 + number) << 96)
}

fn seen() -> Seen {
    let row = |number: u128, name: &str, status: &str| -> Row {
        serde_json::from_value(json!({
            "id": Uuid::from_u128(number), "versionId": version(number), "name": name, "status": status,
        }))
        .unwrap()
    };
    let instance = |number: u128, of: u128, state: &str, error: Option<&str>| {
        json!({
            "id": Uuid::from_u128((0xef01_0000 + number) << 96), "functionId": Uuid::from_u128(of),
            "functionVersionId": version(of), "deploymentId": Uuid::nil(),
            "gpuSpecificationId": Uuid::nil(), "node": "local", "state": state, "capacity": 4,
            "createdAt": "2026-01-01T00:00:00Z", "restarts": u8::from(error.is_some()) * 3, "error": error,
        })
    };
    let failed =
        "exited with status 1; last log line: CUDA out of memory, tried to allocate 2.00 GiB";
    let told = json!([
        instance(1, 1, "ready", None),
        instance(2, 1, "ready", None),
        instance(3, 1, "starting", None),
        instance(4, 2, "error", Some(failed)),
        instance(5, 2, "draining", None),
        instance(6, 2, "starting", None),
    ]);
    let instances = serde_json::from_value(told.clone()).unwrap();
    let load = |busy, free, queued| Load { busy, free, queued };
    let decision = |more: Value| {
        let mut all = json!({"at": "2026-01-01T00:00:00Z"});
        all.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        vec![serde_json::from_value(all).unwrap()]
    };
    Seen::of(
        vec![
            row(4, "idle", "ACTIVE"),
            row(1, "chat-with-a-name-that-goes-on-and-on-for-long", "ACTIVE"),
            row(2, "broken", "DEGRADED"),
            row(3, "off", "INACTIVE"),
        ],
        (told, instances),
        &HashMap::from([
            (version(1), load(8, 0, 17)),
            (version(2), load(0, 0, 2)),
            (version(4), load(0, 0, 0)),
        ]),
        HashMap::from([
            (
                version(1),
                decision(
                    json!({"desired": 3, "reason": "stable", "stableAverage": 8.25, "target": 2.8}),
                ),
            ),
            (
                version(2),
                decision(json!({"desired": 2, "reason": "wake", "queued": 2})),
            ),
            (
                version(4),
                decision(json!({"desired": 0, "reason": "idle"})),
            ),
        ]),
    )
}

fn wish(width: Option<usize>) -> Wish<'static> {
    Wish {
        address: "127.0.0.1:8081",
        instances: false,
        decisions: false,
        trouble: None,
        now: "2026-01-01T00:02:05Z".parse().unwrap(),
        screen: Screen {
            width,
            colour: false,
        },
    }
}

#[test]
fn at_80_columns() {
    let shown = Frame::of(&seen(), &wish(Some(80))).whole();
    assert_eq!(
        shown,
        "\
weir 127.0.0.1:8081  1 DEGRADED  2 ACTIVE  1 INACTIVE  19 queued  8/8 slots busy

FUNCTION             VERSION   STATE     INSTANCES  SLOTS  QUEUE  DECISION
broken               abcd0002  DEGRADED  1s 1d 1e     0/0      2  2 wake 2m05s
chat-with…-for-long  abcd0001  ACTIVE    2r 1s        8/8     17  3 stable 2m05s
idle                 abcd0004  ACTIVE    -            0/0      0  0 idle 2m05s
off                  abcd0003  INACTIVE  -              -      -  -

Recent errors
FUNCTION  INSTANCE  STATE  RESTARTS  LAST ERROR
broken    ef010004  error         3  exited with status 1; last log line: CUDA …"
    );
    assert!(shown.lines().all(|line| line.width() <= 80));
}

#[test]
fn at_200_columns() {
    let shown = Frame::of(&seen(), &wish(Some(200))).whole();
    assert_eq!(
        shown,
        "\
weir 127.0.0.1:8081  1 DEGRADED  2 ACTIVE  1 INACTIVE  19 queued  8/8 slots busy  6 instances

FUNCTION                                       VERSION   STATE     INSTANCES                        SLOTS  QUEUE  DECISION
broken                                         abcd0002  DEGRADED  1 starting, 1 draining, 1 error    0/0      2  2 wanted for 2m05s, wake: 2 waited and no instance was ready
chat-with-a-name-that-goes-on-and-on-for-long  abcd0001  ACTIVE    2 ready, 1 starting                8/8     17  3 wanted for 2m05s, stable: load 8.2 on average, 2.8 an instance
idle                                           abcd0004  ACTIVE    -                                  0/0      0  0 wanted for 2m05s, idle: no invocation for idleTimeout
off                                            abcd0003  INACTIVE  -                                    -      -  -

Recent errors
FUNCTION  INSTANCE                              STATE  RESTARTS  LAST ERROR
broken    ef010004-0000-0000-0000-000000000000  error         3  exited with status 1; last log line: CUDA out of memory, tried to allocate 2.00 GiB"
    );
}

#[test]
fn what_does_not_fit_scrolls_between_top_and_bottom() {
    let frame = Frame::of(&seen(), &wish(Some(80)));
    assert_eq!(frame.furthest(40), 0);
    let tall = frame.part(40, 0);
    assert_eq!(tall.len(), 40);
    assert_eq!(tall[39], "q quits, arrows scroll");

    // 2 lines above, 4 below, the foot and a blank: 4 are left for the table's 5.
    let starts = |lines: &[String]| -> Vec<String> {
        let word = |line: &String| line.split(' ').next().unwrap_or_default().to_owned();
        lines.iter().map(word).collect()
    };
    let low = frame.part(12, 0);
    assert_eq!(
        starts(&low),
        [
            "weir",
            "",
            "FUNCTION",
            "broken",
            "chat-with…-for-long",
            "…",
            "",
            "Recent",
            "FUNCTION",
            "broken",
            "",
            "q"
        ]
    );
    assert_eq!(low[5], "… 0 lines above, 2 below");
    let end = frame.part(12, frame.furthest(12));
    assert_eq!(starts(&end)[2..6], ["FUNCTION", "idle", "off", "…"]);
    assert_eq!(end[5], "… 2 lines above, 0 below");
    for height in 1..12 {
        assert_eq!(frame.part(height, 3).len(), height, "{height}");
    }
}

#[test]
fn old_answers_are_marked() {
    let mut wish = wish(Some(40));
    wish.trouble = Some("can't connect to the admin address http://x\ntry: again");
    let shown = Frame::of(&seen(), &wish).whole();
    let second = shown.lines().nth(1).unwrap();
    assert_eq!(second, "old: can't connect to the admin address…");
}

#[test]
fn nothing_there_says_how_to_begin() {
    let shown = Frame::of(&Seen::default(), &wish(None)).whole();
    assert_eq!(
        shown,
        "weir 127.0.0.1:8081  0 queued  0/0 slots busy  0 instances\n\n\
         There is no function yet: `weir function create` or `weir apply` makes one."
    );
}
