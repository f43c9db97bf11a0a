"""One classifier as the API sees it: texts in, probabilities of its labels out. Knows neither HTTP nor Ray.

A thread of its own works on batches of the texts that wait. A request is answered whole, so one whose replica is lost
is simply asked again elsewhere.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from heliostat.data.tokens import text_ids
from heliostat.errors import GateRefused
from heliostat.evaluation.classification import probabilities
from heliostat.models.base import InferenceModel
from heliostat.serving.admission import Admission, Overloaded
from heliostat.serving.bounds import Bounds, positions
from heliostat.serving.calls import Accepted, Broken, Delta, Message, Refused, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineFailed, EngineState
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.protocol import AnyRequest, ClassificationRequest
from heliostat.serving.sampling import InvalidRequest
from heliostat.serving.served import CHECK_PROMPTS, TEXTS

# Probabilities in a padded batch against those of each text alone: rounding, and nothing else, may part them.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.05


@dataclass(eq=False)
class _Text:
    """A text that waits; `result` gets the probabilities of its labels, or the error."""

    ids: list[int]
    result: "asyncio.Future[list[float]]" = field(default_factory=asyncio.Future)


class ServedClassifier:
    """A running classifier. Construct it on the event loop that asks it."""

    def __init__(self, loaded: InferenceModel, model_id: str, args: EndpointArgs) -> None:
        """`args.max_batch_tokens` bounds a batch, padding included; one text alone is always taken."""
        self.id = model_id
        self.labels = loaded.labels
        self.max_length = positions(loaded.model.config)
        self.prompts = PromptEncoder(loaded.tokenizer, self.max_length)
        self._loaded = loaded
        self._bounds = Bounds(loaded.model.config.get_text_config().vocab_size, self.max_length)
        self._max_batch_tokens = args.max_batch_tokens
        self._max_texts = args.max_ongoing_requests
        self._admission = Admission(args.max_batch_tokens, args.max_ongoing_requests, args.max_queued_tokens)
        self._waiting: list[_Text] = []
        self._running = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="classify")
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def healthy(self) -> bool:
        """Whether texts are worked on."""
        return not self._task.done()

    @property
    def in_flight(self) -> int:
        """Texts that wait or are worked on."""
        return len(self._waiting) + self._running

    def state(self) -> EngineState:
        """How it is doing; it has no cache."""
        return EngineState(self._running, len(self._waiting), 0.0, 0, 0, 0)

    def about(self) -> dict[str, Any]:
        """As `hosting.about`: what a route tells of its model."""
        decoding = {"defaults": {}, "origin": {}, "greedy": True}
        facts = {"chat": False, "max_length": self.max_length, "decoding": decoding}
        return {**facts, "task": "classification", "labels": self.labels}

    async def classify(self, ids: list[int]) -> list[float]:
        """The probability of each label.

        Raises:
            InvalidRequest: the text is empty, too long, or has ids that are no tokens.
            Overloaded: too much waits.
            EngineFailed: the model failed on the text.
        """
        self._bounds.check_prompt(ids)
        if not self.healthy:
            raise EngineFailed("the endpoint is restarting; send the request again")
        text = _Text(ids)
        self._admission.enter(text, len(ids))
        self._waiting.append(text)
        self._arrived.set()
        try:
            return await text.result
        finally:
            self._admission.leave(text)
            if text in self._waiting:
                self._waiting.remove(text)

    async def check(self) -> None:
        """Classify the check prompts together, and each alone.

        Raises:
            GateRefused: the probabilities differ, or are none.
        """
        texts = (self._loaded.manifest or {}).get(CHECK_PROMPTS) or TEXTS
        await self.check_ids([ids[: self.max_length] for ids in text_ids(self._loaded.tokenizer, texts)])

    async def check_ids(self, prompts: Sequence[list[int]]) -> None:
        """The same with token ids."""
        together = await asyncio.gather(*(self.classify(list(ids)) for ids in prompts))
        tolerance = _TOLERANCE.get(self._loaded.model.dtype, _TOLERANCE_16_BITS)
        for number, (ids, got) in enumerate(zip(prompts, together, strict=True), 1):
            alone = (await self._work([ids]))[0]
            gap = max(abs(one - other) for one, other in zip(got, alone, strict=True))
            if not (gap <= tolerance and math.isfinite(sum(alone))):
                raise GateRefused(
                    f"{self.id}: check prompt {number} of {len(prompts)} has other probabilities in a batch than alone "
                    f"(they differ by {gap:.3g})"
                )

    def close(self) -> None:
        """Stop; requests in flight fail."""
        self.prompts.close()
        self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                batch = self._next_batch()
                if not batch:
                    self._arrived.clear()
                    continue
                self._running = len(batch)
                await self._answer(batch)
                self._running = 0
        finally:
            for text in self._waiting:
                text.result.cancel()

    def _next_batch(self) -> list[_Text]:
        """The oldest that waits, and those after it as long as all fit."""
        taken: list[_Text] = []
        longest = 0
        while self._waiting and len(taken) < self._max_texts:
            longest = max(longest, len(self._waiting[0].ids))
            if taken and longest * (len(taken) + 1) > self._max_batch_tokens:
                break
            taken.append(self._waiting.pop(0))
        return taken

    async def _answer(self, batch: Sequence[_Text]) -> None:
        try:
            found = await self._work([text.ids for text in batch])
        except Exception as error:
            for text in batch:
                if not text.result.done():
                    text.result.set_exception(EngineFailed(f"the model failed ({type(error).__name__})"))
            return
        for text, row in zip(batch, found, strict=True):
            if not text.result.done():
                text.result.set_result(row)

    async def _work(self, ids: Sequence[list[int]]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, probabilities, self._loaded, ids)
        return [[float(value) for value in row] for row in found.tolist()]


async def answer(
    served: ServedClassifier, request: AnyRequest, resumed: Resumed, max_prompt_tokens: int | None = None
) -> AsyncGenerator[Message]:
    """As `generation.answer`: Accepted, then one delta for each text; or Refused alone; or Broken as the end."""
    if not isinstance(request, ClassificationRequest):
        yield Refused(400, "this model is a classifier; use /classify", "model", code="wrong_task")
        return
    try:
        texts = [text if isinstance(text, list) else await served.prompts.whole(text) for text in request.input]
        for ids in texts:
            _check_length(ids, max_prompt_tokens)
        rows = await _all(served, texts)
    except InvalidRequest as error:
        yield Refused(400, str(error), "input", error.code)
        return
    except Overloaded as error:
        yield Refused(503, str(error), code="overloaded", retry_after=error.retry_after)
        return
    except EngineFailed as error:
        yield Broken(str(error))
        return
    yield Accepted(sum(map(len, texts)), len(texts))
    deltas = [
        (index, _delta(served.labels, ids, row)) for index, (ids, row) in enumerate(zip(texts, rows, strict=True))
    ]
    yield [(index, delta) for index, delta in deltas if index not in resumed.done]


async def _all(served: ServedClassifier, texts: Sequence[list[int]]) -> list[list[float]]:
    """All at once, so that they share batches. The first error ends them all."""
    tasks = [asyncio.create_task(served.classify(ids)) for ids in texts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _delta(labels: Sequence[str], ids: Sequence[int], row: Sequence[float]) -> Delta:
    likeliest = max(range(len(row)), key=row.__getitem__)
    return Delta(labels[likeliest], (), len(ids), 0, "stop", probabilities=tuple(row))


def _check_length(ids: Sequence[int], limit: int | None) -> None:
    if limit is not None and len(ids) > limit:
        raise InvalidRequest(
            f"Input tokens exceed the configured limit of {limit} tokens: the text has {len(ids)}",
            "input",
            code="context_length_exceeded",
        )
