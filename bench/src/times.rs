//! A table of times that were measured again and again.

use std::time::Duration;

use comfy_table::Table;
use hdrhistogram::Histogram;

/// One row of median, 90th percentile and maximum for each name.
pub(crate) fn table<N: AsRef<str>>(rows: &[(N, Vec<Duration>)]) -> anyhow::Result<String> {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["milliseconds", "median", "p90", "max"]);
    for (name, times) in rows {
        let mut histogram = Histogram::<u64>::new(4)?;
        for time in times {
            histogram.record(time.as_micros() as u64)?;
        }
        let ms = |micros: u64| format!("{:.2}", micros as f64 / 1e3);
        table.add_row([
            name.as_ref().to_owned(),
            ms(histogram.value_at_quantile(0.5)),
            ms(histogram.value_at_quantile(0.9)),
            ms(histogram.max()),
        ]);
    }
    Ok(table.trim_fmt())
}
