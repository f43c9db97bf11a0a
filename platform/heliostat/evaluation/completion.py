"""Complete plain prompts with a loaded model, as a user would ask it. Knows the bundle's prompt form; no data sets."""

import string
from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig, TextStreamer

from heliostat.data.tokens import leading_bos, text_ids
from heliostat.errors import ConfigError
from heliostat.evaluation.generate import batches, changed_config, decode, generate, generate_batch
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models.base import InferenceModel


def complete(
    loaded: InferenceModel, prompts: Sequence[str], settings: dict[str, Any], *, batch_size: int = 8, seed: int = 0
) -> list[str]:
    """The continuation of each prompt, by the model's decoding defaults with `settings` (transformers' names) on top.

    A prompt becomes a user's message where the model was trained on chats, fills the bundle's prompt template where
    that has one gap, and is taken as it is otherwise. The bundle's prompt prefix comes before it. A stop string and
    what follows it are no part of the continuation.
    """
    config = changed_config(loaded.model, settings)
    outputs = generate(
        loaded.model,
        [encode_prompt(loaded, prompt) for prompt in prompts],
        config=config,
        pad_token_id=loaded.tokenizer.pad_token_id,
        batch_size=batch_size,
        seed=seed,
        tokenizer=loaded.tokenizer,
    )
    return decode(loaded.tokenizer, outputs, config)


def stream(
    loaded: InferenceModel, prompt: str, settings: dict[str, Any], write: Callable[[str], None], *, seed: int = 0
) -> str:
    """What `complete` gives for one prompt, written piece by piece as it comes.

    Raises:
        ConfigError: beams are asked for, of which no text is certain before the end.
    """
    config = changed_config(loaded.model, settings)
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"num_beams={config.num_beams} cannot be streamed; leave --stream out, or set num_beams=1")
    ids = [encode_prompt(loaded, prompt)]
    (batch,) = batches(loaded.model, ids, config, 1)
    streamer = _Streamer(loaded.tokenizer, config, write)
    options = {"pad_token_id": loaded.tokenizer.pad_token_id, "tokenizer": loaded.tokenizer}
    generate_batch(loaded.model, ids, batch, config=config, seed=seed, streamer=streamer, **options)
    return streamer.written


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Writes what is certain: text that may yet become a stop string is held back."""

    def __init__(self, tokenizer: Any, config: GenerationConfig, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stops = config.stop_strings or []
        self._stops = [stops] if isinstance(stops, str) else stops
        self._held_back = max(map(len, self._stops), default=1) - 1
        self._write = write
        self._text = ""
        self.written = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with text that no later token changes."""
        self._text += text
        end = min((self._text.find(stop) for stop in self._stops if stop in self._text), default=len(self._text))
        stopped = end < len(self._text)
        certain = self._text[: end if stopped or stream_end else max(end - self._held_back, 0)]
        if len(certain) > len(self.written):
            self._write(certain[len(self.written) :])
            self.written = certain


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
    if loaded.task == "seq2seq":
        return text_ids(tokenizer, [text])[0]
    ids = leading_bos(tokenizer) + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty; the model needs at least one token to go on from")
    return list(ids)


def fill(template: str | None, prompt: str) -> str:
    """The template with `prompt` in its only gap; the prompt itself where there is no template, or more gaps."""
    gaps = [name for _, name, _, _ in string.Formatter().parse(template or "") if name]
    return template.format(**{gaps[0]: prompt}) if template and len(gaps) == 1 else prompt
