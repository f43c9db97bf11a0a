"""The journal reaches MLflow whole and once: after a killed driver, a repeated step, a server that is away."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow.entities import Run, ViewType

from heliostat import journal as journal_file
from heliostat.errors import RegistryError
from heliostat.journal import NAME as JOURNAL
from heliostat.registry import figures, store, tracking, versions
from heliostat.registry.tracking import PROGRESS, Tracker
from tests.mlflow_server import Server

pytestmark = pytest.mark.usefixtures("module_store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_INTERVAL", 0.1)
    monkeypatch.setattr(tracking, "_MAX_DELAY", 0.5)


def append(folder: Path, steps: range, **metrics: float) -> None:
    """Rows whose values follow from the step, so that every one of them can be checked."""
    folder.mkdir(exist_ok=True)
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        for step in steps:
            row = {"step": step, "time": time.time(), "metrics": {"loss": 1 / (step + 1), **metrics}}
            journal.write(json.dumps(row) + "\n")


def tracker(folder: Path, notices: list[str] | None = None, **params: Any) -> Tracker:
    said = notices if notices is not None else []
    return Tracker(folder, "cron", "cron-1", params, {"git_commit": "abc"}, notice=said.append)


def history(run_id: str, metric: str = "loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in store.client().get_metric_history(run_id, metric))


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / (step + 1)) for step in steps]


def get_run(run_id: str | None) -> Run:
    assert run_id is not None
    return store.client().get_run(run_id)


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_the_journal_is_shipped_with_params_tags_and_status(tmp_path: Path) -> None:
    append(tmp_path, range(1, 1501), grad_norm=2.5, learning_rate=1e-4)  # more than one request may hold
    config: dict[str, Any] = {
        "training": {"learning_rate": 1e-4, "bf16": False},
        "note": "x" * 9000,
        "data": {"columns": {}},
    }
    running = tracker(tmp_path, **config, many={f"p{index}": index for index in range(150)})
    running.start()
    run = get_run(running.finish("FAILED"))
    assert history(run.info.run_id) == expected(range(1, 1501))
    assert len(history(run.info.run_id, "grad_norm")) == 1500
    assert run.info.status == "FAILED"
    assert run.info.run_name == "cron-1"
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.params["training.learning_rate"] == "0.0001"
    assert run.data.params["training.bf16"] == "false"
    assert len(run.data.params["note"]) == 6000
    assert run.data.params["many.p149"] == "149"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(os.environ["HELIOSTAT_HOME"])


def test_metrics_appear_while_training_goes_on(tmp_path: Path) -> None:
    running = tracker(tmp_path)
    running.start()
    append(tmp_path, range(1, 4))
    progress = tmp_path / PROGRESS
    wait_for(lambda: progress.exists() and json.loads(progress.read_text())["steps"] == {"loss": 3})
    run_id = json.loads(progress.read_text())["run_id"]
    assert history(run_id) == expected(range(1, 4))
    assert get_run(run_id).info.status == "RUNNING"
    assert running.finish() == run_id


def test_a_killed_driver_goes_on_in_the_same_run_and_repeats_nothing(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path; import time
from heliostat.registry import tracking
tracking._INTERVAL = 0.1
tracking.Tracker(Path({str(tmp_path)!r}), "cron", "cron-1", {{"workers": 2}}, {{}}).start()
time.sleep(600)
"""
    append(tmp_path, range(1, 6))
    driver = subprocess.Popen([sys.executable, "-c", script])
    progress = tmp_path / PROGRESS
    try:
        wait_for(lambda: progress.exists() and json.loads(progress.read_text())["steps"] == {"loss": 5})
    finally:
        driver.kill()
        driver.wait()
    run_id = json.loads(progress.read_text())["run_id"]
    append(tmp_path, range(3, 9))  # training resumes from the checkpoint of step 2
    resumed = tracker(tmp_path, workers=1)
    resumed.start()
    assert resumed.finish() == run_id
    assert history(run_id) == expected(range(1, 9))
    assert get_run(run_id).info.status == "FINISHED"
    assert get_run(run_id).data.params == {"workers": "2"}


