"""A pool of actors comes to the results of one process, in the same order, also when an actor is killed."""

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import DataError, HeliostatError, ModelError, ResourceError
from heliostat.evaluation import actors, evaluator
from heliostat.evaluation.actors import Pool
from heliostat.evaluation.config import EvaluationConfig, GenerationSettings
from heliostat.evaluation.evaluator import Local, Source
from heliostat.experiment import ExperimentConfig
from heliostat.models.base import InferenceModel
from heliostat.registry import scoring
from tests import tiny
from tests.bundles import write_bundle

PAIRS = DataConfig(format="prompt_completion", max_length=64)
ROWS = [
    Row({"prompt": " ".join([text] * (1 + number % 3)), "completion": " house", "kind": str(number % 2)}, f"r:{number}")
    for number, text in enumerate(tiny.TEXTS[:23])
]
SETTINGS = GenerationSettings(max_new_tokens=6)
WORKERS = EvaluationConfig(num_workers=2, batch_size=3, metrics=["exact_match", "chrf"], group_by="kind")
HERE = WORKERS.model_copy(update={"num_workers": 0})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(str(write_bundle(tmp_path_factory.mktemp("actors") / "bundle")))


@pytest.fixture(scope="module")
def here(source: Source) -> Local:
    return Local(source.load())


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, source: Source) -> Iterator[Pool]:
    with actors.runner(source, WORKERS) as made:
        assert isinstance(made, Pool)
        yield made


def ignore(done: int) -> None:
    """Told of what is done."""


def pids() -> set[int]:
    """The processes in which evaluation workers are."""
    found = psutil.process_iter(["cmdline"])
    return {each.pid for each in found if "ray::EvaluationWorker" in " ".join(each.info["cmdline"] or [])}


def test_scores_and_predictions_are_those_of_one_process(pool: Pool, here: Local) -> None:
    done: list[int] = []
    found = evaluator.evaluate(pool, ROWS, PAIRS, SETTINGS, WORKERS, advance=done.append)
    assert found == evaluator.evaluate(here, ROWS, PAIRS, SETTINGS, HERE)
    assert [example.prompt for example in found.examples] == [row.fields["prompt"] for row in ROWS]
    assert len({example.prediction for example in found.examples}) > 5
    assert sum(done) == len(ROWS)
    assert len(done) == 8, "told as the batches finish"
    assert len(pids()) >= 2
    assert pool.chat_template == here.chat_template


def test_sampling_does_not_depend_on_who_does_which_batch(pool: Pool, here: Local) -> None:
    settings = GenerationSettings(max_new_tokens=6, do_sample=True, temperature=2.0)
    job = evaluator.answers(ROWS, PAIRS, settings, HERE)
    assert pool.answer(job, len(ROWS), ignore) == here.answer(job, len(ROWS), ignore)


def test_choices_are_those_of_one_process(pool: Pool, here: Local) -> None:
    config = EvaluationConfig(scoring="likelihood", labels=["house", "old dog"], batch_size=3)
    job = evaluator.answers(ROWS, PAIRS, SETTINGS, config)
    assert pool.answer(job, len(ROWS), ignore) == here.answer(job, len(ROWS), ignore)


def test_the_rows_of_a_killed_actor_go_to_another(pool: Pool, here: Local) -> None:
    before = pids()
    killed: list[int] = []

    def kill_one(done: int) -> None:
        if not killed:
            killed.append(min(pids()))
            os.kill(killed[0], signal.SIGKILL)

    job = evaluator.answers(ROWS, PAIRS, SETTINGS, HERE)
    found = pool.answer(job, len(ROWS), kill_one)
    assert found == here.answer(job, len(ROWS), ignore)
    # What comes after it is done by two again.
    assert pool.likelihood(ROWS, PAIRS) == here.likelihood(ROWS, PAIRS)
    assert killed[0] in before
    assert killed[0] not in pids()


def test_wrong_rows_are_told_as_in_one_process(pool: Pool, here: Local) -> None:
    rows = [*ROWS, Row({"prompt": "x" * 2000, "completion": " house", "kind": "0"}, "r:99")]
    messages = []
    for runner in (pool, here):
        with pytest.raises(DataError) as raised:
            runner.answer(evaluator.answers(rows, PAIRS, SETTINGS, HERE), len(rows), ignore)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "leaves none of the model's 128 positions" in messages[0]


class Failing:
    """A job whose pieces fail, as a model would that runs out of memory."""

    def __init__(self, loaded: InferenceModel) -> None:
        """Knows no model."""

    def __len__(self) -> int:
        return 6

    def piece(self, number: int) -> int:
        """Nothing comes of it."""
        raise RuntimeError("no room left")


def test_after_a_failure_the_pool_works_on(pool: Pool, here: Local) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="no room left"):
        pool._pieces(Failing)  # type: ignore[arg-type]
    assert pool.likelihood(ROWS, PAIRS) == here.likelihood(ROWS, PAIRS)


def test_a_model_that_cannot_be_loaded_is_told(ray_cluster: Any, tmp_path: Path) -> None:
    one = WORKERS.model_copy(update={"num_workers": 1})
    with (
        actors.runner(Source(str(tmp_path / "gone")), one) as runner,
        pytest.raises(ModelError, match="no such file or folder"),
    ):
        runner.likelihood(ROWS, PAIRS)


class Deadly:
    """A source whose model kills the process that loads it."""

    def load(self, device: str) -> None:
        """Die as the kernel would do it for want of memory."""
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_and_again_end_it(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "MAX_DEATHS", 1)
    pool = Pool(Deadly(), 1, {"CPU": 1}, "cpu")  # type: ignore[arg-type]
    with pytest.raises(HeliostatError, match=r"2 evaluation workers died, .*; lower evaluation\.batch_size or"):
        pool.likelihood(ROWS, PAIRS)
    pool.close()


def test_more_workers_than_the_cluster_can_give(ray_cluster: Any, source: Source) -> None:
    config = EvaluationConfig(num_workers=3, resources_per_worker={"CPU": 2})
    message = r"evaluation\.num_workers=3 needs 6 CPU, but the cluster has 4; lower evaluation\.num_workers"
    with pytest.raises(ResourceError, match=message), actors.runner(source, config):
        pass


def test_evaluate_with_workers_gives_the_result_of_one_process(
    ray_cluster: Any, source: Source, tmp_path: Path
) -> None:
    lines = [f"{row.fields['prompt']}\t house" for row in ROWS[:6]]
    (tmp_path / "test.tsv").write_text("\n".join(["prompt\tcompletion", *lines]))
    before = pids()

    def scored(num_workers: int) -> dict[str, Any]:
        config = ExperimentConfig.model_validate(
            {
                "name": "tiny",
                "model": {"model_name_or_path": f"{source.path}-weights"},
                "data": {"test": str(tmp_path / "test.tsv"), "format": "prompt_completion", "max_length": 128},
                "generation": {"max_new_tokens": 4},
                "evaluation": {"num_workers": num_workers, "baseline": "base", "batch_size": 2},
            }
        )
        return scoring.score(config, source.path, Console(file=io.StringIO())) | {"run_id": None}

    assert scored(1) == scored(0)
    deadline = time.monotonic() + 60
    while not pids() <= before:
        assert time.monotonic() < deadline, "the actors do not end"
        time.sleep(0.05)
