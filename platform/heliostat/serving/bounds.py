"""What a model can read and go on from: how many tokens, and which. Knows numbers, neither models nor engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heliostat.serving.sampling import InvalidRequest, SamplingParams


@dataclass(frozen=True)
class Bounds:
    """The limits of one model in one engine."""

    vocabulary: int
    """Token ids are below it."""
    max_length: int
    """Tokens that prompt and completion of one request may have together."""

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what the model cannot read.

        Raises:
            InvalidRequest: the prompt is empty, has ids that are no tokens, or is longer than the model's context.
        """
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty; it must have at least one token", "prompt")
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in prompt_ids):
            raise InvalidRequest(f"the prompt has ids that are not tokens (0 to {self.vocabulary - 1})", "prompt")
        if len(prompt_ids) > self.max_length:
            raise self._too_long(f"the prompt has {len(prompt_ids)}", "prompt")

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated, or would make a step of an engine raise.

        Raises:
            InvalidRequest: see `check_prompt`; or the prompt is too long for `params.max_tokens`, or a setting names
                ids that are no tokens.
        """
        self.check_prompt(prompt_ids)
        if len(prompt_ids) + params.max_tokens > self.max_length:
            asked = f"the prompt has {len(prompt_ids)}, and max_tokens asks for {params.max_tokens} more"
            raise self._too_long(asked, "prompt" if len(prompt_ids) >= self.max_length else "max_tokens")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if not all(0 <= token < self.vocabulary for token in ids):
                raise InvalidRequest(f"`{name}` has ids that are not tokens (0 to {self.vocabulary - 1})", name)

    def _too_long(self, asked: str, param: str) -> InvalidRequest:
        # LiteLLM knows the error by OpenAI's sentence, LangChain by the code where it is part of the text.
        code = "context_length_exceeded"
        message = f"this model's maximum context length is {self.max_length} tokens: {asked} ({code})"
        return InvalidRequest(message, param, code)


def positions(config: Any) -> int:
    """The longest sequence of a model. Architectures without absolute positions give no such number."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1)