def test_a_run_whose_creation_was_not_noted_is_found_again(tmp_path: Path) -> None:
    append(tmp_path, range(1, 3))
    first = tracker(tmp_path)
    first.start()
    run_id = first.finish()
    progress = json.loads((tmp_path / PROGRESS).read_text())
    (tmp_path / PROGRESS).write_text(json.dumps({"key": progress["key"]}))
    second = tracker(tmp_path)
    second.start()
    assert second.finish() == run_id
    assert history(str(run_id)) == expected(range(1, 3))


def test_a_run_deleted_on_the_server_is_made_anew_from_the_whole_journal(tmp_path: Path) -> None:
    append(tmp_path, range(1, 4))
    first = tracker(tmp_path)
    first.start()
    run_id = first.finish()
    store.client().delete_run(run_id)
    second = tracker(tmp_path)
    second.start()
    new_id = second.finish()
    assert new_id not in (None, run_id)
    assert history(str(new_id)) == expected(range(1, 4))


def test_a_half_written_line_is_left_for_later_and_a_damaged_one_passed_over(tmp_path: Path) -> None:
    append(tmp_path, range(1, 2))
    journal = tmp_path / JOURNAL
    complete = journal.stat().st_size
    with journal.open("a") as file:
        file.write('{"step": 2, "time": 1')
    assert journal_file.read(journal)[1] == complete
    with journal.open("a") as file:
        file.write('.0, "metrics": {"loss": 0.5}}\nno row\n{"step": 3}\n')
    append(tmp_path, range(4, 5))
    rows, offset = journal_file.read(journal, complete)
    assert [row["step"] for row in rows] == [2, 4]
    assert offset == journal.stat().st_size
    assert journal_file.read(journal, offset + 1)[0][0]["step"] == 1, "a shorter journal is read from its start"


def test_reading_in_parts_gives_the_whole_journal(tmp_path: Path) -> None:
    append(tmp_path, range(10))
    offset, steps = 0, []
    while True:
        rows, after = journal_file.read(tmp_path / JOURNAL, offset, limit=3)
        if after == offset:
            break
        assert len(rows) <= 3
        steps += [row["step"] for row in rows]
        offset = after
    assert steps == list(range(10))


def test_numbers_that_mlflow_cannot_hold_are_not_shipped(tmp_path: Path) -> None:
    append(tmp_path, range(1, 2), nan=float("nan"), inf=float("inf"), **{"accuracy@1": 0.5})
    running = tracker(tmp_path)
    running.start()
    run = get_run(running.finish())
    assert set(run.data.metrics) == {"loss", "accuracy_1"}


def test_artifacts_and_datasets_of_a_run(tmp_path: Path) -> None:
    client = store.client()
    run_id = client.create_run(store.experiment_id("artifacts")).info.run_id
    audit = tmp_path / "a.json"
    audit.write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("b")
    rows = [{"step": step, "metrics": {"loss": 1 / step, "eval_loss": 2 / step}} for step in range(1, 30)]
    tracking.log_figure(run_id, "figures/loss", figures.loss_curves(rows, "run"))
    tracking.log_text(run_id, "config.yaml", "name: x")
    tracking.log_artifacts_of_run(run_id, {"reports/audit.json": audit, "data": tmp_path / "folder"})
    files = [{"path": "data/train.jsonl", "sha256": "0" * 64, "bytes": 10}]
    manifest = {
        "files": {"train": files, "validation": files},
        "data_sha256": "0123456789abcdef",
        "splits": {"train": {"documents": 90}, "validation": {"documents": 10}},
    }
    tracking.log_dataset(run_id, manifest)

    top = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert top == {"figures", "config.yaml", "reports", "data"}
    assert [found.path for found in client.list_artifacts(run_id, "reports")] == ["reports/audit.json"]
    assert [found.path for found in client.list_artifacts(run_id, "data")] == ["data/b.txt"]
    inputs = {given.dataset.name: given for given in client.get_run(run_id).inputs.dataset_inputs}
    assert {name: given.dataset.digest for name, given in inputs.items()} == {
        "train": "01234567",
        "validation": "01234567",
    }
    assert json.loads(inputs["train"].dataset.source)["files"] == files
    assert json.loads(inputs["validation"].dataset.profile)["documents"] == 10
    assert [tag.value for tag in inputs["train"].tags] == ["train"]


