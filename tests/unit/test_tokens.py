"""Rows -> ids and masks. The invariant above all: what is served as a prompt is the prefix that was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from heliostat.data import tokens
from heliostat.data.config import DataConfig
from heliostat.data.formats import CHATML, chat_template, prompt_of
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder, Encoded, TokenDataset, encode
from heliostat.errors import DataError, ModelError
from heliostat.models.scratch import train_tokenizer

CORPUS = ["Label: ham Label: spam the quick brown fox jumps over the lazy dog\n\n user assistant hello"] * 20
ANSWERS = ["ham", " spam", "\nnext line", "\n\n two", "x", " ", "  indented"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(CORPUS, 400, 512, chat=True)
    made.chat_template = CHATML
    return made


@pytest.fixture
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, putting bos before plain text as Llama does."""
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def config(format: str = "prompt_completion", **values: Any) -> DataConfig:  # noqa: A002
    return DataConfig.model_validate({"format": format, **values})


def pairs(*values: tuple[str, str]) -> list[Row]:
    return [Row({"prompt": prompt, "completion": answer}, f"f:{i}") for i, (prompt, answer) in enumerate(values, 1)]


def dialogues() -> list[Row]:
    rows = []
    for index, answer in enumerate(ANSWERS):
        messages = []
        for turn in range(1 + index % 3):
            messages += [{"role": "user", "content": f"{answer}{turn}"}, {"role": "assistant", "content": f"{answer}x"}]
        rows.append(Row({"messages": messages}, f"f:{index}"))
    return rows


def open_documents(encoded: Encoded, folder: Path) -> list[tuple[list[int], list[bool]]]:
    encoded.save(folder, "train")
    data = TokenDataset.open(folder)
    documents = [data.document(index) for index in range(len(data))]
    return [(ids.tolist(), mask.tolist()) for ids, mask in documents]


def check_prompts_are_prefixes(rows: Sequence[Row], tokenizer: Any, settings: DataConfig, folder: Path) -> None:
    documents = open_documents(encode(rows, tokenizer, settings), folder)
    template = chat_template(tokenizer, settings)
    prompts = [prompt_of(row, settings, template)[0] for row in rows]
    for ids, (document, mask) in zip(DocumentEncoder(tokenizer, settings).prompts(prompts), documents, strict=True):
        assert document[: len(ids)] == ids
        assert all(mask[len(ids) :])
        assert len(document) > len(ids)


def test_served_prompts_are_the_trained_prefixes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = pairs(*[("Label:", answer) for answer in ANSWERS if answer.strip()], ("", "no prompt"), ("the qu", "ick"))
    check_prompts_are_prefixes(rows, tokenizer, config(), tmp_path / "plain")
    # Not vacuous: tokenising prompt and completion at once does merge across the border.
    whole = tokenizer("the quick")["input_ids"]
    parts = [tokenizer(part)["input_ids"] for part in ("the qu", "ick")]
    assert whole != parts[0] + parts[1]


