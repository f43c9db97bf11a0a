"""The dashboard and the alert rules ask for metrics and labels that exist, and the alerts fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.serving.metrics import FAMILIES, PREFIX

FOLDER = Path(__file__).parents[2] / "k8s" / "dashboards"
DASHBOARD = json.loads((FOLDER / "heliostat-serving.json").read_text(encoding="utf-8"))
# A PrometheusRule; Prometheus' own rule files are what is below its `spec`.
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["spec"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
# Grafana's variables, by what they may stand for.
VARIABLES = {"$__rate_interval": "5m", "$model": "cron|sql", "$version": ".*"}


def targets() -> Iterator[tuple[str, str, str]]:
    """(panel, expression, legend) of everything the dashboard draws."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of the dashboard and the rules, variables filled in."""
    found = [(title, expression) for title, expression, _ in targets()]
    found += [(name, rule["expr"]) for name, rule in ALERTS.items()]
    for name, value in VARIABLES.items():
        found = [(where, expression.replace(name, value)) for where, expression in found]
    return found


def labels_of(sample: str) -> set[str]:
    """The labels of a sample, as the table has it.

    `_sum` of a histogram is not among the samples: Ray only estimates it.
    """
    name = sample.removeprefix(PREFIX)
    assert name != sample
    if name in FAMILIES and FAMILIES[name].kind != "histogram":
        return set(FAMILIES[name].labels)
    family, suffix = re.fullmatch(r"(\w+)_(bucket|count)", name).groups()  # type: ignore[union-attr]
    assert FAMILIES[family].kind == "histogram"
    return set(FAMILIES[family].labels) | ({"le"} if suffix == "bucket" else set())


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_queries_parse_and_ask_for_labels_that_exist(where: str, expression: str) -> None:
    promql = pytest.importorskip("promql_parser")

    def selectors(inside: Any) -> list[Any]:
        found: list[Any] = []
        promql.walk(inside, lambda node: found.append(node) if isinstance(node, promql.VectorSelector) else None)
        return found

    def check_grouping(node: Any) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            assert all(set(node.modifier.labels) <= labels_of(inner.name) for inner in selectors(node.expr))
        if isinstance(node, promql.BinaryExpr) and node.modifier and node.modifier.matching:
            assert all(set(node.modifier.matching.labels) <= labels_of(inner.name) for inner in selectors(node))

    parsed = promql.parse(expression)
    assert selectors(parsed)
    for selector in selectors(parsed):
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels_of(selector.name)
    promql.walk(parsed, check_grouping)


def test_every_metric_is_looked_at() -> None:
    asked = set(re.findall(rf"{PREFIX}\w+", " ".join(expression for _, expression in expressions())))
    seen = {name for name in FAMILIES for end in ("", "_bucket", "_count") if f"{PREFIX}{name}{end}" in asked}
    assert set(FAMILIES) - seen == set()


@pytest.mark.parametrize(("panel", "expression", "legend"), targets())
def test_legends_show_labels_that_are_left(panel: str, expression: str, legend: str) -> None:
    shown = set(re.findall(r"{{(\w+)}}", legend))
    grouped = [{label.strip() for label in labels.split(",")} for labels in re.findall(r"by \(([^)]*)\)", expression)]
    assert all(shown <= labels for labels in grouped)
    assert not shown or grouped


