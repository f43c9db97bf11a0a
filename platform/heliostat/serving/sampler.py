"""The engine's logits processor: picks a token for each request of a batch by that request's own settings.

Knows logits and transformers' continuous batching; no text, no HTTP. The order of what is done to the scores is that of
transformers: bias, penalties, minimum length, temperature, top-k, top-p, min-p.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from heliostat.serving.sampling import SamplingParams

ROW = "row"
"""Where a request's `Row` is in the keyword arguments of ContinuousBatchingManager.add_request."""
LOWEST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold; OpenAI's own stand-in."""

_FEW = 1024


class Record(NamedTuple):
    """A token that was picked, its log-probability, and the likeliest tokens in its place: (id, log-probability).

    The distribution is the model's own, before bias, penalties, temperature and cuts, as OpenAI and vLLM report it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class History:
    """How often each token was seen: (vocabulary,) in the completion, and whether in prompt or completion at all."""

    def __init__(self, prompt_tokens: int, vocabulary: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocabulary, device=device)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._prompt_tokens = prompt_tokens
        self._known = 0

    def follow(self, state: RequestState) -> None:
        """Add the tokens that came since the last call."""
        new = [*state.initial_tokens, *state.generated_tokens][self._known :]
        generated = new[max(0, self._prompt_tokens - self._known) :]
        self._known += len(new)
        self.seen[new] = True
        tokens = torch.tensor(generated, dtype=torch.long, device=self.counts.device)
        self.counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=self.counts.dtype))


@dataclass(eq=False)
class Row:
    """One request as the sampler sees it, and what the sampler keeps of it from step to step."""

    params: SamplingParams
    prompt_tokens: int
    ends: Sequence[int]
    """The tokens that end a completion: not before `min_tokens`."""
    records: list[Record] = field(default_factory=list)
    """One for each token that was generated in this engine, if the request asks for log-probabilities."""
    skipped: int = 0
    """Tokens of the completion that were generated elsewhere."""
    history: History | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.greedy = params.temperature == 0
        self.penalises = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self.adjusts = self.penalises or bool(params.logit_bias) or params.min_tokens > 0

    def __deepcopy__(self, _: Any) -> Self:
        """transformers copies a request's arguments when it takes its cache away; the request stays the same."""
        return self

    def generated(self, state: RequestState) -> int:
        """Tokens of the completion so far. A request that lost its cache has them in its prompt."""
        return len(state.initial_tokens) + len(state.generated_tokens) - self.prompt_tokens

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) that picks the token at `position` of the completion.

        With a seed it follows from that and the position alone, so that neither other requests nor a new start in the
        middle of the completion change it.
        """
        if self.params.seed is None:
            return random.getrandbits(48) / 2**48
        return random.Random(f"{self.params.seed}/{position}").getrandbits(48) / 2**48


class Sampler:
    """The logits processor of the engine, in place of transformers' own list of per-request processors.

    Theirs sees no tokens but the last, sorts the vocabulary twice for every token, greedy ones too, and lets one
    request's NaN logits end the step, and with it every request. This one returns scores whose argmax is the token, so
    that the manager must not sample (`do_sample=False`). Interface:
    transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessorList.
    """

    do_processing = True
    tensors_required = 0

    def __init__(self) -> None:
        self._batch: list[tuple[Row, RequestState]] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Settings were validated before admission."""

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """Nothing is kept in tensors."""

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Note the requests that get a token from the next scores: they are the first rows."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        self._batch = [(state.logit_processor_kwargs[ROW], state) for state in states]
        return arg_storage

    def __call__(self, _: torch.Tensor, scores: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        """Scores (n, vocabulary) whose argmax is the token of each request; changed in place.

        Rows beyond the requests that get a token are those of unfinished prompts: what is picked there is thrown away.
        """
        if all(row.greedy and not row.adjusts and row.params.logprobs is None for row, _ in self._batch):
            return scores
        wanted = [index for index, (row, _) in enumerate(self._batch) if row.params.logprobs is not None]
        logprobs = scores[wanted].log_softmax(dim=-1)
        for index, (row, state) in enumerate(self._batch):
            if row.adjusts:
                _adjust(scores[index], row, state)
        self._sample(scores)
        if wanted:
            self._record(wanted, logprobs, scores[wanted].argmax(dim=-1))
        return scores

    def _sample(self, scores: torch.Tensor) -> None:
        sampled = [index for index, (row, _) in enumerate(self._batch) if not row.greedy]
        if not sampled:
            return
        rows = [self._batch[index] for index in sampled]
        uniforms = [row.uniform(row.generated(state)) for row, state in rows]
        tokens = draw(scores[sampled], [row.params for row, _ in rows], uniforms)
        scores[sampled] = -torch.inf
        scores[sampled, tokens] = 0.0

    def _record(self, wanted: Sequence[int], logprobs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep the log-probabilities (m, vocabulary) of the m rows that want them."""
        rows = [self._batch[index] for index in wanted]
        most = max(row.params.logprobs or 0 for row, _ in rows)
        for (row, state), record in zip(rows, likeliest(logprobs, tokens.tolist(), most), strict=True):
            # A step that did not count is taken again.
            del row.records[row.generated(state) - row.skipped :]
            row.records.append(record._replace(top=record.top[: row.params.logprobs]))


def likeliest(logprobs: torch.Tensor, tokens: Sequence[int], top: int) -> list[Record]:
    """The records of n tokens and the `top` likeliest in their places, from log-probabilities (n, vocabulary)."""
    logprobs = logprobs.nan_to_num(LOWEST).clamp(min=LOWEST)
    values, ids = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[1]), dim=-1))
    own = logprobs.gather(1, torch.tensor(tokens, dtype=torch.long, device=logprobs.device)[:, None])[:, 0].tolist()
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    return [Record(*row) for row in zip(tokens, own, pairs, strict=True)]


def draw(scores: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> torch.Tensor:
    """The tokens (n,) that numbers from [0, 1) pick from scores (n, vocabulary), by inversion of the distribution.

    A row whose scores are broken, or whose temperature is too small to divide by, gets its likeliest token.
    """
    scaled = warp(scores, params)
    # In double precision, or a sum over a large vocabulary would shift the borders between tokens.
    heights = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    at = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * heights[:, -1:]
    picked = torch.searchsorted(heights, at, right=True)[:, 0].clamp(max=scores.shape[1] - 1)
    return torch.where(scaled.isnan().any(dim=-1), scores.argmax(dim=-1), picked)


def warp(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Scores (n, vocabulary) whose softmax is the distribution that each row samples from; NaN in broken rows."""

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device)[:, None]

    vocabulary = scores.shape[1]
    top_k = column([min(row.top_k or vocabulary, vocabulary) for row in params], torch.int64)
    top_p = column([row.top_p for row in params], scores.dtype)
    min_p = column([row.min_p for row in params], scores.dtype)
    temperature = column([row.temperature for row in params], scores.dtype)
    scaled = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    cut = ((top_k < vocabulary) | (top_p < 1))[:, 0]
    if bool(cut.any()):
        scaled[cut] = _cut_tail(scaled[cut], top_k[cut], top_p[cut])
    if bool((min_p > 0).any()):
        probabilities = scaled.softmax(dim=-1)
        unlikely = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(unlikely, -torch.inf)
    return scaled


def _cut_tail(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the `top_k` best tokens, and of these the fewest that together reach probability `top_p`.

    Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751. A few best tokens are nearly always enough to see where
    the cut is, and sorting a whole vocabulary takes ten times longer.
    """
    vocabulary = scores.shape[1]
    few = min(_FEW, vocabulary)
    ordered, order = scores.topk(few, dim=-1)
    total = scores.logsumexp(dim=-1, keepdim=True)
    mass = (ordered - total).exp().sum(dim=-1, keepdim=True)
    if not bool(((top_k <= few) | ((top_k == vocabulary) & (mass >= top_p))).all()):
        ordered, order = scores.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=scores.device) >= top_k, -torch.inf)
    total = torch.where(top_k < vocabulary, ordered.logsumexp(dim=-1, keepdim=True), total)
    probabilities = (ordered - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    cut = (before >= top_p) & (top_p < 1)
    cut[:, 0] = False
    return torch.full_like(scores, -torch.inf).scatter(1, order, ordered.masked_fill(cut, -torch.inf))


def _adjust(scores: torch.Tensor, row: Row, state: RequestState) -> None:
    """Bias, penalties and minimum length on the scores (vocabulary,) of one request, in place."""
    params = row.params
    if params.logit_bias:
        biases = torch.tensor([*params.logit_bias.values()], dtype=scores.dtype, device=scores.device)
        scores[[*params.logit_bias]] += biases
    if row.penalises:
        row.history = row.history or History(row.prompt_tokens, len(scores), scores.device)
        row.history.follow(state)
        penalty = params.repetition_penalty
        repeated = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores.copy_(torch.where(row.history.seen, repeated, scores))
        counts = row.history.counts
        scores -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if row.generated(state) < params.min_tokens:
        scores[[*row.ends]] = -torch.inf
