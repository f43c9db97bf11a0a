"""Which points of a space are tried, in which order. Knows Optuna and Ray Tune's Searcher, not what a trial does."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher

from heliostat.config import fingerprint
from heliostat.tuning.config import SearchConfig
from heliostat.tuning.space import Point, Space

# So many repeated draws in a row say that a small space is tried out.
_MAX_REPEATS = 100

optuna.logging.set_verbosity(optuna.logging.WARNING)


class PointSearcher(Searcher):  # type: ignore[misc]  # Ray has no types
    """Hands out `fixed` points, then `known` ones, then those that Optuna draws; none of them twice.

    A trial's config is {"index": number of the trial, "point": its point}. `note` is called with both before the trial
    exists, so that whoever keeps the notes loses no point. `known` points, of an earlier attempt at the same search,
    are told to Optuna like its own; `fixed` ones may lie outside of the space and are not.
    """

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        *,
        where: str,
        metric: str,
        mode: str,
        seed: int,
        note: Callable[[int, Point], None],
        fixed: Sequence[Point] = (),
        known: Sequence[Point] = (),
    ) -> None:
        """Raises:
        ConfigError: the searcher is `grid` and the space has none. `where` names the section.
        """
        super().__init__(metric=metric, mode=mode)
        planned = [*known, *(space.grid(where) if config.searcher == "grid" else [])]
        planned = list({fingerprint(point): point for point in planned}.values())
        drawn = min(config.num_samples, space.size() or config.num_samples)
        self.limit = len(fixed) + (len(planned) if config.searcher == "grid" else drawn)
        """The most trials that there will be."""
        self._space = space
        self._note = note
        self._fixed = list(fixed)
        self._count = 0
        self._seen = {fingerprint(point) for point in fixed}
        self._asked: dict[str, optuna.Trial] = {}
        self._study = optuna.create_study(
            direction="minimize" if mode == "min" else "maximize", sampler=_sampler(config.searcher, seed)
        )
        for point in planned:
            self._study.enqueue_trial(space.raw(point))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The config of the next trial; FINISHED when there are enough."""
        point = self._next(trial_id) if self._count < self.limit else None
        if point is None:
            self.limit = self._count
            return str(Searcher.FINISHED)
        index, self._count = self._count, self._count + 1
        self._note(index, point)
        return {"index": index, "point": point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only the end of a trial counts."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how one of its trials ended; one that was stopped early counts with what it had reached."""
        trial = self._asked.pop(trial_id, None)
        value = float((result or {}).get(self.metric, math.nan))
        if trial is not None:
            failed = error or not math.isfinite(value)
            self._study.tell(trial, None if failed else value, optuna.trial.TrialState.FAIL if failed else None)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune's snapshots are never restored, a search goes on from its notes."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called, as above."""
        raise NotImplementedError

    def _next(self, trial_id: str) -> Point | None:
        if self._count < len(self._fixed):
            return self._fixed[self._count]
        for _ in range(_MAX_REPEATS):
            trial = self._study.ask()
            point = self._space.suggest(trial)
            if fingerprint(point) not in self._seen:
                self._seen.add(fingerprint(point))
                self._asked[trial_id] = trial
                return point
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return None


def _sampler(searcher: str, seed: int) -> optuna.samplers.BaseSampler:
    """TPE: Bergstra et al. 2011, with running trials taken for bad ones, so that parallel trials differ."""
    if searcher == "optuna":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)
