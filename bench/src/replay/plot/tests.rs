use std::time::Duration;

use roxmltree::{Document, Node};

use super::super::Outcome;
use super::super::summary::tests::{count, summary};
use super::super::watch::{Depth, Watched};
use super::*;

fn outcome(due: u64, answer: &str, wait: u64) -> Outcome {
    Outcome {
        due: Duration::from_secs(due),
        answer: Ok(answer.into()),
        wait: Duration::from_millis(wait),
    }
}

/// Ten seconds of two instances at most.
fn seen() -> Watched {
    Watched {
        counts: vec![
            count(0.0, 0, 0, 0),
            count(1.0, 1, 0, 0),
            count(2.0, 1, 1, 0),
            count(8.0, 0, 1, 1),
            count(10.0, 0, 0, 0),
        ],
        queue: vec![
            Depth { at: 0.0, depth: 0 },
            Depth { at: 1.0, depth: 40 },
            Depth { at: 2.0, depth: 0 },
        ],
        ..Watched::default()
    }
}

fn group<'a>(document: &'a Document, name: &str) -> Node<'a, 'a> {
    let groups = document.descendants().filter(|n| n.has_tag_name("g"));
    let mut named = groups.filter(|n| n.attribute("id") == Some(name));
    named.next().unwrap_or_else(|| panic!("no group {name}"))
}

fn texts(node: Node) -> Vec<String> {
    let texts = node.descendants().filter(|n| n.has_tag_name("text"));
    texts.filter_map(|n| Some(n.text()?.to_owned())).collect()
}

/// The outline in this colour.
fn outline<'a>(node: Node<'a, 'a>, attribute: &str, colour: &str) -> Option<&'a str> {
    let mut paths = node.descendants().filter(|n| n.has_tag_name("path"));
    paths
        .find(|n| n.attribute(attribute) == Some(colour))?
        .attribute("d")
}

#[test]
fn it_is_xml_on_a_ground_of_its_own_with_titles_axes_and_legends() {
    let outcomes = [outcome(0, "200", 5), outcome(4, "200", 1500)];
    let svg = draw(&summary("a&b<c>.csv", &outcomes, seen()));
    let document = Document::parse(&svg).unwrap();
    let root = document.root_element();
    assert_eq!(
        root.tag_name().namespace(),
        Some("http://www.w3.org/2000/svg")
    );
    assert_eq!(root.attribute("viewBox"), Some("0 0 1000 900"));
    let ground = root.children().find(|n| n.has_tag_name("rect")).unwrap();
    assert_eq!(ground.attribute("fill"), Some("#ffffff"));
    assert_eq!(ground.attribute("width"), Some("1000.00"));

    let all = texts(root);
    let has = |text: &str| assert!(all.iter().any(|t| t.contains(text)), "{text}: {all:?}");
    has("Replay of a&b<c>.csv at 20 times its speed");
    has(
        "2 requests, 0 failed; 17.0 instance-seconds, 1.70 times the least where nothing waits (10.0)",
    );
    has("0 to 2 instances of 4 slots; start delay 10 s of the trace");
    has("seconds after the first request (one is 20 s of the trace)");
    for (name, head, keys) in [
        ("arrivals", "Arrivals (requests/s)", &["answered 200"][..]),
        (
            "instances",
            "Instances (number)",
            &["ready", "starting", "draining", "at most"],
        ),
        ("queue", "Queue depth (requests)", &["waiting"]),
        (
            "waits",
            "Wait, by the time of arrival (logarithmic, from 1 ms)",
            &["p99", "p50"],
        ),
    ] {
        let texts = texts(group(&document, name));
        assert_eq!(texts[0], head);
        for key in keys {
            assert!(texts.iter().any(|text| text == key), "{key}: {texts:?}");
        }
    }
    let waits = texts(group(&document, "waits"));
    assert_eq!(&waits[1..6], ["1 ms", "10 ms", "100 ms", "1 s", "10 s"]);
}

#[test]
fn what_was_seen_is_where_it_belongs() {
    let outcomes = [outcome(0, "200", 1), outcome(4, "200", 1000)];
    let svg = draw(&summary("t", &outcomes, seen()));
    let document = Document::parse(&svg).unwrap();
    // Ten seconds are 906 wide from 70; two instances are 146 high.
    let instances = group(&document, "instances");
    let ready = outline(instances, "fill", GREEN).unwrap();
    assert_eq!(ready, "M251.20 454.00 V381.00 H976.00 V454.00 Z");
    let starting = outline(instances, "fill", ORANGE).unwrap();
    assert_eq!(
        starting,
        "M160.60 454.00 V381.00 H251.20 V454.00 Z M251.20 381.00 V308.00 H794.80 V381.00 Z"
    );
    let draining = outline(instances, "fill", GREY).unwrap();
    assert_eq!(draining, "M794.80 381.00 V308.00 H976.00 V381.00 Z");
    let waiting = outline(group(&document, "queue"), "fill", BLUE).unwrap();
    assert_eq!(waiting, "M160.60 644.00 V498.00 H251.20 V644.00 Z");
    // Up to 10 s, 1 ms is at the bottom and 1 s at three quarters; none between.
    let p50 = outline(group(&document, "waits"), "stroke", BLUE).unwrap();
    let starts: Vec<&str> = p50.split('M').skip(1).collect();
    assert_eq!(starts.len(), 2, "{p50}");
    assert!(starts[0].starts_with("70.00 834.00 H"), "{p50}");
    assert!(starts[1].starts_with("432.40 724.49 H"), "{p50}");
}

#[test]
fn failures_and_errors_show_where_there_are_any() {
    let mut seen = seen();
    seen.counts[2].error = 1;
    let outcomes = [outcome(0, "503 no-capacity", 5), outcome(4, "200", 5)];
    let svg = draw(&summary("t", &outcomes, seen));
    let document = Document::parse(&svg).unwrap();
    let arrivals = group(&document, "arrivals");
    assert!(outline(arrivals, "fill", RED).is_some());
    assert!(texts(arrivals).iter().any(|text| text == "failed"));
    let instances = group(&document, "instances");
    assert!(outline(instances, "stroke", RED).is_some());
    assert!(texts(instances).iter().any(|text| text == "in error"));
}

#[test]
fn nothing_seen_and_nothing_answered_is_still_a_plot() {
    let outcomes = [Outcome {
        due: Duration::ZERO,
        answer: Err("connection refused".into()),
        wait: Duration::ZERO,
    }];
    let svg = draw(&summary("t", &outcomes, Watched::default()));
    let document = Document::parse(&svg).unwrap();
    let all = texts(document.root_element()).join("\n");
    assert!(all.contains("1 requests, 1 failed; 0.0 instance-seconds, no instance was seen"));
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}
