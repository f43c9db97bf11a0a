"""What a decoding search is about to do: its space, model, rows and task, found right before anything starts.

Only the validation split is searched and compared on; the test split is never read.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.data import formats, splits
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation.metrics import Metric
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.evaluation.questions import Pair, pair_of
from heliostat.experiment import ExperimentConfig
from heliostat.models import bundle
from heliostat.registry import versions
from heliostat.registry.versions import ResolvedModel
from heliostat.tuning import decoding_settings, objective
from heliostat.tuning.decoding_settings import Setting
from heliostat.tuning.decoding_trial import Task
from heliostat.tuning.space import Point, Space


@dataclass(frozen=True)
class Plan:
    """A decoding search whose input was found right."""

    config: ExperimentConfig
    model: ResolvedModel
    manifest: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    """What the bundle has now."""
    space: Space
    task: Task
    rows: tuple[Row, ...]
    holdout: tuple[Row, ...]
    fixed: tuple[Point, ...]
    """Greedy decoding, and the bundle's present settings where those are others."""
    notes: tuple[str, ...]
    """What the user should know before it starts."""

    @property
    def own(self) -> Setting:
        """What the bundle decodes with now."""
        return self.task.setting(self.fixed[-1])

    @property
    def metric(self) -> Metric:
        """What is optimised."""
        return self.task.metric()


def prepare(config: ExperimentConfig, reference: str) -> Plan:
    """Check the configuration, the model and the rows.

    Raises:
        UserError: one of them is wrong.
    """
    section, defaults = config.tune_decoding, config.generation
    space, goal = check(config)
    model, manifest = _bundle(reference)
    rows, holdout, notes = _rows(config)
    references = tuple(formats.reference_of(row, config.data) for row in (*rows, *holdout))
    task = Task(
        model=model.path, data=config.data, defaults=defaults, shots=_shots(config, space),
        rungs=rungs(len(rows), section.min_prompts, section.reduction_factor), goal=goal,
        labels=config.evaluation.labels, judge=config.evaluation.judge, references=references,
        batch_size=config.evaluation.batch_size, seed=config.seed, resources=section.resources_per_trial,
    )  # fmt: skip
    task.metric()  # its settings are right
    generation_config = bundle.read_generation_config(Path(model.path))
    greedy = decoding_settings.greedy_point(defaults)
    own = decoding_settings.own_point(generation_config, PromptPrefix.of(manifest), defaults, model.path)
    fixed = (greedy,) if task.setting(own).same_as(task.setting(greedy)) else (greedy, own)
    return Plan(config, model, manifest, generation_config, space, task, rows, holdout, fixed, notes)


def check(config: ExperimentConfig) -> tuple[Space, objective.Goal]:
    """The space and the metric, or metrics with their weights, found right without the model and the rows.

    Raises:
        ConfigError: there is nothing to decode, or one of them is wrong.
    """
    if config.data.format == "text":
        raise ConfigError("data.format: a decoding search needs prompts with right answers; `text` has none")
    if config.data.task == "classification":
        raise ConfigError("data.format: a decoding search is for models that generate; a classifier has no decoding")
    space = decoding_settings.parse_space(config.tune_decoding.space, config.generation)
    goal = config.tune_decoding.metric or config.evaluation.metrics[0]
    objective.check([goal] if isinstance(goal, str) else list(goal))
    return space, goal


def rungs(prompts: int, min_prompts: int, reduction_factor: float) -> tuple[int, ...]:
    """After how many prompts settings are compared: min_prompts * reduction_factor^k, and at last all."""
    found = [min(min_prompts, prompts)]
    while found[-1] < prompts:
        found.append(min(prompts, math.ceil(min_prompts * reduction_factor ** len(found))))
    return tuple(found)


def divide(
    rows: Sequence[Row], data: DataConfig, *, prompts: int, holdout: int, min_prompts: int, seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[str, ...]]:
    """(rows to search on, other rows to compare on, what to tell the user), by a hash of the prompts and the seed.

    Of rows with equal prompts only the first is taken. Fewer rows than asked for are divided in proportion.

    Raises:
        DataError: there are fewer than twice `min_prompts`.
    """
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(decoding_settings.question_of(row, data), row)
    if len(distinct) < 2 * min_prompts:
        raise DataError(
            f"tune_decoding.min_prompts: {min_prompts} prompts to search on and as many to compare on are more than "
            f"the {len(distinct)} different prompts of the validation split; lower it, or add rows"
        )
    order = sorted(distinct, key=lambda question: hashlib.sha256(f"{seed}\n{question}".encode()).digest())
    notes: tuple[str, ...] = ()
    if len(order) < prompts + holdout:
        share = round(len(order) * prompts / (prompts + holdout))
        first = min(max(share, min_prompts), len(order) - min_prompts)
        notes = (
            f"the validation split has {len(order)} different prompts, fewer than tune_decoding.prompts + "
            f"holdout_prompts = {prompts + holdout}: {first} are searched on, {len(order) - first} held out",
        )
        prompts, holdout = first, len(order) - first
    chosen = [distinct[question] for question in order[: prompts + holdout]]
    return tuple(chosen[:prompts]), tuple(chosen[prompts:]), notes


def _bundle(reference: str) -> tuple[ResolvedModel, dict[str, Any]]:
    model = versions.resolve(reference)
    folder = Path(model.path)
    if not (folder / bundle.MANIFEST).exists():
        raise ConfigError(
            f"{reference}: is not a bundle (no {bundle.MANIFEST}), so it cannot carry decoding settings; give a "
            "registered model or the bundle folder of a run"
        )
    return model, bundle.verify(folder)


def _rows(config: ExperimentConfig) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[str, ...]]:
    section = config.tune_decoding
    rows = splits.load_splits(config.data, config.seed, ("validation",)).get("validation")
    if rows is None:
        raise DataError(
            "there is no validation split; set data.validation to a file, or data.validation_size to a part of the rows"
        )
    return divide(
        rows, config.data, prompts=section.prompts, holdout=section.holdout_prompts, min_prompts=section.min_prompts,
        seed=config.seed,
    )  # fmt: skip


def _shots(config: ExperimentConfig, space: Space) -> tuple[Pair, ...]:
    """The first training rows, as many as the space asks for."""
    wanted = decoding_settings.most_shots(space)
    if not wanted:
        return ()
    rows = splits.load_splits(config.data, config.seed, ("train",)).get("train", [])
    if len(rows) < wanted:
        raise ConfigError(
            f"tune_decoding.space.few_shot: {wanted} examples are more than the {len(rows)} training rows"
        )
    return tuple(pair_of(row, config.data) for row in rows[:wanted])
