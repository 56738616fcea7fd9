use super::*;

const PACE: Pace = Pace {
    speed: 2.0,
    prefill_ms: 0.25,
    decode_ms: 15.0,
};

fn planned(at_ms: u64, service_us: u64, bytes: u64) -> Planned {
    Planned {
        at: Duration::from_millis(at_ms),
        service: Duration::from_micros(service_us),
        bytes,
    }
}

fn refusal(text: &str) -> String {
    plan(text.as_bytes(), PACE).unwrap_err().to_string()
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:15:46.6805900,400,40\n\
    2023-11-16 18:15:50.6805900,0,10\n\
    2023-11-16 18:15:48.6805900,100,0\n";

#[test]
fn an_azure_trace_becomes_a_plan_at_speed() {
    let (format, plan) = plan(AZURE.as_bytes(), PACE).unwrap();
    assert_eq!(format, Format::Azure);
    assert_eq!(
        plan,
        [
            planned(0, 350_000, 160),
            planned(1000, 12_500, 0),
            planned(2000, 75_000, 40)
        ]
    );
}

#[test]
fn a_mooncake_trace_becomes_a_plan_at_speed() {
    let trace = r#"{"timestamp": 3000, "input_length": 400, "output_length": 40, "hash_ids": [0, 1]}
        {"timestamp": 7000.0, "input_length": 0, "output_length": 10}

        {"output_length": 0, "input_length": 100, "timestamp": 5000, "hash_ids": [], "more": {}}"#;
    let (format, mooncake) = plan(trace.as_bytes(), PACE).unwrap();
    assert_eq!(format, Format::Mooncake);
    assert_eq!(mooncake, plan(AZURE.as_bytes(), PACE).unwrap().1);
}

#[test]
fn other_spellings_of_an_azure_trace_are_the_same() {
    let (_, expected) = plan(AZURE.as_bytes(), PACE).unwrap();
    let columns_swapped = "GeneratedTokens,TIMESTAMP,ContextTokens,Region\n\
        40,2023-11-16 18:15:46.68059,400,x\n\
        10,2023-11-16 18:15:50.68059,0,x\n\
        0,2023-11-16 18:15:48.68059,100,x\n";
    for other in [
        AZURE.replace('\n', "\r\n"),
        format!("\u{feff}{AZURE}"),
        format!("\n\n{}\n\n", AZURE.trim_end()),
        AZURE.replace("5900,", "5900+00:00,"),
        AZURE.replace(',', ", "),
        AZURE.replace("TIMESTAMP", "\"TIMESTAMP\""),
        columns_swapped.to_owned(),
    ] {
        assert_eq!(plan(other.as_bytes(), PACE).unwrap().1, expected, "{other}");
    }
}

#[test]
fn what_is_neither_format_is_refused_by_what_it_begins_with() {
    let error = refusal("\nA,B\n1,2\n");
    assert!(
        error.starts_with("line 2 begins neither an Azure"),
        "{error}"
    );
    assert!(error.contains("TIMESTAMP,ContextTokens,GeneratedTokens"));
    assert!(error.contains("timestamp, input_length and output_length"));
    assert!(error.ends_with(r#": "A,B""#), "{error}");
    assert!(refusal("TIMESTAMP,ContextTokens\n").starts_with("line 1 begins neither"));
    assert!(refusal("[1, 2]").starts_with("line 1 begins neither"));
    assert_eq!(refusal(" \n"), "the file is empty");
    let error = plan(b"ok\n\xff\xfe", PACE).unwrap_err().to_string();
    assert_eq!(error, "line 2 is not UTF-8: this is no trace");
}

#[test]
fn a_header_alone_is_no_trace() {
    assert_eq!(
        refusal("TIMESTAMP,ContextTokens,GeneratedTokens\n"),
        "the trace has no requests"
    );
}

#[test]
fn a_bad_line_of_an_azure_trace_is_named() {
    let with = |line: &str| format!("{AZURE}{line}\n2023-11-16 18:15:51,1,1\n");
    for ends in ["\n", "\r\n"] {
        let refused = |line: &str| refusal(&with(line).replace('\n', ends));
        assert_eq!(
            refused("2023-11-16 18:15:51,many,1"),
            "line 5: ContextTokens: invalid digit found in string"
        );
        assert_eq!(
            refused("2023-11-16 18:15:51,1,-1"),
            "line 5: GeneratedTokens: invalid digit found in string"
        );
        assert_eq!(refused("noon,1,1"), r#"line 5: TIMESTAMP "noon""#);
        assert_eq!(
            refused("\n\n2023-11-16 18:15:51,1"),
            "line 7: 2 fields, where the header has 3"
        );
        assert!(refused("{\"timestamp\": 0}").starts_with("line 5: 1 fields"));
    }
}

#[test]
fn a_bad_line_of_a_mooncake_trace_is_named() {
    let good = r#"{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}"#;
    let refused = |line: &str| refusal(&format!("{good}\n\n{line}\n{good}\n"));
    assert_eq!(
        refused(r#"{"timestamp": 0, "input_length": 1}"#),
        "line 3, column 35: missing field `output_length`"
    );
    assert!(refused(r#"{"timestamp": "0"}"#).contains("line 3, column 17: invalid type: string"));
    assert!(refused(&good[..30]).starts_with("line 3, column 30: EOF"));
    assert!(refused("2023-11-16 18:15:51,1,1").starts_with("line 3, column "));
}
