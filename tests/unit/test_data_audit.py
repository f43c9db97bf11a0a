"""What an audit says of data: which tokens are learned, what is there twice, and what is bad enough to stop for."""

import dataclasses
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from heliostat.data import audit, audit_view, prepare, splits
from heliostat.data.audit import Finding, Report
from heliostat.data.config import AuditConfig, DataConfig
from heliostat.data.contents import contents
from heliostat.data.packing import PackedDataset
from heliostat.data.tokens import Counts, Encoded, TokenDataset
from heliostat.errors import AuditFailed
from tests import tiny

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def audited(rows: Any, tokens: dict[str, TokenDataset], tokenizer: Any, config: DataConfig) -> Report:
    packed = {name: PackedDataset(each, config.max_length, packing=config.packing) for name, each in tokens.items()}
    return audit.audit({name: contents(rows[name], config) for name in tokens}, packed, tokenizer, config)


class Data:
    """Splits in files, audited."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def prepared(self, given: dict[str, Rows], **data: Any) -> tuple[Any, dict[str, TokenDataset], DataConfig]:
        for name, lines in given.items():
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        files = {name: str(self.folder / f"{name}.jsonl") for name in given}
        config = DataConfig.model_validate(
            {"format": "prompt_completion", "max_length": 64, "validation_size": 0, **files, **data}
        )
        rows = splits.load_splits(config, 0)
        folders = prepare.prepare(rows, config, self.tokenizer, 0, self.folder / "cache", list(given)).splits
        return rows, {name: TokenDataset.open(folder) for name, folder in folders.items()}, config

    def audit(self, given: dict[str, Rows], **data: Any) -> Report:
        rows, tokens, config = self.prepared(given, **data)
        return audited(rows, tokens, self.tokenizer, config)


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> Data:
    return Data(tmp_path, tokenizer)


def pair(prompt: str, completion: str = " the river") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def pairs(count: int) -> Rows:
    return [pair(f"{text} {number}", f" {number}") for number, text in enumerate((tiny.TEXTS * 2)[:count])]


def found(report: Report, check: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.check == check]


CHAT = {
    "messages": [
        {"role": "user", "content": "where is the cat"},
        {"role": "assistant", "content": "at the river"},
        {"role": "user", "content": "and [the] дог"},
        {"role": "assistant", "content": "at [home] 家"},
    ]
}
ALPACA = {"instruction": "say where", "input": "the cat", "output": "at the river"}


@pytest.mark.parametrize(
    ("row", "options", "learned"),
    [
        (pair("the cat is", " at the river"), {}, [" at the river<|endoftext|>"]),
        (pair("the cat is", " at the river"), {"train_on_inputs": True}, [" cat is at the river<|endoftext|>"]),
        (ALPACA, {"format": "alpaca"}, ["at the river<|endoftext|>"]),
        (CHAT, {"format": "chat"}, ["at the river<|im_end|>", "at [home] 家<|im_end|><|endoftext|>"]),
        ({"text": "the cat goes"}, {"format": "text"}, [" cat goes<|endoftext|>"]),
    ],
)
def test_samples_show_what_carries_loss_and_lose_nothing(
    row: dict[str, Any], options: dict[str, Any], learned: list[str], data: Data
) -> None:
    _, tokens, _ = data.prepared({"train": [row]}, max_length=256, **options)
    report = data.audit({"train": [row]}, max_length=256, **options)
    (sample,) = report.samples
    ids, mask = tokens["train"].document(0)
    assert [span.text for span in sample.spans if span.learned] == learned
    assert "".join(span.text for span in sample.spans) == data.tokenizer.decode(ids.tolist())
    count = sum(len(data.tokenizer(text)["input_ids"]) for text in learned)
    assert report.splits["train"].supervised_tokens == mask[1:].sum() == count
    text = audit_view.text(report)
    assert all(f"⟦{part}⟧" in text for part in learned)


def test_a_terminal_shows_colours_in_place_of_marks_and_obeys_no_command_of_the_data(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = data.audit({"train": [pair("the \x1b[2J cat", " at\x07 the river")]})
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    shown = audit_view.text(report, terminal)
    assert "\x1b[32m at\\x07 the river<|endoftext|>\x1b[0m" in shown
    assert "⟦" not in shown
    assert "\x1b[2J" not in shown
    assert "the \\x1b[2J cat" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    plain = audit_view.text(report, Console(file=io.StringIO(), force_terminal=True, color_system="standard"))
    assert "⟦ at\\x07 the river<|endoftext|>⟧" in plain


def test_long_samples_are_shortened_where_they_are_long(data: Data) -> None:
    report = data.audit({"train": [pair("the cat " * 200, " at the river")]}, max_length=2048)
    text = audit_view.text(report)
    assert "⟦ at the river<|endoftext|>⟧" in text, "the answer is seen behind any prompt"
    assert len(text) < 1500


def test_samples_are_spread_over_the_split(data: Data) -> None:
    report = data.audit({"train": pairs(20)}, audit={"samples": 3})
    assert [sample.document for sample in report.samples] == [0, 9, 19]
    assert data.audit({"train": pairs(20)}, audit={"samples": 0}).samples == []


def test_duplicates_and_leaks_are_those_a_slow_search_finds(data: Data) -> None:
    """Equal texts, white space aside, by comparing all with all; and each is named with the first that it repeats."""
    draw = random.Random(0)

    def some(count: int) -> Rows:
        return [pair(f"{draw.choice([' ', '  ', chr(9)])}number{draw.choice(' ' * 9)} {draw.randrange(60)}")
                for _ in range(count)]  # fmt: skip

    given = {"train": some(50), "validation": some(30), "test": some(30)}
    report = data.audit(given)
    texts = {name: [" ".join(row["prompt"].split()) for row in rows] for name, rows in given.items()}

    def slow(source: str, split: str) -> list[tuple[str, str]]:
        pairs = []
        for number, text in enumerate(texts[split]):
            first = texts[source].index(text) if text in texts[source] else number
            if (source != split and text in texts[source]) or (first < number and source == split):
                pairs.append((f"{data.folder / split}.jsonl:{number + 1}", f"{data.folder / source}.jsonl:{first + 1}"))
        return pairs

    def named(check: str, split: str, source: str = "") -> list[tuple[str, str | None]]:
        return [(place.row, place.same_as) for finding in found(report, check) for place in finding.rows
                if finding.split == split and str(place.same_as).startswith(str(data.folder / source))]  # fmt: skip

    for split in given:
        assert named("duplicates", split) == slow(split, split)
        assert report.splits[split].duplicates == len(texts[split]) - len(set(texts[split])) > 0
    assert named("validation_leakage", "validation") == slow("train", "validation")
    assert named("test_leakage", "test") == slow("train", "test")
    assert named("validation_leakage", "test", "validation") == slow("validation", "test")
    assert {finding.severity for finding in found(report, "test_leakage")} == {"error"}
    assert {finding.severity for finding in found(report, "validation_leakage")} == {"warning"}


def test_only_what_is_trained_on_is_compared(data: Data) -> None:
    """Other columns, such as an id, make no difference; other answers do."""
    rows = [{**row, "id": number} for number, row in enumerate(pairs(5))]
    moved = [{**row, "id": -number} for number, row in enumerate(rows)]
    assert found(data.audit({"train": rows, "test": moved}), "test_leakage")[0].text.startswith("5 of 5 (100.0%)")
    answered = [{**row, "completion": " other"} for row in rows]
    assert not found(data.audit({"train": rows, "test": answered}), "test_leakage")
    chats = [{"messages": CHAT["messages"][:2]}, CHAT]
    report = data.audit({"train": chats[:1], "test": chats[1:]}, format="chat", max_length=256)
    assert not found(report, "test_leakage")
    report = data.audit({"train": chats, "test": [{**CHAT, "id": 1}]}, format="chat", max_length=256)
    assert found(report, "test_leakage")[0].rows[0].same_as == f"{data.folder}/train.jsonl:2"


def test_few_are_told_and_many_are_a_finding(data: Data) -> None:
    given = {"train": pairs(50), "test": [*pairs(1), *(pair(f"other {number}") for number in range(49))]}
    assert [finding.severity for finding in found(data.audit(given, audit={"max_leakage": 0.02}), "test_leakage")] == [
        "info"
    ]
    assert found(data.audit(given, audit={"max_leakage": 0.019}), "test_leakage")[0].severity == "error"


def test_labels_are_counted_where_completions_are_labels(data: Data) -> None:
    labels = [" ham"] * 96 + [" spam"] * 4
    train = [pair(f"{number} cats", label) for number, label in enumerate(labels)]
    test = [pair(f"{number} dogs", label) for number, label in enumerate([" ham", " eggs", " eggs"] * 3)]
    report = data.audit({"train": train, "test": test})
    assert report.splits["train"].labels == dict(Counter(label.strip() for label in labels))
    assert report.splits["test"].labels == {"eggs": 6, "ham": 3}
    (unseen,) = found(report, "unseen_label")
    assert unseen.text == "6 of 9 (66.7%) rows have a label that train does not have: `eggs`"
    assert "`ham`" in found(report, "label_imbalance")[0].text
    assert not found(data.audit({"train": train}, audit={"max_label_share": 0.96}), "label_imbalance")
    assert "  labels: ham 96 (96.0%), spam 4 (4.0%)" in audit_view.text(report)
    assert data.audit({"train": pairs(30)}).splits["train"].labels is None, "answers of their own are no labels"
    long = [pair(f"{number} cats", " river" * 30) for number in range(20)]
    assert data.audit({"train": long}).splits["train"].labels is None


def test_what_is_cut_dropped_or_empty_is_a_finding(data: Data) -> None:
    rows = [*pairs(10), pair("the cat", " river" * 90), pair("the cat " * 90), pair("  ")]
    report = data.audit({"train": rows}, excess_length_strategy="truncate")
    counts = report.splits["train"]
    assert (counts.truncated, counts.dropped, counts.empty, counts.eos_learned) == (1, 1, 1, 11)
    assert {finding.check for finding in report.findings} == {"truncated", "dropped", "empty"}
    assert {finding.severity for finding in report.findings} == {"warning"}
    assert [place.row for place in found(report, "empty")[0].rows] == [f"{data.folder}/train.jsonl:13"]
    report.check()
    lenient = data.audit({"train": rows}, excess_length_strategy="truncate", audit={"max_truncated": 0.1})
    assert found(lenient, "truncated")[0].severity == "info"
    silent = [{"role": "user", "content": " "}, *CHAT["messages"][1:]]
    chat = data.audit({"train": [CHAT, {"messages": silent}]}, format="chat", max_length=256)
    assert chat.splits["train"].empty == 1
    templated = data.audit({"train": [pair("", " a"), pair("b", " a")]}, prompt_template="Say {prompt}:")
    assert templated.splits["train"].empty == 1


def test_a_model_that_would_not_learn_to_stop_is_an_error(data: Data) -> None:
    report = data.audit({"train": [pair("the cat", " river" * 90)]}, excess_length_strategy="truncate")
    assert report.splits["train"].eos_learned == 0
    with pytest.raises(AuditFailed, match=r"none of 1 documents ends with a learned EOS.*\{eos_not_learned: info\}"):
        report.check()


def test_a_split_that_teaches_nothing_is_an_error_that_cannot_be_waved_through(tmp_path: Path, tokenizer: Any) -> None:
    ids = np.array([*tokenizer("the quick")["input_ids"], tokenizer.eos_token_id], dtype=np.int32)
    encoded = Encoded(ids, np.zeros(len(ids), np.bool_), np.array([0, len(ids)]), Counts(1, 1, len(ids), 0, 0, 0))
    encoded.save(tmp_path / "train", "train")
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair("the", " quick")))
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), format="prompt_completion", validation_size=0)
    tokens = {"train": TokenDataset.open(tmp_path / "train")}
    report = audited(splits.load_splits(config, 0), tokens, tokenizer, config)
    with pytest.raises(AuditFailed, match="train: no token carries loss") as refused:
        report.check()
    assert "severity" not in str(refused.value)
    with pytest.raises(ValidationError, match="leave nothing_learned out of severity"):
        AuditConfig(severity={"nothing_learned": "info"})


def test_severities_decide_what_ends_the_command(data: Data) -> None:
    given = {"train": pairs(9), "test": pairs(3)}

    def failures(**settings: Any) -> list[str]:
        return [finding.check for finding in data.audit(given, audit=settings).failures]

    assert failures() == ["test_leakage"]
    assert failures(severity={"test_leakage": "warning"}) == []
    assert failures(severity={"test_leakage": "warning"}, fail_on="warning") == ["test_leakage"]
    assert failures(severity={"test_leakage": "info"}, fail_on="warning") == []
    assert data.audit(given, audit={"severity": {"test_leakage": "ignore"}}).findings == []
    report = data.audit(given)
    with pytest.raises(AuditFailed) as refused:
        report.check()
    place = f"({data.folder}/test.jsonl:1 = {data.folder}/train.jsonl:1, "
    assert "test: 3 of 3 (100.0%) rows are in train too; remove them from one of the two " + place in str(refused.value)
    assert str(refused.value).endswith("If it is meant so, set data.audit.severity: {test_leakage: info}")
    assert refused.value.exit_code == 2
    assert refused.value.facts == dataclasses.asdict(report)


def test_the_figure_has_all_documents_and_labels(data: Data) -> None:
    rows = [pair(f"{'cat ' * (number % 7)} {number}", [" yes", " $no"][number % 2]) for number in range(40)]
    _, tokens, config = data.prepared({"train": rows, "validation": pairs(9)})
    report = data.audit({"train": rows, "validation": pairs(9)})
    lengths = {name: each.lengths for name, each in tokens.items()}
    figure = audit_view.figure(report, lengths, config.max_length)
    left, right = figure.axes
    assert [line.get_label() for line in left.patches] == ["train (40 documents)", "validation (9 documents)"]
    assert len(right.patches) == len(report.splits["train"].labels or {}) == 2
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue().startswith(b"\x89PNG")
