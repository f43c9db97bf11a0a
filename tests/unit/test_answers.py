"""The wire forms of answers: the chunks of a stream, put together, say what a whole answer says."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from heliostat.serving.answers import ChatWire, Choice, CompletionWire, Usage
from heliostat.serving.calls import Delta, FinishReason, TokenLogprob

WORDS = ["the", " red", " cat", "."]


def token(text: str, logprob: float | None = -0.5, top: Sequence[tuple[str, float]] = ()) -> TokenLogprob:
    return TokenLogprob(7, text, logprob, tuple((number, *pair) for number, pair in enumerate(top)))


def deltas(words: Sequence[str] = WORDS, reason: FinishReason = "stop") -> list[Delta]:
    """One for each word, with a log-probability; the last has the finish reason."""
    last = len(words) - 1
    return [
        Delta(word, (n,), 3, n + 1, reason if n == last else None, (token(word, -n - 0.5, [(word, -n - 0.5)]),))
        for n, word in enumerate(words)
    ]


def choice_of(parts: Sequence[Delta]) -> Choice:
    choice = Choice()
    for part in parts:
        choice.add(part)
    return choice


def joined(pieces: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The lists of log-probabilities of a completion's pieces, one after the other."""
    found: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in piece["logprobs"].items():
            found.setdefault(name, []).extend(values)
    return found


def test_deltas_add_up_to_a_choice() -> None:
    choice = choice_of(deltas())
    assert (choice.text, choice.completion_tokens, choice.finish_reason) == ("the red cat.", 4, "stop")
    assert [each.text for each in choice.tokens] == WORDS
    assert choice.mean_logprob == -2.0
    assert Choice().mean_logprob == 0.0, "nothing generated, nothing known"
    assert Choice(tokens=[token("a", None), token("b", -3.0)]).mean_logprob == -3.0


def test_a_completion_has_openais_form() -> None:
    wire = CompletionWire("cron")
    answer = wire.answer([wire.choice(0, choice_of(deltas()))], Usage(3, 4))
    parsed = Completion.model_validate(json.loads(json.dumps(answer)), strict=True)
    assert (parsed.object, parsed.model, parsed.id[:5]) == ("text_completion", "cron", "cmpl-")
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens, parsed.usage.total_tokens) == (3, 4, 7)
    assert answer["choices"] == [{"index": 0, "text": "the red cat.", "logprobs": None, "finish_reason": "stop"}]


def test_a_chat_answer_has_openais_form() -> None:
    wire = ChatWire("cron", logprobs=True)
    answer = wire.answer([wire.choice(0, choice_of(deltas()))], Usage(3, 4))
    parsed = ChatCompletion.model_validate(json.loads(json.dumps(answer)), strict=True)
    assert (parsed.object, parsed.id[:9]) == ("chat.completion", "chatcmpl-")
    assert (parsed.choices[0].message.role, parsed.choices[0].message.content) == ("assistant", "the red cat.")
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [each.token for each in logprobs.content] == WORDS
    assert [each.logprob for each in logprobs.content] == [-0.5, -1.5, -2.5, -3.5]
    assert [each.top_logprobs[0].token for each in logprobs.content] == WORDS
    assert all(bytes(each.bytes or ()).decode() == each.token for each in logprobs.content)


def test_the_chunks_of_a_stream_share_their_id_and_time() -> None:
    for wire in (CompletionWire("cron"), ChatWire("cron")):
        first, second = wire.chunk([]), wire.chunk([wire.piece(0, deltas()[0])])
        assert {name: first[name] for name in ("id", "created", "model", "object")} == {
            name: second[name] for name in ("id", "created", "model", "object")
        }
    assert CompletionWire("cron").id != CompletionWire("cron").id
    ChatCompletionChunk.model_validate(second, strict=True)


