//! A page of metrics, taken apart; and the two ways to make one.

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use millpond::metrics::{BUCKETS, Pools};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;

/// What the collector shows, in the format of OpenMetrics.
pub(crate) fn collected(pools: &Pools) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(pools.clone()));
    let mut page = String::new();
    encode(&mut page, &registry).unwrap();
    page
}

/// A recorder of the facade, as the documentation tells to build it.
pub(crate) fn recorder() -> PrometheusRecorder {
    PrometheusBuilder::new().with_recommended_naming(true).set_buckets(&BUCKETS).unwrap().build_recorder()
}

/// What this recorder shows after a report, in Prometheus' own format.
pub(crate) fn reported(pools: &Pools, recorder: &PrometheusRecorder) -> String {
    metrics::with_local_recorder(recorder, || pools.report());
    recorder.handle().render()
}

pub(crate) type Labels = BTreeMap<String, String>;

#[derive(Debug, Default)]
pub(crate) struct Page {
    /// By name: kind, unit, help.
    pub(crate) families: BTreeMap<String, [String; 3]>,
    pub(crate) samples: Vec<(String, Labels, f64)>,
}

impl Page {
    /// # Panics
    ///
    /// If a family stands there twice, or a line is none.
    #[track_caller]
    pub(crate) fn parse(text: &str) -> Page {
        let mut page = Page::default();
        for line in text.lines().filter(|line| !line.is_empty() && *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# ") {
                let [what, name, rest] = rest.splitn(3, ' ').collect::<Vec<_>>().try_into().expect(line);
                let place = ["TYPE", "UNIT", "HELP"].iter().position(|w| *w == what).expect(line);
                let field = &mut page.families.entry(name.to_string()).or_default()[place];
                assert!(field.is_empty(), "a second time: {line}");
                *field = rest.to_string();
            } else {
                let (series, value) = line.rsplit_once(' ').expect(line);
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let labels = labels.strip_suffix('}').expect(line).split("\",").filter(|label| !label.is_empty());
                let labels = labels.map(|label| label.split_once("=\"").expect(line));
                let labels = labels.map(|(key, value)| (key.to_string(), value.trim_end_matches('"').to_string()));
                page.samples.push((name.to_string(), labels.collect(), value.parse().expect(line)));
            }
        }
        page
    }

    /// The values of this name in points that have all these labels.
    pub(crate) fn values(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let has = |all: &Labels| labels.iter().all(|(k, v)| all.get(*k).is_some_and(|value| value == v));
        self.samples.iter().filter(|(n, all, _)| n == name && has(all)).map(|&(_, _, value)| value).collect()
    }

    /// The only one of them.
    #[track_caller]
    pub(crate) fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let values = self.values(name, labels);
        assert_eq!(values.len(), 1, "{name} {labels:?}: {values:?}");
        values[0]
    }
}
