"""Worked examples are drawn by the seed, and have the form that a prefix needs."""

import pytest

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import questions

PAIRS = DataConfig(format="prompt_completion", prompt_template="{prompt} ->")
CHATS = DataConfig(format="chat")
ROWS = [Row({"prompt": f"p{number}", "completion": f" c{number}"}, f"r:{number}") for number in range(20)]


def chat(*turns: str) -> Row:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Row({"messages": messages}, "chats.jsonl:1")


def test_pairs_are_without_markup() -> None:
    assert questions.pair_of(ROWS[2], PAIRS) == ("p2 ->", " c2")
    row = chat("Be nice.", "hello", "hi", "how are you?", "well")
    assert questions.pair_of(row, CHATS) == ("how are you?", "well")
    with pytest.raises(DataError, match=r"chats\.jsonl:1: has no user's message with an answer"):
        questions.pair_of(chat("Be nice."), CHATS)


def test_the_seed_draws_different_rows() -> None:
    found = questions.few_shot(ROWS, PAIRS, 4, seed=1).few_shot
    assert found == questions.few_shot(ROWS, PAIRS, 4, seed=1).few_shot
    assert found != questions.few_shot(ROWS, PAIRS, 4, seed=2).few_shot
    assert len(set(found)) == 4
    assert set(found) <= {questions.pair_of(row, PAIRS) for row in ROWS}
    with pytest.raises(ConfigError, match=r"few_shot: 21 examples are more than the 20 training rows"):
        questions.few_shot(ROWS, PAIRS, 21, seed=1)
