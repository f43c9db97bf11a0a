"""Text comes out in whole characters, all of it, and never any part of a stop string."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from heliostat.serving.calls import TokenLogprob
from heliostat.serving.sampler import Record
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.text import Completion, Detokenizer, StopStrings, TokenTexts
from tests import tiny

TEXTS = [
    "hello world",
    "naïve café ☕️ — 日本語のテキスト",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈!",
    "tabs\tand\n\nlines",
    "",
    " leading space",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text_and_none_is_half_a_character(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer("hello")["input_ids"])
    pieces = [detokenizer.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_come_out_as_decode_gives_them(tokenizer: Any) -> None:
    rng = random.Random(0)
    ids = [rng.randrange(2, 258) for _ in range(300)] + tokenizer(" hello")["input_ids"]
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(map(detokenizer.push, ids)).endswith(" hello")


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    ids = [tokenizer.convert_tokens_to_ids("<|im_start|>")] * 40 + tokenizer("hello")["input_ids"]
    assert "".join(map(detokenizer.push, ids)) == "hello"


def cut(text: str, stops: list[str]) -> str:
    """What may come out of `text`: read letter by letter, all before the stop string that is complete first."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_stop_strings_cut_alike_however_the_text_is_split() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 30)))
        stops = ["".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(0, 4))]
        filter_, out, stopped, rest = StopStrings(stops), "", False, text
        while rest and not stopped:
            size = rng.randrange(1, 4)
            piece, stopped = filter_.push(rest[:size])
            rest = rest[size:]
            out += piece
            assert cut(text, stops).startswith(out)
        assert stopped == any(stop in text for stop in stops)
        assert out + ("" if stopped else filter_.flush()) == cut(text, stops)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    stops = StopStrings(["\n\n", "END"])
    assert stops.push("one E") == ("one ", False)
    assert stops.push("ND") == ("", True)
    stops = StopStrings(["\n\n"])
    assert stops.push("a\n") == ("a", False)
    assert stops.push("b\n") == ("\nb", False)
    assert stops.flush() == "\n"


def completion(tokenizer: Any, text: str, **settings: Any) -> tuple[str, Completion, int]:
    """A completion fed with the tokens of `text` at once: its text, itself, and the number of tokens given."""
    params = SamplingParams(**{"max_tokens": 100, **settings})
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = Completion(tokenizer, [5], params, frozenset({tokenizer.eos_token_id}))
    return parts.extend(ids).text, parts, len(ids)


def test_a_completion_ends_at_eos_stop_string_or_limit(tokenizer: Any) -> None:
    text, ended, _ = completion(tokenizer, "hello<|endoftext|> world")
    assert (text, ended.finish_reason) == ("hello", "stop")
    text, ended, _ = completion(tokenizer, "hello world, more", stop=("wor",))
    assert (text, ended.finish_reason) == ("hello ", "stop")
    text, ended, count = completion(tokenizer, "hello w", stop=("world",), max_tokens=3)
    assert count >= 3
    assert ended.finish_reason == "length"
    text, ended, count = completion(tokenizer, "hello w", stop=("world",))
    assert ended.finish_reason is None
    assert ended.extend([tokenizer.eos_token_id]).text == "w"
    assert text == "hello "


def test_a_completion_that_is_over_says_so_even_if_no_token_does(tokenizer: Any) -> None:
    ids = tokenizer("hello w", add_special_tokens=False)["input_ids"]
    for params, text in [(SamplingParams(100), "hello w"), (SamplingParams(100, stop=("world",)), "hello w")]:
        delta = Completion(tokenizer, [5], params, frozenset()).finish(ids)
        assert (delta.text, delta.finish_reason, delta.completion_tokens) == (text, "stop", len(ids))
    delta = Completion(tokenizer, [5], SamplingParams(len(ids)), frozenset()).finish([*ids, 1, 1])
    assert (delta.text, delta.finish_reason, delta.completion_tokens) == ("hello w", "length", len(ids))


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("naïve — 日本語 👩‍👩‍👧‍👦 text", ()),
        ("one two\n\nthree", ("\n\n",)),
        ("one twoEN and EN", ("END",)),
        ("日本語のテキスト 日本", ("本語!", "ト 日本語")),
        ("hello<|endoftext|> world", ("hello w",)),
    ],
)
def test_a_completion_goes_on_wherever_it_was_cut(tokenizer: Any, text: str, stop: tuple[str, ...]) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for params in (SamplingParams(len(ids), stop=stop), SamplingParams(len(ids) + 5, stop=stop)):
        ends = frozenset({tokenizer.eos_token_id})
        unbroken = Completion(tokenizer, [5], params, ends)
        deltas = [unbroken.extend([token]) for token in ids]
        for cut in range(len(ids) + 1):
            later = Completion(tokenizer, [5], params, ends, emitted=ids[:cut])
            rest = [later.extend([token]) for token in ids[cut:]]
            assert rest == deltas[cut:], cut
            assert later.finish_reason == unbroken.finish_reason


def test_a_delta_holds_the_logprobs_of_its_tokens_and_of_no_more(tokenizer: Any) -> None:
    ids = [*tokenizer("hello", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 40, 41]
    logprobs = [TokenLogprob(token, "x", -1.0) for token in ids]
    parts = Completion(tokenizer, [5], SamplingParams(50), frozenset({tokenizer.eos_token_id}))
    delta = parts.extend(ids, logprobs)
    assert delta.token_ids == tuple(ids[:-2])
    assert [each.token_id for each in delta.logprobs] == ids[:-2]


def test_the_texts_of_the_tokens_joined_are_the_text(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    text = " the red cat goes\n\nto market"
    assert "".join(map(texts.of, tokenizer(text, add_special_tokens=False)["input_ids"])) == text
    assert texts.of(tokenizer.eos_token_id) == "<|endoftext|>"
    assert texts.logprob(Record(tokenizer.eos_token_id, -0.5, ((65, -0.25),))) == TokenLogprob(
        tokenizer.eos_token_id, "<|endoftext|>", -0.5, ((65, texts.of(65), -0.25),)
    )


def test_the_space_before_a_word_is_not_lost_where_a_tokenizer_drops_leading_ones() -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁the": 2, "cat": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert wrapped.decode([2]) == "the"
    assert [TokenTexts(wrapped).of(token) for token in (2, 3)] == [" the", "cat"]