def test_the_same_with_a_leading_bos(with_bos: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = pairs(("Label:", "ham"), ("", "hello"))
    check_prompts_are_prefixes(rows, with_bos, config(), tmp_path / "bos")
    documents = open_documents(encode(rows, with_bos, config()), tmp_path / "again")
    assert all(ids[0] == with_bos.bos_token_id and not mask[0] for ids, mask in documents)
    chats = open_documents(encode(dialogues()[:1], with_bos, config("chat")), tmp_path / "chat")
    assert chats[0][0][0] == with_bos.convert_tokens_to_ids("<|im_start|>")


def test_served_dialogues_are_the_trained_prefixes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [row for row in dialogues() if row.fields["messages"][-1]["content"].strip()]
    check_prompts_are_prefixes(rows, tokenizer, config("chat"), tmp_path / "chat")
    # A server tokenises the rendered history in one piece: the trained prefix is that, for every number of turns.
    for row, (ids, _) in zip(
        rows, open_documents(encode(rows, tokenizer, config("chat")), tmp_path / "c"), strict=True
    ):
        served = tokenizer.apply_chat_template(
            row.fields["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(served)] == served


def learned_text(tokenizer: Any, document: tuple[list[int], list[bool]]) -> str:
    text: str = tokenizer.decode([token for token, learn in zip(*document, strict=True) if learn])
    return text


def test_masks_cover_the_answers_their_end_tokens_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "the quick"},
        {"role": "assistant", "content": " brown fox  "},
        {"role": "user", "content": "jumps"},
        {"role": "assistant", "content": "over ünd"},
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "dog"},
    ]
    documents = open_documents(encode([Row({"messages": messages}, "f:1")], tokenizer, config("chat")), tmp_path / "c")
    ends = "<|im_end|>"
    learned = f" brown fox  {ends}over ünd{ends}dog{ends}<|endoftext|>"
    assert learned_text(tokenizer, documents[0]) == learned
    documents = open_documents(encode(pairs(("the quick", " fox")), tokenizer, config()), tmp_path / "p")
    assert learned_text(tokenizer, documents[0]) == " fox<|endoftext|>"
    everything = config("chat", train_on_inputs=True)
    documents = open_documents(encode([Row({"messages": messages}, "f:1")], tokenizer, everything), tmp_path / "all")
    assert all(documents[0][1])


def test_eos_ends_every_document_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    eos = tokenizer.eos_token_id
    for name, (rows, settings) in {
        "text": ([Row({"text": "hello"}, "f:1")], config("text")),
        "chat": (dialogues()[:3], config("chat")),
        "pairs": (pairs(("a", "b")), config()),
    }.items():
        for ids, mask in open_documents(encode(rows, tokenizer, settings), tmp_path / name):
            assert ids.count(eos) == 1
            assert ids[-1] == eos
            assert mask[-1]
    tokenizer.eos_token = "<|im_end|>"
    for ids, _ in open_documents(encode(dialogues()[:1], tokenizer, config("chat")), tmp_path / "own"):
        assert ids[-1] == tokenizer.eos_token_id != ids[-2]


@pytest.mark.parametrize("format", ["text", "prompt_completion", "alpaca"])
def test_special_tokens_in_plain_text_stay_text(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    format: str,  # noqa: A002
) -> None:
    text = "a<|endoftext|><|im_end|>b"
    fields = dict.fromkeys(("text", "prompt", "completion", "instruction", "output"), text)
    settings = config(format)
    (ids, _), *_ = open_documents(encode([Row(fields, "f:1")], tokenizer, settings), tmp_path / "d")
    special = set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert special.isdisjoint(ids[:-1])
    assert text in tokenizer.decode(ids[:-1])


