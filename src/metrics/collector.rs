//! The feature `prometheus-client`: [`Pools`] as a [`Collector`].

use super::Pools;
use super::family::{FAMILIES, Family, Kind, POOL, Point, Value};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use std::fmt::{self, Write as _};

impl Collector for Pools {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let pools = self.present();
        if pools.is_empty() {
            return Ok(());
        }
        for family in FAMILIES {
            let name = family.name.replace('.', "_");
            // (Only a unit of measurement is part of a name. What is counted is not.)
            let unit = family.is_in_seconds().then_some(Unit::Seconds);
            let mut metric = encoder.encode_descriptor(&name, family.help, unit.as_ref(), kind(family))?;
            for (pool, stats) in &pools {
                for point in (family.points)(stats) {
                    let labels = Labels { pool, of: point.label.as_ref().map(|(key, value)| (*key, &**value)) };
                    encode(&point, metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn kind(family: &Family) -> MetricType {
    match family.kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
        Kind::Histogram => MetricType::Histogram,
    }
}

fn encode(point: &Point, mut encoder: MetricEncoder<'_>) -> fmt::Result {
    match &point.value {
        Value::Count(n) => encoder.encode_counter::<NoLabelSet, _, u64>(n, None),
        Value::Level(level) => encoder.encode_gauge(level),
        Value::Times(times) => {
            let bounds = super::BUCKETS.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(times.by_bucket()).collect();
            encoder.encode_histogram::<NoLabelSet>(times.recorded.sum().as_secs_f64(), times.count(), &buckets, None)
        }
    }
}

#[derive(Debug)]
struct Labels<'a> {
    pool: &'a str,
    of: Option<(&'static str, &'a str)>,
}

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        for (key, value) in [Some((POOL, self.pool)), self.of].into_iter().flatten() {
            let mut label = encoder.encode_label();
            let mut name = label.encode_label_key()?;
            name.write_str(&key.replace('.', "_"))?;
            let mut text = name.encode_label_value()?;
            // (It escapes what has to be.)
            prometheus_client::encoding::EncodeLabelValue::encode(&value, &mut text)?;
            text.finish()?;
        }
        Ok(())
    }
}