def test_the_dashboard_is_whole() -> None:
    # Grafana 11's schema: https://grafana.com/docs/grafana/v11.0/dashboards/build-dashboards/view-dashboard-json-model/
    assert DASHBOARD["schemaVersion"] == 39
    assert DASHBOARD["uid"] == "heliostat-serving"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "model", "version"}
    assert variables["datasource"]["type"] == "datasource"
    for variable in (variables["model"], variables["version"]):
        metric, label = re.fullmatch(r"label_values\((\w+)(?:{.*})?, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert label in labels_of(metric)
    for panel in PANELS:
        assert panel["description"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    used = set(re.findall(r"\$(\w+)", " ".join(expression for _, expression, _ in targets())))
    assert used == {"model", "version", "__rate_interval"}


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_tell_people_what_to_do() -> None:
    for name, rule in ALERTS.items():
        assert name.startswith("Heliostat")
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


VERSION = '{model_name="cron",version="3"}'
REQUESTS = 'heliostat_requests_total{model_name="cron",endpoint="chat"}'
# The endpoint is there, so that only what is meant is missing.
ALIVE = {'heliostat_model_version{model_name="cron",version="3",state="ready"}': "1x60"}
REPLICA = {f"heliostat_num_requests_running{VERSION}": "0x60"}
FIRST_TOKEN = "heliostat_time_to_first_token_seconds_bucket"


def first_tokens(slow: str) -> dict[str, str]:
    """100 requests a minute, `slow` of them after more than 5 s."""
    labels = 'model_name="cron",version="3",le='
    return {
        f'{FIRST_TOKEN}{{{labels}"5.0"}}': f"0+{100 - int(slow)}x60",
        f'{FIRST_TOKEN}{{{labels}"10.0"}}': "0+100x60",
        f'{FIRST_TOKEN}{{{labels}"+Inf"}}': "0+100x60",
    }


# Series by the minute (promtool's notation: start+step x times) and the alerts that fire after half an hour.
SCENARIOS: dict[str, tuple[dict[str, str], set[str]]] = {
    "all is well": ({REQUESTS: "0+100x60", f"heliostat_requests_failed_total{VERSION}": "0+1x60"}, set()),
    "requests fail": (
        {REQUESTS: "0+100x60", f"heliostat_requests_failed_total{VERSION}": "0+10x60"},
        {"HeliostatRequestsFail"},
    ),
    "first tokens are fast": (first_tokens("4"), set()),
    "first tokens are slow": (first_tokens("20"), {"HeliostatFirstTokenSlow"}),
    "a key is over its limit": (
        {REQUESTS: "0+100x60", 'heliostat_requests_rejected_total{model_name="cron",reason="rate_limit"}': "0+50x60"},
        set(),
    ),
    "queues are full": (
        {REQUESTS: "0+100x60", 'heliostat_requests_rejected_total{model_name="cron",reason="overloaded"}': "0+10x60"},
        {"HeliostatOverloaded"},
    ),
    "the cache is full": ({f"heliostat_kv_cache_usage_perc{VERSION}": "0.99x60"}, {"HeliostatCacheFull"}),
    "an engine's first restart": (
        {f"heliostat_engine_restarts_total{VERSION}": "_x24 1x36"},
        {"HeliostatEngineRestarts"},
    ),
    "an engine's second restart": (
        {f"heliostat_engine_restarts_total{VERSION}": "1x24 2x36"},
        {"HeliostatEngineRestarts"},
    ),
    "a restart long ago": ({f"heliostat_engine_restarts_total{VERSION}": "_x5 1x55"}, set()),
    "a version is rejected": (
        {'heliostat_model_version{model_name="cron",version="4",state="rejected"}': "1x60"},
        {"HeliostatVersionRejected"},
    ),
    "nodes do not answer": ({'heliostat_metrics_nodes{state="missing"}': "2x60"}, {"HeliostatNodesMissing"}),
}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian's package `prometheus`)")
    return found


def rule_file(folder: Path) -> Path:
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump(RULES))
    return file


def test_prometheus_takes_the_rules(promtool: str, tmp_path: Path) -> None:
    done = subprocess.run([promtool, "check", "rules", str(rule_file(tmp_path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_prometheus_takes_the_documented_scrape_configs(promtool: str, tmp_path: Path) -> None:
    text = (FOLDER.parents[1] / "docs" / "observability.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        file = tmp_path / "prometheus.yml"
        file.write_text(block)
        command = [promtool, "check", "config", "--syntax-only", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout


def fires(promtool: str, folder: Path, series: dict[str, str], expected: set[str]) -> None:
    """Let Prometheus evaluate all rules on the series: exactly the expected alerts fire."""
    queries = [
        {
            "expr": f'count(ALERTS{{alertstate="firing",alertname="{name}"}}) or vector(0)',
            "eval_time": "30m",
            "exp_samples": [{"labels": "{}", "value": 1 if name in expected else 0}],
        }
        for name in ALERTS
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    case = {
        "rule_files": [str(rule_file(folder))],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": queries}],
    }
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(case))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_alerts_fire_when_they_should(promtool: str, tmp_path: Path, scenario: str) -> None:
    series, expected = SCENARIOS[scenario]
    fires(promtool, tmp_path, ALIVE | REPLICA | series, expected)


def test_a_version_without_replicas_is_told_only_if_someone_asks(promtool: str, tmp_path: Path) -> None:
    fires(promtool, tmp_path, ALIVE | {REQUESTS: "5x60"}, set())
    fires(promtool, tmp_path, ALIVE | {REQUESTS: "0+5x60"}, {"HeliostatNoReplica"})


def test_an_endpoint_without_metrics_is_told(promtool: str, tmp_path: Path) -> None:
    fires(promtool, tmp_path, {REQUESTS: "0+5x10"}, {"HeliostatMetricsMissing"})


def test_every_alert_is_tried(promtool: str) -> None:
    tried = {name for _, expected in SCENARIOS.values() for name in expected}
    assert set(ALERTS) - tried == {"HeliostatNoReplica", "HeliostatMetricsMissing"}
