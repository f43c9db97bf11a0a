"""How tokens are chosen, per request: what may be asked for, the bundle's defaults, and the engine's sampler.

Knows logits and transformers' names of settings, not text or HTTP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState

from heliostat.errors import ModelError, UserError

Settings = dict[str, Any]
# Decoding settings that only `generate()` can honour (see serving/lane.py), with the values that mean "off".
_BEAMS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
}
_SAMPLED_ONLY: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
}
_GENERATE_ONLY: dict[str, tuple[Any, ...]] = {
    **_BEAMS,
    **_SAMPLED_ONLY,
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}
# What nothing here can do: it needs code from the hub, a clock, a second model, or the text itself.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "num_return_sequences": (None, 1),
}


class InvalidRequest(UserError):
    """A generation request that is wrong in itself; `param` names the setting, `code` the kind of mistake."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation. `temperature` 0 is greedy decoding; `top_k` 0 and `top_p` 1.0 cut nothing off.

    Raises:
        InvalidRequest: a value has the wrong type or is out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    extra: Settings = field(default_factory=dict)
    """Settings by transformers' names that continuous batching cannot honour; only a bundle brings them."""

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an integer of at least 1")
        _require(_is_real(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "an integer of at least 0")
        _require(_is_real(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        _require(all(isinstance(text, str) and text for text in self.stop), "stop", "non-empty strings")

    def row(self, vocab_size: int) -> dict[str, Any]:
        """The settings as `Sampler` reads them: greedy is the one most likely token at temperature 1."""
        if self.temperature == 0:
            return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
        return {
            "temperature": float(self.temperature),
            "top_k": min(self.top_k or vocab_size, vocab_size),
            "top_p": float(self.top_p),
        }


@dataclass(frozen=True)
class DecodingDefaults:
    """What a model's generation_config.json says about requests that leave a setting open."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    extra: Settings = field(default_factory=dict)

    @classmethod
    def of(cls, generation_config: Any) -> Self:
        """The defaults in a transformers GenerationConfig, read as `generate()` reads them.

        Raises:
            ModelError: a value is wrong, or asks for what cannot be done here, which must not be ignored silently.
        """
        given = generation_config.to_dict()
        for name, off in _UNSUPPORTED.items():
            if given.get(name) not in off:
                raise ModelError(
                    f"generation_config.json: the endpoint cannot decode with {name}={given[name]}; "
                    f"remove {name} there, or search decoding settings again without it"
                )
        values: Settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        if given.get("do_sample"):
            standard = generation_config._get_default_generation_params()
            values = {name: standard[name] if given.get(name) is None else given[name] for name in _SAMPLED}
        stop = given.get("stop_strings") or ()
        defaults = cls(
            max_tokens=given.get("max_new_tokens"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            extra=_extra(given),
            **values,
        )
        try:
            defaults.params(defaults.max_tokens or 1)
        except InvalidRequest as error:
            raise ModelError(f"generation_config.json: {error}") from error
        return defaults

    def params(
        self,
        max_tokens: int,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] | None = None,
    ) -> SamplingParams:
        """The settings of a request: its own, and these where it leaves one open.

        What a request sets replaces that setting alone, except where the two contradict each other. At temperature 0
        nothing is sampled, so the bundle's min_p, typical_p and the like are off. A temperature above 0 on a bundle
        tuned for beam search samples without beams: beams look for the likeliest text, which is not what the request
        wants. On a bundle that itself samples with beams it only replaces the temperature.

        Raises:
            InvalidRequest: a value has the wrong type or is out of range.
        """
        heat = self.temperature if temperature is None else temperature
        off = _SAMPLED_ONLY if heat == 0 else _BEAMS if self.temperature == 0 else {}
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=heat,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            stop=self.stop if stop is None else tuple(stop),
            extra={name: value for name, value in self.extra.items() if name not in off},
        )


def _extra(given: Settings) -> Settings:
    """The settings of a generation config that only `generate()` can honour."""
    found = {name: given[name] for name, off in _GENERATE_ONLY.items() if given.get(name) not in off}
    return found if "num_beams" in found else {name: found[name] for name in found.keys() - _BEAMS.keys()}


_SAMPLED = ("temperature", "top_k", "top_p")


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise InvalidRequest(f"`{name}` must be {what}", name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Sampler:
    """The logits processor of the engine, in place of transformers' own list of per-request processors.

    Theirs sorts the vocabulary twice for every token, greedy ones too; breaks ties between equally likely tokens at
    random even for top_k=1, so that half-precision greedy output differs from `generate()`; and lets one request's
    NaN logits end the step, and with it every request. Interface:
    transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessorList.
    """

    do_processing = True
    tensors_required = 3

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Settings were validated before admission."""

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """Set `storage` (3, 1) for rows of scores that nobody asked for, those of unfinished prompts: greedy."""
        storage.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Write the settings of the requests that get a token into the first columns of `arg_storage`, (3, m) int32."""
        rows = [request.state.logit_processor_kwargs for request in requests_in_batch if request.has_new_token]
        for index, (name, dtype) in enumerate(_ROWS):
            values = torch.tensor([row[name] for row in rows], dtype=dtype)
            arg_storage[index, : len(rows)] = values.view(torch.int32).to(arg_storage.device)
        return arg_storage

    def __call__(self, _: torch.Tensor, scores: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
        """Scores (n, vocabulary) whose softmax is the distribution that each request samples from."""
        columns = settings[:, : scores.shape[0]]
        temperature, top_k, top_p = (columns[i].view(dtype)[:, None] for i, (_, dtype) in enumerate(_ROWS))
        best = torch.full_like(scores, -torch.inf).scatter_(1, scores.argmax(dim=-1, keepdim=True), 0.0)
        greedy = top_k <= 1
        if bool(greedy.all()):
            return best
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
        if bool(((top_k < scores.shape[1]) | (top_p < 1)).any()):
            scaled = _cut_tail(scaled, top_k, top_p)
        return torch.where(greedy | scaled.isnan().any(dim=-1, keepdim=True), best, scaled)


_ROWS = (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32))


def _cut_tail(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the `top_k` best tokens, and of these the fewest that together reach probability `top_p`.

    The order, temperature then top-k then top-p, is that of transformers. Nucleus sampling: Holtzman et al. 2020,
    arXiv:1904.09751.
    """
    ordered, order = scores.sort(dim=-1, descending=True)
    beyond = torch.arange(scores.shape[1], device=scores.device) >= top_k
    ordered = ordered.masked_fill(beyond, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    cut = (before >= top_p) & (top_p < 1)
    cut[:, 0] = False
    return torch.full_like(scores, -torch.inf).scatter(1, order, ordered.masked_fill(cut, -torch.inf))
