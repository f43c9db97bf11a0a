"""Scores of a run's checkpoints by a task metric, worked out beside the training. Knows bundles, not the training loop.

Workers leave the weights of each evaluation in `exports/step_000120` of the run folder. Each is made a bundle, loaded
anew and scored on the validation rows: on the cluster while training goes on, or in a thread of this process when
training runs without Ray. The scores are journal rows in `scores.jsonl`; a resumed run goes on behind the last one.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

from heliostat import journal
from heliostat.data import formats, splits
from heliostat.data.records import Row
from heliostat.evaluation import metrics
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.training import bundling
from heliostat.training.setup import Source
from heliostat.training.spec import STOP, export_name

EXPORTS = "exports"
SCORES = "scores.jsonl"
_POLL_S = 0.3


class CheckpointScores:
    """Inside its `with` block, scores what the workers export; leaving it waits until all is scored."""

    def __init__(
        self, config: ExperimentConfig, run_folder: Path, source: Source, tokens: Path, lineage: dict[str, Any]
    ) -> None:
        self._config = config
        self._metric = config.training.metric_for_best_model
        self._folder = run_folder
        self._bundle = (source, tokens, lineage)
        self._journal = run_folder / SCORES
        self._training_over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-scores", daemon=True)

    def __enter__(self) -> "CheckpointScores":
        self._rows = list(splits.load_splits(self._config.data, self._config.seed, ("validation",))["validation"])
        references = [formats.reference_of(row, self._config.data) for row in self._rows]
        evaluation = self._config.evaluation
        (self._scorer,) = metrics.build(
            [self._metric], labels=evaluation.labels, judge=evaluation.judge, references=references
        )
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._training_over.set()
        if kind is None:
            self._thread.join()
            if self._error:
                raise self._error

    def choose(self) -> None:
        """Make the best weights the run's, and add the scores to its journal, which is still now."""
        for row in journal.read(self._journal)[0]:
            journal.append(self._folder / journal.NAME, row["step"], row["metrics"])
        best = self._best()
        if best is not None and (self._folder / EXPORTS / best).exists():
            weights = self._folder / "weights"
            shutil.rmtree(weights, ignore_errors=True)
            os.rename(self._folder / EXPORTS / best, weights)
            shutil.rmtree(self._folder / EXPORTS)

    def _work(self) -> None:
        try:
            while True:
                over = self._training_over.is_set()
                for folder in self._unscored():
                    if (self._folder / STOP).exists():
                        return
                    self._score(folder)
                if over:
                    return
                self._training_over.wait(_POLL_S)
        except BaseException as error:
            self._error = error

    def _unscored(self) -> list[Path]:
        scored = self._scored()
        found = (self._folder / EXPORTS).glob("step_[0-9]*[0-9]")
        return sorted(folder for folder in found if folder.name not in scored)

    def _scored(self) -> dict[str, float]:
        """Export -> its score."""
        rows, _ = journal.read(self._journal)
        return {export_name(row["step"]): row["metrics"][f"eval_{self._metric}"] for row in rows}

    def _score(self, export: Path) -> None:
        source, tokens, lineage = self._bundle
        target = self._folder / EXPORTS / f".{export.name}"
        bundle = bundling.assemble(self._config, export, target, source, tokens, lineage)
        examples = _predict(self._config, bundle, self._rows)
        value = metrics.score(self._scorer, self._scorer.statistics(examples))
        journal.append(self._journal, int(export.name.removeprefix("step_")), {f"eval_{self._metric}": value})
        shutil.rmtree(bundle)
        best = self._best()
        for name in self._scored().keys() - {best}:
            shutil.rmtree(self._folder / EXPORTS / name, ignore_errors=True)

    def _best(self) -> str | None:
        """The export with the best score, the earliest of equals."""
        scored = self._scored()
        sign = 1 if self._scorer.greater_is_better else -1
        return max(scored, key=lambda name: (sign * scored[name], name == min(scored)), default=None)


def _predict(config: ExperimentConfig, bundle: Path, rows: list[Row]) -> list[metrics.Example]:
    if config.training.num_workers == 0:
        return _predict_here(config, bundle, rows)
    import ray

    # No CPU of its own: it shares those that the workers leave idle. A GPU is waited for, at worst to the end.
    gpus = 1 if config.evaluation.use_gpu else 0
    task = ray.remote(num_cpus=0, num_gpus=gpus)(_predict_here)
    examples: list[metrics.Example] = ray.get(task.remote(config, bundle, rows))
    return examples


def _predict_here(config: ExperimentConfig, bundle: Path, rows: list[Row]) -> list[metrics.Example]:
    from heliostat.evaluation import evaluator  # takes seconds to import

    loaded = base.load_for_inference(str(bundle), device="cuda" if config.evaluation.use_gpu else "cpu")
    job = evaluator.answers(rows, config.data, config.generation, config.evaluation)
    return evaluator.Local(loaded).answer(job, len(rows), lambda done: None)
