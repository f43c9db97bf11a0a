"""One trial of a decoding search: generate with one setting, prompts by prompts. Knows no searcher.

All settings get the same prompts in the same order with the same seeds, so that they differ by nothing but themselves
(common random numbers). The model is loaded once in each actor, whatever the number of settings it tries.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.evaluation import metrics
from heliostat.evaluation.config import GenerationSettings, JudgeConfig
from heliostat.evaluation.metrics import Floats, Metric
from heliostat.evaluation.questions import Pair
from heliostat.tuning import decoding_settings, objective
from heliostat.tuning.decoding_settings import Setting
from heliostat.tuning.reports import ERROR, FINISHED

SCORE, PROMPTS, TOKENS, SECONDS, STATISTICS = "score", "prompts", "tokens", "seconds", "statistics"


@dataclass(frozen=True)
class Task:
    """What all trials have in common."""

    model: str
    """Folder of the bundle."""
    data: DataConfig
    defaults: GenerationSettings
    """What a point is put on top of."""
    shots: tuple[Pair, ...]
    rungs: tuple[int, ...]
    """Numbers of prompts after which a trial reports, the last being all."""
    goal: objective.Goal
    labels: list[str] | None
    judge: JudgeConfig | None
    references: tuple[str, ...]
    batch_size: int
    seed: int
    resources: Mapping[str, float]

    def metric(self) -> Metric:
        """What is optimised."""
        return objective.build(self.goal, labels=self.labels, judge=self.judge, references=self.references)

    def setting(self, point: Mapping[str, Any]) -> Setting:
        """The setting of a trial's point."""
        return decoding_settings.of_point(point, self.defaults, self.shots)


@dataclass(frozen=True)
class Measured:
    """What a setting reached on some rows."""

    statistics: Floats
    """Of the metric, [rows, k]."""
    tokens: int
    """Generated, in all."""
    seconds: float


class Generator:
    """The model in this process, ready to be tried with any setting."""

    def __init__(self, task: Task) -> None:
        # Here and not above: the driver knows this module too, and has no other need of PyTorch.
        import torch

        from heliostat.models import base

        torch.set_num_threads(max(1, int(task.resources.get("CPU", 1))))
        started = time.perf_counter()
        self._task = task
        self._loaded = base.load_for_inference(task.model, device="cuda" if task.resources.get("GPU") else "cpu")
        self._metric = task.metric()
        self.loading_seconds = time.perf_counter() - started

    def measure(self, setting: Setting, rows: Sequence[Row], seed: int) -> Measured:
        """Generate for the rows, and score what came out.

        Raises:
            Exception: whatever transformers thinks of the setting.
        """
        from transformers import GenerationConfig

        from heliostat.evaluation import evaluator

        own = self._loaded.model.generation_config.to_dict()
        started = time.perf_counter()
        examples = evaluator.predict(
            self._loaded,
            rows,
            self._task.data,
            GenerationConfig.from_dict(setting.generation_config(own)),
            batch_size=self._task.batch_size,
            seed=seed,
            prefix=setting.prefix,
        )
        seconds = time.perf_counter() - started
        return Measured(self._metric.statistics(examples), sum(example.tokens for example in examples), seconds)

    def score(self, statistics: Floats) -> float:
        """The metric's value."""
        return metrics.score(self._metric, statistics)


class DecodingTrial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Ray Tune's view of a trial: each step goes on to the next rung, and reports what was reached so far."""

    def setup(self, config: dict[str, Any], task: Task, rows: Sequence[Row]) -> None:
        """The actor starts."""
        self._task, self._rows = task, rows
        self._generator = Generator(task)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The actor begins with another setting."""
        self._point = new_config["point"]
        self._parts: list[Measured] = []
        return True

    def step(self) -> dict[str, Any]:
        """The next rung. A setting that cannot be used says why, and ends."""
        done = sum(len(part.statistics) for part in self._parts)
        goal = next(rung for rung in self._task.rungs if rung > done)
        try:
            self._parts.append(self._measure(done, goal))
            report = self._report(goal)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            return {SCORE: float("nan"), PROMPTS: goal, ERROR: reason, "done": True}
        finished = goal == self._task.rungs[-1]
        return {**report, FINISHED: finished, "done": finished}

    def _measure(self, start: int, end: int) -> Measured:
        setting = self._task.setting(self._point)
        return self._generator.measure(setting, self._rows[start:end], self._task.seed + start)

    def _report(self, prompts: int) -> dict[str, Any]:
        statistics = np.concatenate([part.statistics for part in self._parts])
        score = self._generator.score(statistics)
        if np.isnan(score):
            raise ValueError("no answer could be scored")
        return {
            SCORE: score,
            PROMPTS: prompts,
            TOKENS: sum(part.tokens for part in self._parts) / prompts,
            SECONDS: sum(part.seconds for part in self._parts) / prompts,
            STATISTICS: statistics,
            "process": os.getpid(),
            "loading_seconds": self._generator.loading_seconds,
        }
