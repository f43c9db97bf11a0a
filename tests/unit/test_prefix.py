"""What comes before a prompt: the same for evaluation and serving, nothing where there is nothing, and not twice."""

import pytest

from heliostat.evaluation.prefix import KEY, PromptPrefix

PREFIX = PromptPrefix("Be brief.", (("2+2=", "4"), ("3+3=", "6")))
USER = {"role": "user", "content": "5+5="}
SHOTS = [
    {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6"},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("prefix", [PREFIX, PromptPrefix(), PromptPrefix("only"), PromptPrefix(None, (("a", "b"),))])
def test_a_manifest_brings_it_back(prefix: PromptPrefix) -> None:
    assert PromptPrefix.of({KEY: prefix.manifest()}) == prefix


@pytest.mark.parametrize("manifest", [None, {}, {KEY: None}])
def test_a_bundle_without_one_has_an_empty_one(manifest: object) -> None:
    assert PromptPrefix.of(manifest) == PromptPrefix()  # type: ignore[arg-type]
    assert PromptPrefix().text() == ""
    assert PromptPrefix().messages([USER]) == [USER]


def test_parts_of_a_text_are_apart_by_an_empty_line() -> None:
    assert PREFIX.text() == "Be brief.\n\n2+2=4\n\n3+3=6\n\n"


def test_a_first_question_gets_all_of_it() -> None:
    assert PREFIX.messages([USER]) == [SYSTEM, *SHOTS, USER]


def test_a_system_message_of_its_own_wins() -> None:
    own = {"role": "system", "content": "Be rude."}
    assert PREFIX.messages([own, USER]) == [own, *SHOTS, USER]


def test_a_conversation_under_way_is_its_own_example() -> None:
    turns = [USER, {"role": "assistant", "content": "10"}, {"role": "user", "content": "and twice?"}]
    assert PREFIX.messages(turns) == [SYSTEM, *turns]
