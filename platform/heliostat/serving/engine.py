"""Token ids in, text out: many requests at once on one model. Knows transformers' continuous batching, not HTTP or Ray.

The generation loop of transformers ends, with all its requests, when any step raises. So nothing reaches it that could
make a step raise (`check`), and when one does, its requests fail and a new loop is started. Handlers run on one event
loop; the loop's thread only posts to it.
"""

import asyncio
import gc
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from heliostat.errors import HeliostatError, ModelError, ResourceError
from heliostat.serving import attention, linears, memory
from heliostat.serving.admission import Admission
from heliostat.serving.admission import Overloaded as Overloaded
from heliostat.serving.bounds import Bounds, positions
from heliostat.serving.calls import Delta
from heliostat.serving.sampler import ROW, Row, Sampler
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.text import Completion, TokenTexts

logger = logging.getLogger(__name__)
# At its warning level, transformers logs the first and last tokens of prompts that it drops.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

# Tokens of one block of the KV cache; prompts share the whole blocks of a common beginning.
PAGE_TOKENS = 32
# Short generations that use all the sampler can do.
_TRIALS = (
    SamplingParams(1),
    SamplingParams(1, temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, presence_penalty=0.1, logprobs=1),
)


class EngineFailed(HeliostatError):
    """The engine cannot work on a request, or stopped while it did; the request may be sent again."""


@dataclass(frozen=True)
class EngineState:
    """How an engine is doing. The last three count since it was started."""

    running: int
    """Generations that are being worked on."""
    waiting: int
    cache_usage: float
    """Share of the KV cache that running generations hold, 0 to 1."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there, which were not computed again."""
    restarts: int


@dataclass(eq=False)
class _Request:
    """A request in the loop; `arrivals` gets lists of new tokens, or the error that ended it."""

    id: str
    manager: ContinuousBatchingManager
    arrivals: "asyncio.Queue[list[int] | EngineFailed]" = field(default_factory=asyncio.Queue)
    received: int = 0


