"""Scores are what a plain computation gives; a model that knows the answers gets all of them, an untrained one none."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import DataError
from heliostat.evaluation import evaluator
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.evaluator import Scores
from heliostat.models import base
from heliostat.models.base import InferenceModel
from tests import tiny

PAIRS = DataConfig(format="prompt_completion", prompt_template="{prompt} ->", max_length=64)
CHATS = DataConfig(format="chat", max_length=64)
TEXTS = DataConfig(format="text", max_length=64)
ANSWERS = ("red river", "the big dog", "house", "old cat goes", "market at 3", "o'clock", "man", "2 big rivers")
ROWS = [
    Row({"prompt": f"{number} {tiny.TEXTS[number]}", "completion": f" {answer}", "kind": ["even", "odd"][number % 2]},
        f"rows.jsonl:{number + 1}")
    for number, answer in enumerate(ANSWERS)
]  # fmt: skip
DIALOGUES = [
    Row({"messages": [{"role": "user", "content": row.fields["prompt"]},
                      {"role": "assistant", "content": row.fields["completion"].strip()}]}, row.origin)
    for row in ROWS
]  # fmt: skip
DOCUMENTS = [Row({"text": " ".join(tiny.TEXTS[i : i + 2])}, f"texts.jsonl:{i + 1}") for i in range(5)]
SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    folder: Path = tiny.write_model(tmp_path_factory.mktemp("evaluator") / "model", "llama")
    return base.load_for_inference(str(folder))


def overfitted(loaded: InferenceModel, rows: Sequence[Row], data: DataConfig, steps: int = 80) -> InferenceModel:
    """The model after `steps` steps on the documents of these few rows."""
    documents = DocumentEncoder(loaded.tokenizer, data).documents(rows)
    longest = max(len(ids) for ids, _ in documents)
    inputs = torch.full((len(documents), longest), loaded.tokenizer.pad_token_id)
    labels = torch.full_like(inputs, -100)
    for index, (ids, mask) in enumerate(documents):
        inputs[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
    model = copy.deepcopy(loaded.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return replace(loaded, model=model.eval())


@pytest.fixture(scope="module")
def trained(untrained: InferenceModel) -> InferenceModel:
    return overfitted(untrained, ROWS, PAIRS)


def plain_likelihood(loaded: InferenceModel, rows: Sequence[Row], data: DataConfig) -> tuple[float, float]:
    """(loss, token accuracy), document by document, token by token."""
    loss = hits = count = 0.0
    for ids, mask in DocumentEncoder(loaded.tokenizer, data).documents(rows):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor(ids[None]).long()).logits[0]
        for place in range(1, len(ids)):
            if mask[place]:
                loss -= functional.log_softmax(logits[place - 1], -1)[ids[place]].item()
                hits += float(logits[place - 1].argmax() == ids[place])
                count += 1
    return loss / count, hits / count


@pytest.mark.parametrize(("rows", "data"), [(ROWS, PAIRS), (DIALOGUES, CHATS), (DOCUMENTS, TEXTS)],
                         ids=["pairs", "chats", "texts"])  # fmt: skip
def test_likelihood_is_the_mean_over_learned_tokens(
    rows: list[Row], data: DataConfig, untrained: InferenceModel, trained: InferenceModel
) -> None:
    for loaded in (untrained, trained):
        loss, accuracy = plain_likelihood(loaded, rows, data)
        found = evaluator.likelihood(loaded, rows, data)
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
        assert found["token_accuracy"] == pytest.approx(accuracy)
        assert found["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)


def scores(loaded: InferenceModel, rows: Sequence[Row] = ROWS, data: DataConfig = PAIRS, **options: Any) -> Scores:
    return evaluator.evaluate(loaded, rows, data, SETTINGS, **{"batch_size": 3, **options})


def test_a_model_that_knows_the_answers_gets_them_all(trained: InferenceModel) -> None:
    found = scores(trained, group_by="kind")
    assert found.metrics["exact_match"] == 1.0
    assert found.metrics["token_accuracy"] == 1.0
    assert found.metrics["loss"] < 0.5
    assert found.groups == {"even": {"exact_match": 1.0, "n": 4}, "odd": {"exact_match": 1.0, "n": 4}}
    assert found.n == 8
    assert found.references == [f" {answer}" for answer in ANSWERS]
    assert [text.strip() for text in found.predictions] == list(ANSWERS)


def test_an_untrained_model_gets_none(untrained: InferenceModel) -> None:
    found = scores(untrained, group_by="kind")
    assert found.metrics["exact_match"] == 0.0
    assert found.metrics["loss"] > 3
    assert {group["exact_match"] for group in found.groups.values()} == {0.0}


def test_one_wrong_reference_costs_one_match_in_its_group(trained: InferenceModel) -> None:
    wrong = replace(ROWS[3], fields={**ROWS[3].fields, "completion": " nonsense"})
    found = scores(trained, [*ROWS[:3], wrong, *ROWS[4:]], group_by="kind")
    assert found.metrics["exact_match"] == 7 / 8
    assert found.groups == {"even": {"exact_match": 1.0, "n": 4}, "odd": {"exact_match": 0.75, "n": 4}}


def test_chats_are_answered_by_their_template(untrained: InferenceModel) -> None:
    found = scores(overfitted(untrained, DIALOGUES, CHATS, steps=300), DIALOGUES, CHATS)
    assert found.metrics["exact_match"] == 1.0
    assert found.predictions == list(ANSWERS), "without the marks of the template"


def test_texts_have_a_likelihood_only(untrained: InferenceModel) -> None:
    found = scores(untrained, DOCUMENTS, TEXTS)
    assert set(found.metrics) == {"loss", "perplexity", "token_accuracy"}
    assert (found.predictions, found.references, found.groups) == ([], [], {})


def test_too_few_new_tokens_cut_the_answer(trained: InferenceModel) -> None:
    found = evaluator.evaluate(trained, ROWS, PAIRS, GenerationSettings(max_new_tokens=1), batch_size=8)
    assert found.metrics["exact_match"] < 1.0
    assert found.metrics["token_accuracy"] == 1.0


def test_without_settings_the_models_own_defaults_decode(trained: InferenceModel) -> None:
    model = copy.deepcopy(trained.model)
    model.generation_config.max_new_tokens = 1
    short, _ = evaluator.predict(replace(trained, model=model), ROWS, PAIRS, None, batch_size=8)
    long, _ = evaluator.predict(trained, ROWS, PAIRS, SETTINGS, batch_size=8)
    assert all(whole.startswith(start) for start, whole in zip(short, long, strict=True))
    assert short != long


def test_a_group_that_no_row_has_is_named(trained: InferenceModel) -> None:
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: evaluation\.group_by: has no column `family`; it has prompt, "
    ):
        scores(trained, group_by="family")


def test_progress_counts_every_row(trained: InferenceModel) -> None:
    done: list[int] = []
    scores(trained, advance=done.append)
    assert sum(done) == len(ROWS)
