"""What comes before every prompt: a system prompt and worked examples. Knows texts and messages, no data set or model.

A decoding search may choose it; the bundle then carries it in its manifest, and evaluation and serving put it before
every prompt that does not bring its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

KEY = "prompt_prefix"
"""Its place in the bundle's manifest: {"system_prompt": text or null, "few_shot": [[prompt, answer], ...]}."""


@dataclass(frozen=True)
class PromptPrefix:
    """A system prompt, and prompts with their right answers."""

    system_prompt: str | None = None
    few_shot: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, manifest: Mapping[str, Any] | None) -> Self:
        """The prefix that a bundle's manifest names; an empty one without."""
        found = (manifest or {}).get(KEY) or {}
        examples = tuple((str(prompt), str(answer)) for prompt, answer in found.get("few_shot", ()))
        return cls(found.get("system_prompt"), examples)

    def manifest(self) -> dict[str, Any]:
        """The form that `of` reads."""
        return {"system_prompt": self.system_prompt, "few_shot": [list(pair) for pair in self.few_shot]}

    def text(self) -> str:
        """What precedes a plain prompt: each part is followed by an empty line."""
        parts = [self.system_prompt] if self.system_prompt else []
        return "".join(f"{part}\n\n" for part in [*parts, *(prompt + answer for prompt, answer in self.few_shot)])

    def messages(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """The conversation with the prefix before it.

        Its own system message, if any, wins over the prefix's; examples come before a first question only, not before a
        conversation that is under way.
        """
        own = [message for message in messages[:1] if message["role"] == "system"]
        system = own or ([{"role": "system", "content": self.system_prompt}] if self.system_prompt else [])
        turns = messages[len(own) :]
        shots = [
            {"role": role, "content": text}
            for pair in (self.few_shot if len(turns) == 1 else ())
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*system, *shots, *turns]