def test_artifact_of_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    run_id = store.client().create_run(store.experiment_id("artifacts")).info.run_id
    with pytest.raises(RegistryError, match=r"nothing.json cannot be logged as x.json"):
        tracking.log_artifacts_of_run(run_id, {"x.json": tmp_path / "nothing.json"})


def test_loss_curves_survive_any_rows() -> None:
    row = {"step": 1, "metrics": {"loss": 2.0}}
    for rows in ([], [row], [row, {"step": 2, "metrics": {"eval_loss": 1.0}}]):
        figure = figures.loss_curves(rows)
        assert isinstance(figure, Figure)
        figure.canvas.draw()


def test_series_keeps_the_last_value_of_a_repeated_step() -> None:
    rows = [{"step": step, "metrics": {"loss": value}} for step, value in ((1, 5.0), (2, 4.0), (2, 3.0), (3, 2.0))]
    assert figures.series(rows, "loss") == ([1, 2, 3], [5.0, 3.0, 2.0])


def test_a_deleted_experiment_is_named(tmp_path: Path) -> None:
    client = store.client()
    client.delete_experiment(store.experiment_id("gone"))
    with pytest.raises(RegistryError, match="experiment `gone` was deleted; restore it"):
        store.experiment_id("gone")


def test_credentials_are_not_shown() -> None:
    assert store.shown("at https://me:s3cret@host:5000/x failed") == "at https://host:5000/x failed"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def on_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return server


def test_a_server_that_comes_late_and_dies_in_the_middle_loses_nothing(tmp_path: Path, on_server: Server) -> None:
    on_server.kill()
    notices: list[str] = []
    unlucky = tracker(tmp_path, notices)
    append(tmp_path, range(1, 4))
    unlucky.start()
    assert unlucky.finish("FAILED", patience=2) is None
    assert "cannot be reached" in notices[0]
    assert str(tmp_path / JOURNAL) in notices[-1]

    running = tracker(tmp_path, notices)
    running.start()
    on_server.start()  # late
    progress = tmp_path / PROGRESS
    wait_for(lambda: json.loads(progress.read_text())["steps"] == {"loss": 3})
    on_server.kill()
    append(tmp_path, range(4, 2001))
    wait_for(lambda: sum("cannot be reached" in text for text in notices) > 1)
    on_server.start()
    run_id = running.finish(patience=120)
    assert run_id is not None
    assert history(run_id) == expected(range(1, 2001))
    assert get_run(run_id).info.status == "FINISHED"
    runs = store.client().search_runs([store.experiment_id("cron")], run_view_type=ViewType.ALL)
    assert [run.info.run_id for run in runs] == [run_id]


def test_a_version_on_a_server_is_downloaded_once(tmp_path: Path, on_server: Server) -> None:
    if on_server.process is None:
        on_server.start()
    on_server.wait()
    bundle = tmp_path / "bundle"
    (bundle / "sub").mkdir(parents=True)
    (bundle / "weights").write_bytes(bytes(range(256)) * 1000)
    (bundle / "sub" / "x").write_text("x")
    run_id = store.client().create_run(store.experiment_id("served")).info.run_id
    version = versions.register(run_id, bundle, "served", {})
    folder = Path(versions.resolve("models:/served@challenger").path)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {"weights", "sub", "sub/x"}
    assert (folder / "weights").read_bytes() == (bundle / "weights").read_bytes()
    assert folder.parent == Path(os.environ["HELIOSTAT_HOME"]) / "downloads" / "served"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half-written is left"
    before = (folder / "weights").stat().st_mtime_ns
    assert versions.resolve(version.uri).path == str(folder)
    assert (folder / "weights").stat().st_mtime_ns == before


def test_an_unreachable_server_is_named_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=f"server at http://127.0.0.1:{port} cannot be reached") as raised:
        versions.resolve("models:/any@champion")
    assert "s3cret" not in str(raised.value)
