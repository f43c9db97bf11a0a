"""Runs in MLflow: a journal of metrics on disk, shipped in the background. Knows nothing of how training works.

Training appends one JSON line per step to `metrics.jsonl` in the run folder and never waits for MLflow. A `Tracker` in
the driver tails that journal. What is shipped is remembered in `tracking.json` beside it, so a server that is away, or
a driver that is killed, costs no metric and repeats none.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils import validation as limits
from mlflow.utils.time import get_current_time_millis

from heliostat import journal
from heliostat.config import Notice
from heliostat.errors import HeliostatError
from heliostat.registry import store

PROGRESS = "tracking.json"
Status = Literal["FINISHED", "FAILED", "KILLED"]

_KEY_TAG = "heliostat.run_key"
_INTERVAL = 2.0  # seconds between two looks at the journal
_MAX_DELAY = 30.0  # seconds between two tries of a server that is away
_ROWS = 500  # rows that are shipped before tracking.json is written


@dataclass
class _Progress:
    """What tracking.json holds."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the MLflow run, by which it is found again when the answer to its creation was lost."""
    run_id: str | None = None
    params_logged: bool = False
    offset: int = 0
    """Bytes of the journal that are shipped."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last shipped step of each metric."""


class Tracker:
    """One MLflow run that follows the journal of a run folder. Never raises into training and never blocks it."""

    def __init__(
        self,
        run_folder: Path,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        notice: Notice = lambda text: print(text, file=sys.stderr),
    ) -> None:
        """Params may be nested. `notice` is called from the tracker's thread."""
        self._journal = run_folder / journal.NAME
        self._progress_file = run_folder / PROGRESS
        self._experiment = experiment
        self._run_name = run_name
        self._params = params
        self._tags = tags
        self._notice = notice
        self._progress = _Progress()
        self._opened = False
        self._failures = 0
        self._status: Status | None = None
        self._wake = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)

    def start(self) -> None:
        """Begin, or go on where an earlier tracker of this run folder stopped. Returns at once."""
        self._thread.start()

    def finish(self, status: Status = "FINISHED", patience: float = 60.0) -> str | None:
        """Ship the rest of the journal and end the run, for at most `patience` seconds.

        Returns:
            The run's id; None if the server did not take everything in time. `notice` then says where the journal
            lies; a new Tracker of the same run folder ships the rest.
        """
        self._status = status
        self._wake.set()
        self._thread.join(patience)
        if not self._thread.is_alive():
            return self._progress.run_id
        self._abandoned.set()
        self._wake.set()
        self._notice(f"MLflow did not take all metrics in {patience:g} s; they are in {self._journal}")
        return None

    def _work(self) -> None:
        while not self._abandoned.is_set():
            status = self._status  # read before shipping: all that was written until finish() is then shipped
            try:
                self._ship()
                if status is not None:
                    store.client().set_terminated(self._progress.run_id, status)
                    return
                self._succeeded()
            except Exception as error:
                self._failed(error)
            self._wake.wait(self._delay())
            self._wake.clear()

    def _delay(self) -> float:
        return min(_INTERVAL * (1 << self._failures), _INTERVAL if self._status else _MAX_DELAY)

    def _failed(self, error: Exception) -> None:
        self._failures = min(self._failures + 1, 10)
        self._opened = False  # the run itself may be gone: look for it again
        if self._failures == 1:
            reason = str(error) if isinstance(error, HeliostatError) else store.explain(error)
            self._notice(f"MLflow: {reason}. Metrics wait in {self._journal}; it is tried again")

    def _succeeded(self) -> None:
        if self._failures:
            self._notice("MLflow is back; the waiting metrics are shipped")
        self._failures = 0

    def _ship(self) -> None:
        client = store.client()
        if not self._opened:
            self._open_run(client)
        while True:
            rows, offset = journal.read(self._journal, self._progress.offset, _ROWS)
            if offset == self._progress.offset:
                return
            steps = dict(self._progress.steps)
            metrics = [
                Metric(_valid_key(new.name), new.value, int(new.time * 1000), new.step)
                for new in journal.unseen(rows, steps)
            ]
            client.log_batch(self._progress.run_id, metrics=metrics, synchronous=True)  # in requests of 1000 metrics
            self._progress.offset, self._progress.steps = offset, steps
            self._save()

    def _open_run(self, client: MlflowClient) -> None:
        self._load()
        self._save()  # the key must be on disk before a run has it
        if not self._find_run(client):
            self._create_run(client)
        self._log_params(client)
        self._opened = True

    def _find_run(self, client: MlflowClient) -> bool:
        """Go on with the run of an earlier tracker; False if there is none on this server."""
        experiment = store.experiment_id(self._experiment)
        found = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{self._progress.key}'", max_results=1)
        if not found:
            self._progress = _Progress(key=self._progress.key)
            return False
        self._progress.run_id = found[0].info.run_id
        client.update_run(self._progress.run_id, status="RUNNING")
        return True

    def _create_run(self, client: MlflowClient) -> None:
        tags = {**self._tags, _KEY_TAG: self._progress.key}
        self._progress.run_id = _create_run(client, self._experiment, self._run_name, tags)
        self._save()

    def _log_params(self, client: MlflowClient) -> None:
        """Log the params once: MLflow refuses a changed value, and a resumed run may have other workers."""
        if self._progress.params_logged:
            return
        try:
            _log_params(client, str(self._progress.run_id), self._params)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._notice(f"MLflow refused the parameters of the run: {store.explain(error)}")
        self._progress.params_logged = True
        self._save()

    def _load(self) -> None:
        if self._progress_file.exists():
            try:
                self._progress = _Progress(**json.loads(self._progress_file.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                self._notice(f"{self._progress_file} is damaged; the metrics go to a new MLflow run")

    def _save(self) -> None:
        self._progress_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._progress_file.with_name(f".{PROGRESS}.tmp")
        temporary.write_text(json.dumps(asdict(self._progress)), encoding="utf-8")
        os.replace(temporary, self._progress_file)


def start_run(experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Create a run for work that keeps no journal, such as a search or an evaluation. Params may be nested.

    Returns:
        The run's id; `end_run` ends it.

    Raises:
        RegistryError: the store failed; so for the functions below.
    """
    with store.failures(f"the run {name} cannot be created"):
        client = store.client()
        run_id = _create_run(client, experiment, name, tags)
        _log_params(client, run_id, params)
    return run_id


def log_params(run_id: str, params: Mapping[str, Any]) -> None:
    """Add parameters to the run, which may be nested; each can only be given once."""
    with store.failures("the parameters cannot be logged"):
        _log_params(store.client(), run_id, params)


def end_run(run_id: str, status: Status = "FINISHED") -> None:
    """Say how the run ended."""
    with store.failures(f"the run {run_id} cannot be ended"):
        store.client().set_terminated(run_id, status)


def _create_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    tags = {"mlflow.user": store.user(), "mlflow.source.name": "heliostat", **tags}
    cut = {_valid_key(key): str(value)[: limits.MAX_TAG_VAL_LENGTH] for key, value in tags.items()}
    return str(client.create_run(store.experiment_id(experiment), tags=cut, run_name=name).info.run_id)


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    cut = [Param(key, value[: limits.MAX_PARAM_VAL_LENGTH]) for key, value in flatten(params).items()]
    client.log_batch(run_id, params=cut, synchronous=True)  # in requests of 100 params


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `section.key` -> text, as MLflow's parameters are."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[_valid_key(f"{prefix}{key}")] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _valid_key(name: str) -> str:
    """The name without the characters that MLflow refuses in names of metrics, params and tags."""
    return re.sub(r"[^\w\-./ ]", "_", name)[: limits.MAX_ENTITY_KEY_LENGTH]


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log the metrics that are finite."""
    now = get_current_time_millis()
    batch = [Metric(_valid_key(name), value, now, step) for name, value in metrics.items() if math.isfinite(value)]
    with store.failures("the metrics cannot be logged"):
        store.client().log_batch(run_id, metrics=batch, synchronous=True)


def log_table(run_id: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Save rows of the same keys, if any, as a table of the run that MLflow shows, such as predictions.json."""
    if not rows:
        return
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    with store.failures(f"{name} cannot be logged"):
        store.client().log_table(run_id, columns, name)


def log_figure(run_id: str, name: str, figure: Figure) -> None:
    """Save the figure as the run's artifact `NAME.png`."""
    with store.failures(f"the figure {name} cannot be logged"):
        store.client().log_figure(run_id, figure, f"{name}.png", save_kwargs={"dpi": 150})


def log_text(run_id: str, name: str, text: str) -> None:
    """Save the text as the run's artifact `name`, such as config.yaml or reports/audit.md."""
    with store.failures(f"{name} cannot be logged"):
        store.client().log_text(run_id, text, name)


def log_artifacts_of_run(run_id: str, artifacts: Mapping[str, Path]) -> None:
    """Upload files and folders: artifact path -> local path."""
    for name, path in artifacts.items():
        with store.failures(f"{path} cannot be logged as {name}"):
            _log_artifact(store.client(), run_id, name, path)


def _log_artifact(client: MlflowClient, run_id: str, name: str, path: Path) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), name)
        return
    folder, _, file = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:  # MLflow keeps the local name: give it the wanted one
        renamed = shutil.copy2(path, Path(temporary) / file)
        client.log_artifact(run_id, str(renamed), folder or None)


def log_dataset(run_id: str, manifest: Mapping[str, Any]) -> None:
    """Record which data the run saw: one MLflow dataset per split, with the digest `data_sha256[:8]`.

    `manifest` is that of `heliostat.data.prepare`: {"files": {split: [{"path", "sha256", "bytes"}]}, "data_sha256",
    "splits": {split: counts}}.
    The data itself is not read.
    """
    inputs = [_dataset_input(manifest, split) for split in manifest["splits"]]
    with store.failures("the dataset cannot be logged"):
        store.client().log_inputs(run_id, inputs)


def _dataset_input(manifest: Mapping[str, Any], split: str) -> DatasetInput:
    files = manifest["files"][split]
    source = {"uri": files[0]["path"] if files else "", "files": files}
    if len(json.dumps(source)) > limits.MAX_DATASET_SOURCE_SIZE:
        source = {"uri": source["uri"], "number_of_files": len(files)}
    dataset = Dataset(
        name=split,
        digest=manifest["data_sha256"][:8],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(manifest["splits"][split]),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", split)])
