"""Batched `model.generate()` for what continuous batching cannot do: beams, n-grams, typical_p; and scores of prompts.

A thread of its own takes the requests that wait, as many of the same settings as fit into one batch, and works on them
together. A completion comes in one piece when its batch is done: this lane does not stream token by token. The
weights are those of the engine, which may take a step at the same time. Knows no HTTP or Ray.
"""

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from heliostat.errors import ModelError
from heliostat.evaluation.generate import given_tokens, padded
from heliostat.serving.admission import Admission
from heliostat.serving.calls import Delta
from heliostat.serving.engine import EngineFailed, token_ids
from heliostat.serving.sampler import Record
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.scoring import Scoring, score
from heliostat.serving.text import Completion

logger = logging.getLogger(__name__)

# Seconds that an incomplete batch waits for more requests: a fraction of one generation, many times a burst.
WINDOW_S = 0.01
# Settings that count tokens or n-grams of the padded prompt; with them, only prompts of one length share a batch.
_SEES_PADDING = frozenset({"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"})
# Colder than this is greedy in effect, and scores divided by less are no numbers any more.
_COLDEST = 1e-5
Task = SamplingParams | Scoring


@dataclass(eq=False)
class _Request:
    """A request in the lane; `result` gets its completions' tokens or its prompt's records, or the error."""

    prompt_ids: list[int]
    task: Task
    result: "Future[Any]" = field(default_factory=Future)
    gone: bool = False
    """Nobody waits for the answer any more."""

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes."""
        return 1 if isinstance(self.task, Scoring) else int(self.task.extra.get("num_beams", 1))

    def tokens(self, prompt_tokens: int) -> int:
        """Tokens of its rows at their longest, in a batch whose prompts have so many."""
        return self.rows * (prompt_tokens + (0 if isinstance(self.task, Scoring) else self.task.max_tokens))

    def shares_batch(self, other: "_Request") -> bool:
        """Whether both can be worked on in one call, and each get what it would get alone."""
        if self.task != other.task:
            return False
        if isinstance(self.task, Scoring):
            return True
        if self.task.seed is not None and self.task.temperature > 0:
            return False
        return not (self.task.extra.keys() & _SEES_PADDING) or len(self.prompt_ids) == len(other.prompt_ids)


class Lane:
    """Batches of `generate()` on one model. Construct, `await start(...)`, then `generate` from one event loop."""

    def __init__(
        self, model: Any, tokenizer: Any, *, max_sequences: int, max_batch_tokens: int, max_queued_tokens: int
    ) -> None:
        """`max_sequences` bounds the rows of a batch, which are its requests times their beams; `max_batch_tokens` the
        tokens of all rows at their longest, which is what their KV cache holds. A single request is always taken.
        `max_queued_tokens` bounds those of the requests that wait.
        """
        given = model.generation_config
        self._eos = token_ids(given.eos_token_id)
        self._ids = {
            "bos_token_id": given.bos_token_id,
            "eos_token_id": sorted(self._eos) or None,
            "pad_token_id": next((i for i in (tokenizer.pad_token_id, given.pad_token_id) if i is not None), 0),
            "decoder_start_token_id": given.decoder_start_token_id,
        }
        self._apart = model.config.is_encoder_decoder
        self._model = _view(model)
        # `generate()` fills what is left open from the model's own generation config, so that must hold nothing else.
        self._model.generation_config = GenerationConfig(**self._ids)
        self._tokenizer = tokenizer
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._admission = Admission(max_batch_tokens, max_sequences, max_queued_tokens)
        self._in_flight = 0
        self._changed = threading.Condition()
        self._closing = False
        self._trials: list[SamplingParams] = []
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)

    async def start(self, trials: Sequence[SamplingParams]) -> None:
        """Prove that the model decodes with each of `trials`, or greedily without any, then start the thread.

        Raises:
            ModelError: it does not; the message is transformers' own.
        """
        self._trials = list(trials) or [SamplingParams(1)]
        try:
            await asyncio.to_thread(self._try_out)
        except Exception as error:
            raise ModelError(f"generation_config.json: the model cannot decode with these settings: {error}") from error
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread is alive and takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def in_flight(self) -> int:
        """Requests that are waiting or being generated."""
        return self._in_flight

    @property
    def running(self) -> int:
        """Requests of the batch that is being worked on."""
        return min(len(self._running), self._in_flight)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[Delta]:
        """Generate from `prompt_ids`, which `Engine.check` takes; yields one delta, the whole completion.

        `emitted` is a beginning that was given out elsewhere, as in `Engine.generate`; the same seed then gives other
        tokens than an unbroken generation. Closing the iterator early, or cancelling the task that reads it, removes a
        request that waits; a batch that is being generated ends when nobody waits for any of it.

        Raises:
            Overloaded: too many requests wait.
            EngineFailed: the lane is down, or it failed on this request.
        """
        completion = Completion(self._tokenizer, prompt_ids, params, self._ends(params), emitted, apart=self._apart)
        if completion.finish_reason is not None:
            yield completion.extend(())
            return
        task = replace(
            params,
            max_tokens=params.max_tokens - len(emitted),
            min_tokens=max(0, params.min_tokens - len(emitted)),
            sequences=1,
        )
        (tokens,) = await self._answer(_Request([*prompt_ids, *emitted], task))
        yield completion.finish(tokens)

    async def generate_many(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Delta]:
        """The `params.sequences` best beams, best first, each as one delta; raises as `generate` does."""
        found = await self._answer(_Request(list(prompt_ids), params))
        ends = self._ends(params)
        made = partial(Completion, self._tokenizer, prompt_ids, params, ends, apart=self._apart)
        return [made().finish(tokens) for tokens in found]

    async def score(self, prompt_ids: Sequence[int], top: int) -> list[Record | None]:
        """See `scoring.score`; raises as `generate` does."""
        records: list[Record | None] = await self._answer(_Request(list(prompt_ids), Scoring(top)))
        return records

    def close(self) -> None:
        """Stop the thread after the step it is in; requests in flight fail. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    async def _answer(self, request: _Request) -> Any:
        self._admission.enter(request, request.tokens(len(request.prompt_ids)))
        self._in_flight += 1
        try:
            self._submit(request)
            return await asyncio.wrap_future(request.result)
        finally:
            self._in_flight -= 1
            self._forget(request)

    def _submit(self, request: _Request) -> None:
        # Cancelling the task that waits must not end the future too: `_forget` is what takes the request away.
        request.result.set_running_or_notify_cancel()
        with self._changed:
            if not self.healthy:
                raise EngineFailed("the endpoint is restarting; send the request again")
            self._waiting.append(request)
            self._changed.notify_all()

    def _forget(self, request: _Request) -> None:
        request.gone = True
        self._admission.leave(request)
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return self._eos.union(params.stop_token_ids)

    def _run(self) -> None:
        """The body of the thread: batch after batch until `close`, or until the model no longer runs at all."""
        try:
            while batch := self._next_batch():
                self._work(batch)
        except Exception as error:
            # No traceback: the message of an error may hold a prompt.
            logger.error("the generate lane ended (%s)", type(error).__name__)
        finally:
            with self._changed:
                self._closing = True
                left = [*self._running, *self._waiting]
                self._waiting.clear()
            for request in left:
                _fail(request)

    def _next_batch(self) -> list[_Request]:
        """The requests to generate for next, oldest first; empty when the lane is closing."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closing or self._waiting)
                self._changed.wait_for(lambda: self._closing or len(self._waiting) >= self._max_sequences, WINDOW_S)
                if self._closing:
                    return []
                if self._waiting:  # else their clients left meanwhile
                    self._running = self._oldest_batch()
                    for request in self._running:
                        self._waiting.remove(request)
                    return self._running

    def _oldest_batch(self) -> list[_Request]:
        """The oldest request, and all younger ones that fit into its batch."""
        oldest = self._waiting[0]
        batch: list[_Request] = []
        longest = 0
        for request in self._waiting:
            size = len(batch) + 1
            length = max(longest, len(request.prompt_ids))
            fits = size * oldest.rows <= self._max_sequences and size * oldest.tokens(length) <= self._max_batch_tokens
            if request is oldest or (fits and request.shares_batch(oldest)):
                batch.append(request)
                longest = length
        return batch

    def _work(self, batch: list[_Request]) -> None:
        """Generate for a batch. If that fails, for each of its requests alone, so that none fails for another.

        Raises:
            Exception: the model no longer runs.
        """
        try:
            outputs = self._outputs(batch)
        except Exception as error:
            if self._closing:
                return
            if len(batch) > 1:
                for request in batch:
                    self._work([request])
                return
            logger.error("a request of the generate lane failed (%s)", type(error).__name__)
            _fail(batch[0])
            self._try_out()
            return
        for request, output in zip(batch, outputs, strict=True):
            request.result.set_result(output)

    def _try_out(self) -> None:
        for params in self._trials:
            self._outputs([_Request([0], params)])

    def _outputs(self, batch: list[_Request]) -> Sequence[Any]:
        """The result of each request of a batch."""
        task = batch[0].task
        if isinstance(task, Scoring):
            return score(self._model, [request.prompt_ids for request in batch], task.top)
        if task.seed is None:
            return self._generate(batch, task)
        with torch.random.fork_rng(devices=[self._model.device] if self._model.device.type == "cuda" else []):
            torch.manual_seed(task.seed)
            return self._generate(batch, task)

    def _generate(self, batch: list[_Request], params: SamplingParams) -> list[list[list[int]]]:
        """The new tokens of each request's completions; what follows an end token or stop string is of no meaning."""
        ids, mask = padded(self._model, [request.prompt_ids for request in batch])
        given = given_tokens(self._model, ids)
        stopping = StoppingCriteriaList([_Abandoned(lambda: self._closing or all(r.gone for r in batch))])
        if params.stop:
            stopping.append(_StopText(self._tokenizer, params.stop, given))
        with torch.inference_mode():
            output = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=self._config(params),
                stopping_criteria=stopping,
            )
        if self._closing:
            raise EngineFailed("the lane was closed while it generated")
        new: list[list[int]] = output[:, given:].tolist()
        return [new[start : start + params.sequences] for start in range(0, len(new), params.sequences)]

    def _config(self, params: SamplingParams) -> GenerationConfig:
        """All that `generate()` is told; what is not here keeps transformers' own neutral value."""
        sampling = {
            "temperature": max(float(params.temperature), _COLDEST),
            "top_k": params.top_k,
            "top_p": float(params.top_p),
            **({"min_p": float(params.min_p)} if params.min_p else {}),
        }
        sampled = params.temperature > 0
        bias = {"sequence_bias": [[[token], float(value)] for token, value in params.logit_bias.items()]}
        return GenerationConfig(
            **{**self._ids, "eos_token_id": sorted(self._ends(params)) or None},
            **params.extra,
            **(bias if params.logit_bias else {}),
            **(sampling if sampled else {}),
            do_sample=sampled,
            repetition_penalty=float(params.repetition_penalty),
            min_new_tokens=params.min_tokens,
            max_new_tokens=params.max_tokens,
            num_return_sequences=params.sequences,
        )


def _view(model: Any) -> Any:
    """The same model on the same weights, with a config of its own.

    A forward pass of transformers writes some of its arguments into the config while it lasts. Those of the engine say
    that attention is not causal, because its masks are; a pass in another thread would believe it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _Abandoned(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends a whole batch that nobody waits for."""

    def __init__(self, abandoned: Callable[[], bool]) -> None:
        self._abandoned = abandoned

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(rows,) all true or all false."""
        return torch.full((input_ids.shape[0],), self._abandoned(), device=input_ids.device)


class _StopText(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends the rows whose completion has just come to hold a stop string.

    That of transformers also finds stop strings that begin in the prompt, which the engine does not, and goes through
    the whole vocabulary for every new stop string, which a request may bring.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._prompt_tokens = prompt_tokens
        # A token is at least a byte; some more, because a text may be decoded differently at its beginning.
        self._tail = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(rows,) whether the row of tokens, prompt and completion, has ended."""
        tails = input_ids[:, self._prompt_tokens :][:, -self._tail :].tolist()
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _fail(request: _Request) -> None:
    if not request.result.done():
        request.result.set_exception(EngineFailed("the endpoint could not generate for the request; send it again"))
