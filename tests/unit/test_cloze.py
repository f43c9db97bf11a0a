"""Passages become questions, whichever way the file counts; the sample sets train and evaluate as they are."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat.data import cloze, formats, splits
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import DataError
from heliostat.experiment import ExperimentConfig

TEXT = "Anna met Bo in Rome.\n@highlight\nBo is glad"
CONFIG = DataConfig(format="cloze")


def part(text: str, start: int = 0, *, inclusive: bool) -> dict[str, Any]:
    begin = TEXT.index(text, start)
    return {"start": begin, "end": begin + len(text) - inclusive, "text": text}


def passage(*, inclusive: bool) -> Row:
    places = [part(name, inclusive=inclusive) for name in ("Anna", "Bo", "Rome")]
    entities = [{"start": place["start"], "end": place["end"]} for place in places]
    again = part("Bo", TEXT.index("Bo is"), inclusive=inclusive)
    qas = [
        {"query": "@placeholder was met.", "answers": [places[1], again, places[0]], "idx": 3},
        {"query": "It was in @placeholder.", "answers": [places[2]], "idx": 4},
    ]
    fields = {"source": "s", "passage": {"text": TEXT, "entities": [*entities, entities[1]]}, "qas": qas}
    return Row(fields, "p.jsonl:7")


@pytest.mark.parametrize("inclusive", [False, True], ids=["rucos", "record"])
def test_a_passage_becomes_one_row_a_question(inclusive: bool) -> None:
    first, second = cloze.questions([passage(inclusive=inclusive)])
    assert first.fields == {
        "source": "s", "passage": "Anna met Bo in Rome.\n- Bo is glad", "query": "@placeholder was met.",
        "answers": ["Bo", "Anna"], "candidates": ["Anna", "Bo", "Rome"],
    }  # fmt: skip
    assert second.fields["answers"] == ["Rome"]
    assert [first.origin, second.origin] == ["p.jsonl:7: question 1", "p.jsonl:7: question 2"]


def test_the_first_answer_is_learned_and_all_are_right() -> None:
    row = cloze.questions([passage(inclusive=False)])[0]
    prompt, answer = formats.to_segments(row, CONFIG, None)
    assert prompt.text.endswith("@placeholder was met.\n\n@placeholder:")
    assert (answer.text, answer.learn, prompt.learn) == (" Bo", True, False)
    assert formats.references_of(row, CONFIG) == (" Bo", " Anna")
    assert formats.candidates_of(row, CONFIG) == (" Anna", " Bo", " Rome")
    own = DataConfig(format="cloze", prompt_template="{query} ({source}) =")
    assert formats.prompt_of(row, own, None) == ("@placeholder was met. (s) =", " Bo")


def _end_beyond(row: Any) -> None:
    row["passage"]["entities"][0]["end"] = 999


def _other_text(row: Any) -> None:
    row["qas"][1]["answers"][0]["text"] = "Roma"


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no-passage": (lambda row: row.pop("passage"), r"p\.jsonl:7: `passage` must be a dict, found nothing"),
    "text-passage": (lambda row: row.update(passage="x"), r"`passage` must be a dict, found a str"),
    "no-gap": (lambda row: row["qas"][1].update(query="Rome."), r"question 2: its query has no @placeholder"),
    "no-answer": (lambda row: row["qas"][0].update(answers=[]), r"question 1: has no answer"),
    "text-answer": (lambda row: row["qas"][0].update(answers=["Bo"]), r"question 1: answer: must be an object"),
    "wrong-place": (_other_text, r"p\.jsonl:7: the answers' `start` and `end` do not give their `text`"),
    "beyond": (_end_beyond, r"p\.jsonl:7: 0 to 999 is no part of the passage"),
}


@pytest.mark.parametrize("name", WRONG)
def test_malformed_passages_are_refused_with_their_place(name: str) -> None:
    change, message = WRONG[name]
    row = copy.deepcopy(passage(inclusive=False))
    change(row.fields)
    with pytest.raises(DataError, match=message):
        cloze.questions([row])


def test_the_questions_of_a_passage_stay_together(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [json.dumps({**passage(inclusive=True).fields, "idx": number}) for number in range(6)]
    file.write_text("\n".join(rows))
    found = splits.load_splits(DataConfig(train=str(file), format="cloze", validation_size=2), 0)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 8, "validation": 4}
    sides = [{row.fields["idx"] for row in rows} for rows in found.values()]
    assert not sides[0] & sides[1]


SAMPLE: dict[str, Any] = {
    "model": {"scratch": {"vocab_size": 600, "config": {"n_layer": 1, "n_embd": 16, "n_head": 2}}},
    "data": {"format": "cloze", "max_length": 1536, "packing": False, "excess_length_strategy": "truncate"},
    "training": {"num_workers": 0, "max_steps": 1, "gradient_accumulation_steps": 1},
    "generation": {"max_new_tokens": 2},
    "evaluation": {"metrics": ["cloze_em", "token_f1"]},
}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["rucos", "record"])
def test_the_sample_sets_train_and_evaluate_as_they_are(name: str, shared_data: Path, tmp_path: Path) -> None:
    from heliostat.registry import scoring
    from heliostat.training import trainer

    folder = shared_data / f"{name}_sample"
    files = {"train": f"{folder}/train.jsonl", "validation": f"{folder}/val.jsonl", "test": f"{folder}/val.jsonl"}
    values = {**SAMPLE, "name": name, "data": {**SAMPLE["data"], **files}}
    config = ExperimentConfig.model_validate(values)
    trained = trainer.train(config, Console(quiet=True))
    likely = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"scoring": "likelihood"})})
    rows = splits.load_splits(config.data, config.seed, ("test",))["test"]
    for chosen in (config, likely):
        found = scoring.score(chosen, trained.bundle, Console(quiet=True), str(tmp_path / "p.jsonl"))
        assert found["n"] == len(rows)
        assert 0 <= found["cloze_em"] <= found["token_f1"] <= 1
    answers = [json.loads(line)["prediction"].strip() for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(answer in row.fields["candidates"] for answer, row in zip(answers, rows, strict=True))
