//! What stands in `monitoring/`: valid, and about metrics that exist.

use crate::fake::Fake;
use crate::page::{Page, collected, recorder, reported};
use crate::prometheus::{file, find, promtool};
use crate::support::skipped;
use millpond::Pool;
use millpond::metrics::Pools;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

#[test]
fn alerts_fire_in_their_fault_and_in_no_other() {
    let tool = match find("promtool") {
        Ok(tool) => tool,
        Err(why) => return skipped("alerts_fire_in_their_fault_and_in_no_other", &why),
    };
    for (what, name) in [("check", "millpond.rules.yml"), ("test", "millpond.rules.test.yml")] {
        let path = file("monitoring").join(name);
        let (well, said) = promtool(&tool, &[what, "rules", path.to_str().unwrap()], "");
        assert!(well, "{said}");
    }
}

#[test]
fn promtool_is_content_with_the_names() {
    let tool = match find("promtool") {
        Ok(tool) => tool,
        Err(why) => return skipped("promtool_is_content_with_the_names", &why),
    };
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let pools = Pools::of(&pool);
    for page in [reported(&pools, &recorder()), in_the_older_format(&collected(&pools))] {
        let (_, said) = promtool(&tool, &["check", "metrics"], &page);
        let complaints: Vec<_> = said.lines().filter(|line| !line.is_empty()).collect();
        // The one thing it does not like is a name of the convention.
        let expected =
            r#"db_client_connection_count non-histogram and non-summary metrics should not have "_count" suffix"#;
        assert_eq!(complaints, [expected], "{said}\n{page}");
    }
}

/// `promtool` reads the older format only, in which a counter is described with its suffix.
fn in_the_older_format(page: &str) -> String {
    let counters: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .map(|name| (format!(" {name} "), format!(" {name}_total ")))
        .collect();
    let line = |line: &str| {
        let described = counters.iter().find(|(name, _)| line.starts_with("# ") && line.contains(name));
        described.map_or(line.to_string(), |(name, with_suffix)| line.replacen(name, with_suffix, 1)) + "\n"
    };
    page.lines().filter(|line| *line != "# EOF").map(line).collect()
}

/// The queries of the dashboard, as Prometheus gets them when this job and pool are chosen.
pub(crate) fn queries(job: &str, pool: &str) -> Vec<String> {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(file("monitoring/dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let expr = |target: &Value| target["expr"].as_str().unwrap().to_string();
    let chosen = |expr: String| expr.replace("$job", job).replace("$pool", pool).replace("$__rate_interval", "10s");
    targets.map(expr).map(chosen).collect()
}

/// The words of a query that are names of metrics.
fn metrics_of(query: &str) -> BTreeSet<&str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_metric = |word: &&str| word.starts_with("db_client_") || word.starts_with("millpond_");
    let is_label = |word: &&str| ["db_client_connection_pool_name", "db_client_connection_state"].contains(word);
    words.filter(is_metric).filter(|word| !is_label(word)).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() {
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let page = Page::parse(&collected(&Pools::of(&pool)));
    let there: BTreeSet<_> = page.samples.iter().map(|(name, ..)| name.as_str()).collect();
    let rules = fs::read_to_string(file("monitoring/millpond.rules.yml")).unwrap();
    let tests = fs::read_to_string(file("monitoring/millpond.rules.test.yml")).unwrap();
    let queries = queries("app", "orders");
    assert!(queries.len() > 20 && metrics_of(&rules).len() >= 5, "{queries:?}");
    for text in queries.iter().chain([&rules, &tests]) {
        for name in metrics_of(text) {
            assert!(there.contains(name), "there is no {name}: {text}");
        }
    }
    // What is counted or measured stands on the dashboard.
    let shown: BTreeSet<_> = queries.iter().flat_map(|query| metrics_of(query)).collect();
    let is_shown = |family: &str| shown.iter().any(|name| name.starts_with(family));
    let missing: Vec<_> = page.families.keys().filter(|family| !is_shown(family)).collect();
    assert_eq!(missing, ["db_client_connection_idle_max"], "as many as there may be of all");
}

#[test]
fn the_dashboard_is_one() {
    let text = fs::read_to_string(file("monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let variables: Vec<_> = dashboard["templating"]["list"].as_array().unwrap().iter().map(|v| &v["name"]).collect();
    assert_eq!(variables, ["datasource", "job", "pool"]);
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    // No panel lies on another.
    let mut taken = BTreeSet::new();
    for panel in panels {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(x < 24 && taken.insert((x, y)), "{}", panel["title"]);
            }
        }
    }
    let Ok(tool) = find("promtool") else { return skipped("the_dashboard_is_one", "there is no `promtool`") };
    // Every query is one: as a rule, for which it has a checker.
    let rule =
        |(i, query): (usize, &String)| format!("  - {{ record: 'q{i}', expr: '{}' }}\n", query.replace('\'', "''"));
    let rules: String = queries("app", "orders").iter().enumerate().map(rule).collect();
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(&path, format!("groups:\n- name: dashboard\n  rules:\n{rules}")).unwrap();
    let (well, said) = promtool(&tool, &["check", "rules", path.path().to_str().unwrap()], "");
    assert!(well, "{said}");
}