class Engine:
    """Continuous batching of one model. Construct, `await start()`, then `generate` from that same event loop."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_tokens: int,
        cache_tokens: int,
        max_batch_requests: int,
        max_queued_tokens: int,
    ) -> None:
        """`max_batch_tokens` and `max_batch_requests` bound one forward pass, `cache_tokens` the KV cache, and
        `max_queued_tokens` what may wait for a place in it: tokens of prompts and of what they ask for.

        Raises:
            ResourceError: the cache is smaller than one block.
        """
        if cache_tokens < PAGE_TOKENS:
            raise ResourceError(f"serving.cache_tokens={cache_tokens} is too small: give at least {PAGE_TOKENS}")
        self._model = model
        self._tokenizer = tokenizer
        self._batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=cache_tokens // PAGE_TOKENS,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_batch_requests,
            scheduler_type=_Scheduler.__name__,
            # With flash attention allowed, transformers may download a kernel from the hub and run it.
            auto_switch_to_flash=False,
            # The sampler reads and writes tensors on the host between steps.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        self._texts = TokenTexts(tokenizer)
        self._cache_tokens = cache_tokens
        self._admission = Admission(cache_tokens, max_batch_requests, max_queued_tokens)
        self._eos = token_ids(model.generation_config.eos_token_id)
        self._bounds = Bounds(model.get_input_embeddings().weight.shape[0], max_length=0)
        self._manager: ContinuousBatchingManager | None = None
        self._requests: dict[str, _Request] = {}
        self._failure: Exception | None = None
        self._restarts = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._supervisor: threading.Thread | None = None
        self._started = threading.Event()
        self._closing = threading.Event()

    async def start(self) -> None:
        """Allocate the cache, start the loop and prove with two short generations that the model runs in it.

        Raises:
            ResourceError: the cache does not fit into memory.
            ModelError: the model cannot be run with continuous batching.
        """
        self._event_loop = asyncio.get_running_loop()
        memory.check_cache(
            self._model.config.get_text_config(), self._cache_tokens, self._model.device, self._model.dtype
        )
        attention.install()
        await asyncio.to_thread(linears.arrange, self._model)
        manager = await asyncio.to_thread(self._new_manager)
        capacity = infer_max_single_request_tokens(manager.batch_processor.cache)
        self._bounds = replace(self._bounds, max_length=min(positions(self._model.config), capacity))
        # The generation thread inherits `daemon`, so that neither keeps a process alive that forgets to close.
        self._supervisor = threading.Thread(target=self._supervise, args=(manager,), name="engine", daemon=True)
        self._supervisor.start()
        await asyncio.to_thread(self._started.wait)
        try:
            await asyncio.gather(*map(self._try_out, _TRIALS))
        except EngineFailed as error:
            self.close()
            raise ModelError(f"the model cannot be run with continuous batching: {self._failure}") from error

    @property
    def healthy(self) -> bool:
        """Whether the generation thread is alive and takes requests."""
        manager = self._manager
        if manager is None or not manager.is_running():
            return False
        return manager.background_thread_status.can_accept_new_requests() is None

    @property
    def max_length(self) -> int:
        """Tokens that prompt and completion of one request may have together."""
        return self._bounds.max_length

    @property
    def in_flight(self) -> int:
        """Requests that are waiting or being generated."""
        return len(self._requests)

    def state(self) -> EngineState:
        """How the engine is doing now. Cheap: it is asked every second."""
        manager = self._manager
        processor = manager.batch_processor if manager else None
        if processor is None:
            counts = (self._prefix_queries, self._prefix_hits, self._restarts)
            return EngineState(0, len(self._requests), 0.0, *counts)
        scheduler = processor.scheduler
        running = min(len(scheduler.active_requests), len(self._requests))
        return EngineState(
            running=running,
            waiting=len(self._requests) - running,
            cache_usage=_usage(processor.cache),
            prefix_queries=self._prefix_queries + scheduler.prefix_queries,
            prefix_hits=self._prefix_hits + scheduler.prefix_hits,
            restarts=self._restarts,
        )

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what the model cannot read.

        Raises:
            InvalidRequest: the prompt is empty, has ids that are no tokens, or is longer than the model's context.
        """
        self._bounds.check_prompt(prompt_ids)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated, or would make a step of the loop raise.

        Raises:
            InvalidRequest: see `check_prompt`; or the prompt is too long for `params.max_tokens`, or a setting names
                ids that are no tokens.
        """
        self._bounds.check(prompt_ids, params)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[Delta]:
        """Generate from `prompt_ids`; the texts of the deltas joined are the completion, without any stop string.

        `emitted` is the beginning of a completion whose deltas were given out elsewhere: generation goes on behind it,
        and the deltas hold what comes then. Closing the iterator early, or cancelling the task that reads it, gives its
        slot and cache back.

        Raises:
            InvalidRequest: see `check`.
            Overloaded: too much waits; nothing was begun.
            EngineFailed: the engine stopped before the last delta, which is the one with a `finish_reason`.
        """
        self.check(prompt_ids, params)
        whole = [*prompt_ids, *emitted]
        self.check_prompt(whole)
        ends = self._eos.union(params.stop_token_ids)
        completion = Completion(self._tokenizer, prompt_ids, params, ends, emitted)
        if completion.finish_reason is not None:
            yield completion.extend(())
            return
        known = [token for token in ends if token < self._bounds.vocabulary]
        row = Row(params, len(prompt_ids), known, skipped=len(emitted))
        request = self._submit(whole, row, ends)
        given = 0
        try:
            while completion.finish_reason is None:
                arrived = await request.arrivals.get()
                if isinstance(arrived, EngineFailed):
                    raise arrived
                records = row.records[given : given + len(arrived)]
                given += len(arrived)
                yield completion.extend(arrived, [self._texts.logprob(record) for record in records])
        finally:
            self._forget(request)

    def close(self) -> None:
        """Stop the loop's thread; requests in flight fail. May be called twice."""
        self._closing.set()
        manager = self._manager
        if manager is not None:
            _stop(manager)
        if self._supervisor is not None:
            self._supervisor.join(timeout=30)

    def _submit(self, ids: list[int], row: Row, ends: Iterable[int]) -> _Request:
        manager = self._manager
        if manager is None:
            raise EngineFailed("the engine is restarting; send the request again")
        request = _Request(uuid.uuid4().hex, manager)
        self._admission.enter(request.id, row.prompt_tokens + row.params.max_tokens)
        # Registered first: output may come before add_request returns.
        self._requests[request.id] = request
        accepted = manager.add_request(
            ids,
            request_id=request.id,
            max_new_tokens=row.params.max_tokens - row.skipped,
            streaming=True,
            eos_token_id=list(ends),
            **{ROW: row},
        )
        if accepted is None:
            self._drop(request.id)
            raise EngineFailed("the engine is restarting; send the request again")
        return request

    def _drop(self, request_id: str) -> _Request | None:
        self._admission.leave(request_id)
        return self._requests.pop(request_id, None)

    def _forget(self, request: _Request) -> None:
        """Drop a request; where it has not ended by itself, have the loop free its slot and cache."""
        if self._drop(request.id) is not None:
            request.manager.cancel_request(request.id)

    def _receive(self, manager: ContinuousBatchingManager, outputs: Sequence[GenerationOutput]) -> None:
        """Hand outputs of the loop to their requests. Runs on the event loop."""
        for output in outputs:
            ended = output.is_finished()
            request = self._requests.get(output.request_id)
            if request is None:
                # The loop reads new requests before cancellations, so it can miss one that came right in between.
                if not ended:
                    manager.cancel_request(output.request_id)
                continue
            if ended:
                self._drop(request.id)
            if output.status == RequestStatus.FAILED:
                request.arrivals.put_nowait(_stopped())
            else:
                request.arrivals.put_nowait(output.generated_tokens[request.received :])
                request.received = len(output.generated_tokens)

    def _fail(self, manager: ContinuousBatchingManager) -> None:
        """Fail what `manager` left behind: requests added after it failed its own. Runs on the event loop."""
        for request in [request for request in self._requests.values() if request.manager is manager]:
            self._drop(request.id)
            request.arrivals.put_nowait(_stopped())

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function` on the event loop. Never raises: an error here would end the generation loop."""
        try:
            self._event_loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed; output is dropped")

    def _supervise(self, manager: ContinuousBatchingManager) -> None:
        """Keep a generation loop running until `close`. The body of the supervising thread."""
        while True:
            manager.start()
            self._manager = manager
            self._started.set()
            if self._closing.is_set():
                _stop(manager)
            manager.join(time.perf_counter())
            self._manager = None
            # A loop that was started again and closed has none; the reason is then the one before.
            self._failure = manager.background_thread_status.fatal_error or self._failure
            self._post(self._fail, manager)
            if self._closing.is_set():
                return
            logger.error("the generation loop ended (%s); starting a new one", type(self._failure).__name__)
            self._restarts += 1
            self._prefix_queries += manager.batch_processor.scheduler.prefix_queries
            self._prefix_hits += manager.batch_processor.scheduler.prefix_hits
            del manager
            gc.collect()
            try:
                manager = self._new_manager()
            except Exception:
                logger.exception("the generation loop cannot be started again; the engine stays down")
                return

    def _new_manager(self) -> ContinuousBatchingManager:
        """A manager with its cache allocated, not started."""
        manager = self._model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), self._batching
        )
        manager.logit_processor = Sampler()
        manager.output_router = _Router(lambda outputs: self._post(self._receive, manager, outputs))
        try:
            manager.warmup()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"the KV cache does not fit; lower serving.cache_tokens or serving.max_batch_tokens ({error})"
            ) from error
        return manager

    async def _try_out(self, params: SamplingParams) -> None:
        async for _ in self.generate([0], params):
            pass


class _Scheduler(FIFOScheduler):  # type: ignore[misc]  # transformers is not typed
    """First in, first out, also when requests leave by cancellation; counts what the prefix cache saves.

    When the cache overflows, transformers puts requests back and admits none until one finishes. A cancellation frees
    cache just as well, but is not counted: if all that still ran are cancelled, nothing is ever admitted again.
    """

    prefix_queries = 0
    prefix_hits = 0

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Remove cancelled requests, and admit waiting ones again if there were any."""
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled

    def _infer_request_tokens(self, state: RequestState, removed: set[str]) -> list[int]:
        """Where this finds a beginning of the prompt in the cache, the request begins."""
        was_pending = state.status == RequestStatus.PENDING
        tokens: list[int] = super()._infer_request_tokens(state, removed)
        if was_pending and state.status != RequestStatus.PENDING:
            self.prefix_queries += len(state.initial_tokens)
            self.prefix_hits += state.position_offset
        return tokens

    def _schedule_request(self, state: RequestState, tokens: list[int], budget: int, removed: set[str]) -> None:
        """Where nothing was found, the request begins here."""
        if state.status == RequestStatus.PENDING and self.cache.use_prefix_sharing:
            self.prefix_queries += len(tokens)
        super()._schedule_request(state, tokens, budget, removed)


SCHEDULER_MAPPING[_Scheduler.__name__] = _Scheduler


class _Router:
    """Passes all outputs on in one call and keeps none: no handler to leak, no queue that nobody reads.

    Interface: transformers.generation.continuous_batching.continuous_api.OutputRouter.
    """

    def __init__(self, receive: Callable[[Sequence[GenerationOutput]], None]) -> None:
        self._receive = receive

    def deliver(self, output: GenerationOutput) -> None:
        """Pass one output on."""
        self._receive([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Pass the outputs of one step on."""
        self._receive(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        """Pass on that a request failed."""
        state.status = RequestStatus.FAILED
        state.error = str(error)
        self._receive([state.to_generation_output()])


def _stopped() -> EngineFailed:
    return EngineFailed("the engine stopped while it worked on the request; send it again")


def _stop(manager: ContinuousBatchingManager) -> None:
    """Ask the loop to end after the step it is in. The supervising thread is the one that waits for it."""
    manager.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)


def _usage(cache: Any) -> float:
    """The share of the cache that requests hold. Blocks kept for prompts to come are free for any other use."""
    kept = sum(
        len(allocator.ledger.cached_blocks) * allocator.bytes_per_block for allocator in cache.cache_allocators.values()
    )
    return float(1 - cache.compute_free_capacity() - kept / (cache.num_sectors * cache.bytes_per_sector))


def token_ids(value: int | Sequence[int] | None) -> frozenset[int]:
    """The ids in a setting such as eos_token_id: one, several or none."""
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
