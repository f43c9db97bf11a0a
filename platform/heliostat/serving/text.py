"""Tokens to text, piece by piece, until a stop string. Knows tokenizers, not models or HTTP."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from heliostat.serving.calls import Delta, FinishReason, TokenLogprob
from heliostat.serving.sampler import Record
from heliostat.serving.sampling import SamplingParams

# Tokens of the prompt that decoding starts from: enough for any character or word boundary that spans the border.
_CONTEXT_TOKENS = 8
_INCOMPLETE = "\ufffd"
# A character has at most 4 bytes: bytes that are still none after this many tokens are garbage, and given out as such.
_LONGEST_WAIT = 32


class Detokenizer:
    """Decodes a growing list of tokens; the pieces joined are the decoded whole, and none holds half a character."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._done = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete and for special tokens."""
        self._ids.append(token_id)
        known = self._decode(self._ids[: self._done])
        text = self._decode(self._ids)
        incomplete = text.endswith(_INCOMPLETE) or len(text) <= len(known)
        if incomplete and len(self._ids) - self._done < _LONGEST_WAIT:
            return ""
        # Decoding starts at the last piece given out, not at the first, so that its cost stays that of a few tokens.
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first, also one that spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is safe to give out, and whether a stop string was found (then nothing may follow)."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back because a stop string might have followed."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


class TokenTexts:
    """The text of each token by itself, for log-probabilities. Bytes that are no character by themselves are U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop the space that a text begins with, so each token is decoded behind another.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._skip = len(self._decode(self._before))
        self._known: dict[int, str] = {}

    def of(self, token_id: int) -> str:
        """The text of one token; its name, if it is a special one."""
        if token_id not in self._known:
            self._known[token_id] = self._decode([*self._before, token_id])[self._skip :]
        return self._known[token_id]

    def logprob(self, record: Record) -> TokenLogprob:
        """A record of the sampler, with texts."""
        top = tuple((token, self.of(token), logprob) for token, logprob in record.top)
        return TokenLogprob(record.token_id, self.of(record.token_id), record.logprob, top)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class Completion:
    """Turns the tokens of one request into deltas, and decides where it ends."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        ends: frozenset[int],
        emitted: Sequence[int] = (),
        *,
        apart: bool = False,
    ) -> None:
        """`ends`: tokens that end a completion. `emitted`: tokens whose deltas have been given out already.

        `apart`: the completion is a text of its own, and does not go on from the prompt's.
        """
        self._detokenizer = Detokenizer(tokenizer, () if apart else prompt_ids)
        self._stops = StopStrings(params.stop)
        self._max_tokens = params.max_tokens
        self._ends = ends
        self._prompt_tokens = len(prompt_ids)
        self._tokens = 0
        self.finish_reason: FinishReason | None = None
        self.extend(emitted)

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Delta:
        """The delta of `token_ids`, up to the one that ends the completion."""
        pieces: list[str] = []
        used: list[int] = []
        for token in token_ids:
            if self.finish_reason:
                break
            used.append(token)
            pieces.append(self._add(token))
        shown = tuple(logprobs[: len(used)])
        return Delta("".join(pieces), tuple(used), self._prompt_tokens, self._tokens, self.finish_reason, shown)

    def finish(self, token_ids: Sequence[int]) -> Delta:
        """The delta of a completion that is over with `token_ids`, though none of them may say why."""
        delta = self.extend(token_ids)
        if self.finish_reason is None:
            self.finish_reason = "stop"
            delta = replace(delta, text=delta.text + self._stops.flush(), finish_reason="stop")
        return delta

    def _add(self, token: int) -> str:
        self._tokens += 1
        if token in self._ends:
            self.finish_reason = "stop"
            return self._stops.flush()
        text, stopped = self._stops.push(self._detokenizer.push(token))
        if stopped:
            self.finish_reason = "stop"
        elif self._tokens >= self._max_tokens:
            self.finish_reason = "length"
            text += self._stops.flush()
        return text
