"""Complete plain prompts with a loaded model, as a user would ask it. Knows the bundle's prompt form; no data sets."""

import string
from collections.abc import Sequence
from typing import Any

from heliostat.data.tokens import leading_bos
from heliostat.errors import ConfigError
from heliostat.evaluation.generate import decode, generate
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models.base import InferenceModel


def complete(
    loaded: InferenceModel, prompts: Sequence[str], settings: dict[str, Any], *, batch_size: int = 8
) -> list[str]:
    """The continuation of each prompt, by the model's decoding defaults with `settings` (transformers' names) on top.

    A prompt becomes a user's message where the model was trained on chats, fills the bundle's prompt template where
    that has one gap, and is taken as it is otherwise. The bundle's prompt prefix comes before it. A stop string and
    what follows it are no part of the continuation.
    """
    from transformers import GenerationConfig

    config = GenerationConfig.from_dict({**loaded.model.generation_config.to_dict(), **settings})
    outputs = generate(
        loaded.model,
        [encode_prompt(loaded, prompt) for prompt in prompts],
        config=config,
        pad_token_id=loaded.tokenizer.pad_token_id,
        batch_size=batch_size,
        tokenizer=loaded.tokenizer,
    )
    return decode(loaded.tokenizer, outputs, config)


def encode_prompt(loaded: InferenceModel, prompt: str) -> list[int]:
    """Token ids of one prompt, after the bundle's prefix, in the form that the model was trained on."""
    tokenizer, manifest = loaded.tokenizer, loaded.manifest or {}
    prefix = PromptPrefix.of(manifest)
    is_chat = manifest.get("format") == "chat" or (not manifest and tokenizer.chat_template)
    if is_chat:
        messages = prefix.messages([{"role": "user", "content": prompt}])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = prefix.text() + fill(manifest.get("prompt_template"), prompt)
    ids = leading_bos(tokenizer) + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty; the model needs at least one token to go on from")
    return list(ids)


def fill(template: str | None, prompt: str) -> str:
    """The template with `prompt` in its only gap; the prompt itself where there is no template, or more gaps."""
    gaps = [name for _, name, _, _ in string.Formatter().parse(template or "") if name]
    return template.format(**{gaps[0]: prompt}) if template and len(gaps) == 1 else prompt
