"""Evaluate with a pool of Ray actors, each with the model. Knows how pieces of work are dealt out, not what they are.

A free actor gets the next piece, the longest first, so all end at nearly the same time whatever their speed. The piece
of an actor that dies goes to the next free one, and a new actor takes its place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from heliostat import cluster
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import HeliostatError
from heliostat.evaluation import evaluator
from heliostat.evaluation.choices import ChoiceWork
from heliostat.evaluation.classification import ClassificationWork
from heliostat.evaluation.config import EvaluationConfig
from heliostat.evaluation.evaluator import Advance, Job, LikelihoodWork, Local, PredictionWork, Runner, Source
from heliostat.evaluation.metrics import Example
from heliostat.models.base import InferenceModel

MAX_DEATHS = 3
"""So many actors may die in one pool: more, and the next would die too."""

Work = LikelihoodWork | PredictionWork | ChoiceWork | ClassificationWork
Make = Callable[[InferenceModel], Work]
Call = tuple[Any, ...]
"""Name of one of the actor's methods, and its arguments."""


def connection(config: EvaluationConfig) -> AbstractContextManager[None]:
    """Connected to Ray inside, where the evaluation asks for workers.

    Raises:
        ResourceError: no cluster answers.
    """
    return cluster.connected() if config.num_workers else contextlib.nullcontext()


@contextlib.contextmanager
def runner(source: Source, config: EvaluationConfig) -> Iterator[Runner]:
    """The model in this process, or in `config.num_workers` actors, which are gone afterwards.

    Raises:
        ResourceError: the cluster cannot give the actors their resources.
        ModelError: the model cannot be loaded, where it is to run.
    """
    device = "cuda" if config.use_gpu else "cpu"
    if not config.num_workers:
        yield Local(source.load(device))
        return
    resources = config.resources_per_worker or {"CPU": 1.0, **({"GPU": 1.0} if config.use_gpu else {})}
    with cluster.connected():
        cluster.require(resources, config.num_workers, "evaluation.num_workers")
        pool = Pool(source, config.num_workers, resources, device)
        try:
            yield pool
        finally:
            pool.close()


class EvaluationWorker:
    """What runs in an actor. It loads the model at its first call, where an error finds its way to the driver."""

    def __init__(self, source: Source, device: str) -> None:
        self._source, self._device = source, device
        self._work: tuple[str, Work] | None = None

    @functools.cached_property
    def _loaded(self) -> InferenceModel:
        return self._source.load(self._device)

    def chat_template(self) -> str | None:
        """The model is loaded; its chat template."""
        return Local(self._loaded).chat_template

    def count(self, job: list[Any]) -> int:
        """How many pieces the job has; `job` holds its reference, which is fetched once."""
        return len(self._prepared(job[0]))

    def piece(self, job: list[Any], number: int) -> Any:
        """One piece of the job, done."""
        return self._prepared(job[0]).piece(number)

    def _prepared(self, reference: Any) -> Work:
        import ray

        if self._work is None or self._work[0] != reference.hex():
            self._work = (reference.hex(), ray.get(reference)(self._loaded))
        return self._work[1]


class Pool:
    """A `Runner` on actors. The results are those of `Local`, in the same order."""

    def __init__(self, source: Source, size: int, resources: dict[str, float], device: str) -> None:
        import ray

        self._actor = ray.remote(EvaluationWorker).options(**cluster.actor_options(resources))
        self._arguments = (source, device)
        self._deaths = 0
        self._workers: list[Any] = []
        self._running: dict[Any, tuple[Any, int | None]] = {}
        """Future -> (worker, index of its call; None: it loads the model, or nobody waits for the result)."""
        for _ in range(size):
            self._start_worker()

    @property
    def chat_template(self) -> str | None:
        """The chat template that the model's tokenizer has."""
        template: str | None = self._do([("chat_template",)])[0]
        return template

    def likelihood(self, rows: Sequence[Row], data: DataConfig) -> dict[str, float]:
        """As `evaluator.likelihood`."""
        return evaluator.mean_likelihood(self._pieces(functools.partial(LikelihoodWork, rows=list(rows), data=data)))

    def answer(self, job: Job, rows: int, advance: Advance) -> list[Example]:
        """As `Local.answer`."""
        batches = self._pieces(job, lambda batch: advance(len(batch)))
        found = {index: example for batch in batches for index, example in batch.items()}
        return [found[index] for index in range(rows)]

    def close(self) -> None:
        """End the actors."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._running.clear()

    def _pieces(self, job: Make, done: Callable[[Any], None] = lambda result: None) -> list[Any]:
        """The results of the job's pieces, in their order; `done` gets each as it comes."""
        import ray

        shared = [ray.put(job)]
        (count,) = self._do([("count", shared)])
        longest_first = [("piece", shared, number) for number in reversed(range(count))]
        return self._do(longest_first, done)[::-1]

    def _do(self, calls: Sequence[Call], done: Callable[[Any], None] = lambda result: None) -> list[Any]:
        """The results of the calls, in their order, whatever workers they are done by."""
        import ray

        results: dict[int, Any] = {}
        waiting = list(reversed(range(len(calls))))
        while len(results) < len(calls):
            self._deal(calls, waiting)
            (future,), _ = ray.wait(list(self._running), num_returns=1)
            worker, index = self._running.pop(future)
            try:
                result = ray.get(future)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                self._replace(worker, error)
                waiting += [index] if index is not None else []
            except ray.exceptions.RayTaskError as error:
                if index is None:
                    continue  # the model's error comes again with the worker's next call, and another's is over
                self._running = {future: (worker, None) for future, (worker, _) in self._running.items()}
                raise (error.cause if isinstance(error.cause, HeliostatError) else error) from None
            else:
                if index is not None:
                    results[index] = result
                    done(result)
        return [results[index] for index in range(len(calls))]

    def _deal(self, calls: Sequence[Call], waiting: list[int]) -> None:
        """Give each free worker a call. One that still loads the model gets none: it may never be there."""
        busy = [worker for worker, _ in self._running.values()]
        for worker in self._workers:
            if waiting and worker not in busy:
                index = waiting.pop()
                method, *arguments = calls[index]
                self._running[getattr(worker, method).remote(*arguments)] = (worker, index)

    def _start_worker(self) -> None:
        worker = self._actor.remote(*self._arguments)
        self._workers.append(worker)
        self._running[worker.chat_template.remote()] = (worker, None)

    def _replace(self, worker: Any, error: Exception) -> None:
        self._workers.remove(worker)
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            raise HeliostatError(
                f"{self._deaths} evaluation workers died, perhaps for want of memory; lower evaluation.batch_size or "
                "evaluation.num_workers, or raise evaluation.resources_per_worker"
            ) from error
        self._start_worker()
