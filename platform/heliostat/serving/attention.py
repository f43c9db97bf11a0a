"""Attention of continuous batching on CPUs: each request attends to its own keys only. Knows no requests, only lengths.

transformers attends from the queries of all requests to the keys of all, behind a block-diagonal mask, so that a step
of n requests costs n times the work; and it copies the keys for every query head that shares them.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The keys of decoding requests are padded to the longest, unless that makes them more than so many times what they
# are; beyond, one call for each request is quicker.
MAX_PADDING = 2.0


def install() -> None:
    """Make transformers' `sdpa` attention use this one for continuous batching on CPUs; all else stays as it is."""
    AttentionInterface.register("sdpa", _attention)


@dataclass(frozen=True)
class _Span:
    """A request that is attended to alone: where its queries and keys are in the step."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """Shape (1, 1, queries, keys), added to the scores; None: there are as many queries as keys, and causal ones."""


@dataclass(frozen=True)
class _Plan:
    """How to attend in one step, the same for all layers."""

    step: list[torch.Tensor]
    """The list of read indices, which transformers makes anew for each step."""
    read_index: torch.Tensor
    """Tokens to read from the cache: first those of the decoding requests, padded to equal lengths. Empty: none."""
    decoding: int
    """Requests at the beginning that have one query each, and are attended to together."""
    longest: int
    mask: torch.Tensor | None
    """Shape (decoding, 1, 1, longest), added to the scores; None: all are as long."""
    spans: list[_Span]
    """The other requests."""
    scratch: torch.Tensor
    """Room for what is read, (2, tokens, heads, size). Fresh memory for each layer would cost more than the reading."""


_plans: WeakKeyDictionary[PagedAttentionCache, _Plan] = WeakKeyDictionary()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Interface: transformers.AttentionInterface. `query` is (1, heads, tokens, size); so is the result, transposed."""
    cache = kwargs.get("cache")
    if not isinstance(cache, PagedAttentionCache) or query.device.type != "cpu" or not _is_plain(cache, kwargs):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    plan = _plan(cache, key, attention_mask, kwargs)
    stored = cache.layer_to_allocator[module.layer_idx].get_cache_for_block_table(module.layer_idx)
    fresh = [states[0].transpose(0, 1) for states in (key, value)]
    keys, values = _update(plan, fresh, [pages.flatten(0, 1) for pages in stored], kwargs["write_index"][0])
    parts = [_alone(span, query, keys, values, scaling) for span in plan.spans]
    if plan.decoding:
        parts.insert(0, _decode(plan, query, keys, values, scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _is_plain(cache: PagedAttentionCache, kwargs: dict[str, Any]) -> bool:
    """Whether all layers see all keys, and nothing but their product with the query says how much they count."""
    return list(cache.cache_allocators) == [FULL_ATTENTION] and not {"position_bias", "softcap"} & kwargs.keys()


def _plan(cache: PagedAttentionCache, key: torch.Tensor, attention_mask: torch.Tensor, kwargs: dict[str, Any]) -> _Plan:
    """The plan of this step; made at its first layer. `key` is (1, heads, tokens, size)."""
    last = _plans.get(cache)
    if last is not None and last.step is kwargs["read_index"]:
        return last
    queries, keys = (bounds.tolist() for bounds in (kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][FULL_ATTENTION]))
    read_index = kwargs["read_index"][0]
    decoding = _count_decoding(queries, keys) if len(read_index) else 0
    read_index, longest, mask = _padded(read_index, keys[: decoding + 1], key.dtype)
    shift = decoding * longest - keys[decoding]
    spans = [
        _span(queries[i : i + 2], keys[i : i + 2], shift, attention_mask) for i in range(decoding, len(queries) - 1)
    ]
    scratch = key.new_empty(2, 0, key.shape[1], key.shape[3]) if last is None else last.scratch
    if scratch.shape[1] < len(read_index):
        scratch = key.new_empty(2, 1 << len(read_index).bit_length(), key.shape[1], key.shape[3])
    _plans[cache] = plan = _Plan(kwargs["read_index"], read_index, decoding, longest, mask, spans, scratch)
    return plan


def _count_decoding(queries: list[int], keys: list[int]) -> int:
    """Requests at the step's beginning that have one query each; 0 if they are too unlike for padding.

    `queries` and `keys` are the requests' bounds among all queries and keys of the step.
    """
    count = next((i for i in range(len(queries) - 1) if queries[i + 1] - queries[i] != 1), len(queries) - 1)
    longest = max((keys[i + 1] - keys[i] for i in range(count)), default=0)
    return count if count * longest <= MAX_PADDING * keys[count] else 0


def _padded(
    read_index: torch.Tensor, keys: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    """`read_index` with the keys of the first requests, whose bounds are `keys`, padded to the longest; its length; and
    the mask of what is padding.

    Padding reads a request's own first key: what others have must not matter, not even if it is not a number.
    """
    lengths = [end - start for start, end in pairwise(keys)]
    longest = max(lengths, default=0)
    if min(lengths, default=0) == longest:
        return read_index, longest, None
    positions = torch.arange(longest)
    beyond = positions >= torch.tensor(lengths)[:, None]
    rows = torch.tensor(keys[:-1])[:, None] + positions.masked_fill(beyond, 0)
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill(beyond, -torch.inf)
    return torch.cat([read_index[rows.flatten()], read_index[keys[-1] :]]), longest, mask[:, None, None]


def _span(queries: list[int], keys: list[int], shift: int, attention_mask: torch.Tensor) -> _Span:
    """A request with these bounds; its keys have moved by `shift` because of padding before them."""
    (start, end), (first, last) = queries, keys
    mask = None if end - start == last - first else attention_mask[:, :, start:end, first:last]
    return _Span(slice(start, end), slice(first + shift, last + shift), mask)


def _update(
    plan: _Plan, fresh: list[torch.Tensor], stored: list[torch.Tensor], write_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values to the cache, and read what the step attends to: (tokens, heads, size) each."""
    for new, place in zip(fresh, stored, strict=True):
        place.index_copy_(0, write_index, new)
    count = len(plan.read_index)
    if count == 0:
        return fresh[0], fresh[1]
    for place, room in zip(stored, plan.scratch, strict=True):
        torch.index_select(place, 0, plan.read_index, out=room[:count])
    return plan.scratch[0, :count], plan.scratch[1, :count]


def _decode(
    plan: _Plan, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of all decoding requests, (requests, heads, size). Heads that share keys count as so many queries."""
    n, (heads, size) = plan.decoding, keys.shape[1:]
    queries = query[0, :, :n].transpose(0, 1).reshape(n, heads, -1, size)
    k, v = (x[: n * plan.longest].view(n, plan.longest, heads, size).transpose(1, 2) for x in (keys, values))
    attended = scaled_dot_product_attention(queries, k, v, attn_mask=plan.mask, scale=scaling)
    return attended.reshape(n, -1, size)


def _alone(
    span: _Span, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of one request, (queries, heads, size)."""
    k, v = (x[span.keys].transpose(0, 1)[None] for x in (keys, values))
    attended = scaled_dot_product_attention(
        query[:, :, span.queries],
        k,
        v,
        attn_mask=span.mask,
        is_causal=span.mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != k.shape[1],
    )
    return attended[0].transpose(0, 1)