def test_pieces_of_a_completion_add_up_to_the_whole_with_its_logprobs() -> None:
    whole = CompletionWire("cron", logprobs=True).choice(0, choice_of(deltas()))
    wire = CompletionWire("cron", logprobs=True)
    pieces = [wire.piece(0, delta) for delta in deltas()]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert joined(pieces) == whole["logprobs"]
    assert whole["logprobs"]["text_offset"] == [0, 3, 7, 11]
    assert [piece["finish_reason"] for piece in pieces] == [None, None, None, "stop"]


def test_offsets_are_those_of_each_choice_by_itself() -> None:
    wire = CompletionWire("cron", logprobs=True)
    pieces = [wire.piece(index, delta) for delta in deltas() for index in (0, 1)]
    for index in (0, 1):
        assert joined(pieces[index::2])["text_offset"] == [0, 3, 7, 11]


def test_the_prompt_opens_the_stream_of_each_of_its_choices() -> None:
    wire = CompletionWire("cron", logprobs=True)
    prompts = [(token("he", None), token("llo")), (token("x", None),)]
    pieces = wire.first_pieces(["hello", "x"], prompts, 2)
    assert [(piece["index"], piece["text"]) for piece in pieces] == [(0, "hello"), (1, "hello"), (2, "x"), (3, "x")]
    assert pieces[0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert pieces[0]["logprobs"]["top_logprobs"][0] is None
    assert wire.piece(1, deltas()[0])["logprobs"]["text_offset"] == [5]
    assert wire.piece(2, deltas()[0])["logprobs"]["text_offset"] == [1]
    assert CompletionWire("cron").first_pieces((), (), 3) == []


def test_a_chat_stream_opens_with_the_role_of_each_choice() -> None:
    pieces = ChatWire("cron").first_pieces((), (), 2)
    assert [piece["index"] for piece in pieces] == [0, 1]
    assert all(piece["delta"] == {"role": "assistant", "content": ""} for piece in pieces)
    assert all(piece["finish_reason"] is None and piece["logprobs"] is None for piece in pieces)


def test_a_chat_piece_without_text_has_an_empty_delta() -> None:
    wire = ChatWire("cron", logprobs=True)
    silent = Delta("", (4,), 3, 5, "stop", (token("<|im_end|>"),))
    piece = wire.piece(0, silent)
    assert piece["delta"] == {}
    assert piece["finish_reason"] == "stop"
    assert [each["token"] for each in piece["logprobs"]["content"]] == ["<|im_end|>"]


@pytest.mark.parametrize("asked", [False, True])
def test_logprobs_are_null_unless_asked_for(asked: bool) -> None:
    choice = choice_of(deltas())
    for wire in (CompletionWire("cron", logprobs=asked), ChatWire("cron", logprobs=asked)):
        assert (wire.choice(0, choice)["logprobs"] is not None) == asked
        assert (wire.piece(0, deltas()[0])["logprobs"] is not None) == asked


def test_the_picked_token_is_among_the_top_and_the_likeliest_of_one_text_counts() -> None:
    wire = CompletionWire("cron", logprobs=True)
    picked = token("c", -9.0, [("a", -0.1), ("\ufffd", -1.0), ("\ufffd", -2.0)])
    (top,) = wire.choice(0, Choice("c", [picked], 1, "stop"))["logprobs"]["top_logprobs"]
    assert list(top.items()) == [("a", -0.1), ("\ufffd", -1.0), ("c", -9.0)]


def test_a_token_that_is_part_of_a_character_has_no_bytes() -> None:
    wire = ChatWire("cron", logprobs=True)
    parts = [token("é"), token("\ufffd", -0.5, [("\ufffd", -0.5), ("e", -1.0)])]
    content = wire.choice(0, Choice("é", parts, 2, "stop"))["logprobs"]["content"]
    assert content[0]["bytes"] == [0xC3, 0xA9]
    assert content[1]["bytes"] is None
    assert [each["bytes"] for each in content[1]["top_logprobs"]] == [None, [0x65]]