def test_long_text_is_split_into_nearly_equal_pieces(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "the quick brown fox " * 50
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    # A limit that leaves a remainder of one token.
    encoded = encode([Row({"text": text}, "f:1")], tokenizer, config("text", max_length=len(whole) - 1))
    documents = open_documents(encoded, tmp_path / "t")
    assert len(documents) == 2
    assert documents[0][0] + documents[1][0] == whole
    assert abs(len(documents[0][0]) - len(documents[1][0])) <= 1
    assert encoded.counts.truncated == encoded.counts.dropped == 0
    assert encoded.counts.supervised_tokens == len(whole) - 2


def test_long_samples_follow_the_strategy(tokenizer: PreTrainedTokenizerFast) -> None:
    long = "the quick brown fox " * 10
    rows = pairs(("short", "one"), ("short", long), (long, "unreachable"))
    with pytest.raises(DataError, match=r"f:2: its \d+ tokens exceed data\.max_length: 16 \(2 of 3 rows do, .*drop"):
        encode(rows, tokenizer, config(max_length=16))
    cut = encode(rows, tokenizer, config(max_length=16, excess_length_strategy="truncate"))
    assert (cut.counts.documents, cut.counts.truncated, cut.counts.dropped) == (2, 1, 1)
    assert np.diff(cut.offsets)[1] == 16
    left = encode(rows, tokenizer, config(max_length=16, excess_length_strategy="drop"))
    assert (left.counts.documents, left.counts.truncated, left.counts.dropped) == (1, 0, 2)
    with pytest.raises(DataError, match=r"none of the 1 rows fits data\.max_length: 16"):
        encode(rows[2:], tokenizer, config(max_length=16, excess_length_strategy="truncate"))


def test_counts_lengths_and_labels_agree(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = pairs(*[("the quick" * (i % 3), "brown fox " * (1 + i % 5)) for i in range(30)])
    encoded = encode(rows, tokenizer, config())
    documents = open_documents(encoded, tmp_path / "d")
    data = TokenDataset.open(tmp_path / "d")
    assert data.lengths.tolist() == [len(ids) for ids, _ in documents]
    assert data.label_counts.tolist() == [sum(mask[1:]) for _, mask in documents]
    assert data.meta == {
        "split": "train",
        "rows": 30,
        "documents": 30,
        "tokens": sum(map(len, (ids for ids, _ in documents))),
        "supervised_tokens": int(data.label_counts.sum()),
        "truncated": 0,
        "dropped": 0,
    }


def test_chunks_do_not_change_the_result(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dialogues()[:5]
    whole = encode(rows, tokenizer, config("chat", train_on_inputs=True))
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 2)
    chunked = encode(rows, tokenizer, config("chat", train_on_inputs=True))
    for name in tokens.ARRAYS:
        assert np.array_equal(getattr(whole, name), getattr(chunked, name))


def test_unfit_tokenizers_and_damaged_folders_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        encode(pairs(("a", "b")), tokenizer, config())
    with pytest.raises(DataError, match="delete the folder"):
        TokenDataset.open(tmp_path)


def translations(*values: tuple[str, str]) -> list[Row]:
    return [Row({"source": source, "target": target}, f"f:{i}") for i, (source, target) in enumerate(values, 1)]


def test_a_source_and_its_target_end_each_by_itself(tmp_path: Path) -> None:
    made = train_tokenizer(CORPUS, 400, 512, ends=True)
    rows = translations(("the quick", " fox"), ("<|pad|>", "the dog"))
    documents = open_documents(encode(rows, made, config("seq2seq")), tmp_path / "pairs")
    for (ids, mask), row in zip(documents, rows, strict=True):
        start = mask.index(True)
        assert (made.decode(ids[: start - 1]), made.decode(ids[start:-1])) == (
            row.fields["source"],
            row.fields["target"],
        )
        assert ids[start - 1] == ids[-1] == made.eos_token_id
        assert all(mask[start:])
        assert DocumentEncoder(made, config("seq2seq")).prompts([row.fields["source"]]) == [ids[:start]]


def test_of_a_long_pair_the_source_is_cut_and_still_ends() -> None:
    made = train_tokenizer(CORPUS, 400, 512, ends=True)
    rows = translations(("the quick brown fox " * 5, "the lazy dog"))
    whole = encode(rows, made, config("seq2seq"))
    cut = encode(rows, made, config("seq2seq", max_length=16, excess_length_strategy="truncate"))
    start, target = int(cut.loss_mask.argmax()), int(cut.loss_mask.sum())
    assert len(cut.input_ids) == 16
    assert cut.counts.truncated == 1
    assert cut.input_ids[:start].tolist() == [*whole.input_ids[: start - 1].tolist(), made.eos_token_id]
    assert cut.input_ids[start:].tolist() == whole.input_ids[-target:].tolist()
    with pytest.raises(DataError, match="none of the 1 rows fits"):
        encode(rows, made, config("seq2seq", max_length=target + 1, excess_length_strategy="truncate"))
    with pytest.raises(DataError, match=r"exceed data\.max_length: 16"):
        encode(rows, made, config("seq2seq", max_length=16))
