"""The likeliest candidate is what a plain computation finds, however candidates and prompts share batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import choices, evaluator
from heliostat.evaluation.choices import ChoiceWork
from heliostat.evaluation.config import EvaluationConfig
from heliostat.evaluation.evaluator import Local
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models import base
from heliostat.models.base import InferenceModel
from tests import tiny

PAIRS = DataConfig(format="prompt_completion", prompt_template="{prompt} ->", max_length=64)
LABELS = ("cat", "big dog at the river", "man")
ROWS = [
    Row({"prompt": " ".join(tiny.TEXTS[number : number + 1 + number % 3]), "completion": f" {LABELS[number % 3]}"},
        f"r:{number}")
    for number in range(7)
]  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    folder: Path = tiny.write_model(tmp_path_factory.mktemp("choices") / request.param, request.param)
    return base.load_for_inference(str(folder))


def plain(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """The log-probability of the completion, by one pass over both."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, completion, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_logprobs_are_those_of_whole_texts(loaded: InferenceModel, batch_size: int) -> None:
    prompts = [[5], [7, 8, 9, 10, 11, 12], [40, 41, 42]]
    completions = [[[50], [51, 52, 53, 54]], [[60, 61]], [[70], [71, 72], [73, 74, 75]]]
    found = choices.logprobs(loaded.model, prompts, completions, batch_size)
    expected = [[plain(loaded.model, p, c) for c in offered] for p, offered in zip(prompts, completions, strict=True)]
    assert [len(row) for row in found] == [2, 1, 3]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mean", [False, True])
def test_the_best_candidate_is_the_answer(loaded: InferenceModel, mean: bool) -> None:
    config = EvaluationConfig(scoring="likelihood", labels=list(LABELS), length_normalization=mean, batch_size=3)
    found = Local(loaded).answer(evaluator.answers(ROWS, PAIRS, None, config), len(ROWS), lambda done: None)
    encode = loaded.tokenizer
    completions = [encode(f" {label}")["input_ids"] for label in LABELS]
    for row, example in zip(ROWS, found, strict=True):
        prompt = encode(f"{row.fields['prompt']} ->")["input_ids"]
        scores = [plain(loaded.model, prompt, ids) / (len(ids) if mean else 1) for ids in completions]
        assert example.prediction == f" {LABELS[scores.index(max(scores))]}"
        assert example.reference == row.fields["completion"]


def test_accuracy_is_that_of_the_choices(loaded: InferenceModel) -> None:
    options = {"scoring": "likelihood", "metrics": ["accuracy", "macro_f1"], "labels": list(LABELS)}
    found = evaluator.evaluate(Local(loaded), ROWS, PAIRS, None, EvaluationConfig.model_validate(options))
    hits = [example.prediction == example.reference for example in found.examples]
    assert found.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert {example.prediction.strip() for example in found.examples} <= set(LABELS)
    same = {**options, "labels": None}
    again = evaluator.evaluate(Local(loaded), ROWS, PAIRS, None, EvaluationConfig.model_validate(same))
    assert again.metrics == found.metrics, "the labels of the references are the default"


def test_worked_examples_come_before_the_prompt(loaded: InferenceModel) -> None:
    shots = PromptPrefix(few_shot=((ROWS[1].fields["prompt"] + " ->", " man"),))
    offered = choices.candidates(ROWS[:1], PAIRS, LABELS)
    work = ChoiceWork(loaded, ROWS[:1], PAIRS, offered, batch_size=1, prefix=shots)
    prompt = loaded.tokenizer(f"{shots.text()}{ROWS[0].fields['prompt']} ->")["input_ids"]
    scores = [plain(loaded.model, prompt, loaded.tokenizer(text)["input_ids"]) for text in offered[0]]
    assert work.piece(0)[0].prediction == offered[0][scores.index(max(scores))]
    assert work.piece(0)[0].prompt == f"{ROWS[0].fields['prompt']} ->"


def test_what_cannot_be_chosen_is_refused(loaded: InferenceModel) -> None:
    with pytest.raises(ConfigError, match=r"2 to 500 labels; there are 1\. Set evaluation\.labels"):
        choices.candidates(ROWS[:1], PAIRS, None)
    passage = Row({"passage": "p", "query": "@placeholder", "answers": ["a"], "candidates": []}, "c.jsonl:2")
    with pytest.raises(DataError, match=r"c\.jsonl:2: its passage names no entity"):
        choices.candidates([passage], DataConfig(format="cloze"), None)
    long = Row({"prompt": "x" * 200, "completion": " cat"}, "r:99")
    with pytest.raises(DataError, match=r"r:99: .* more than the model's 128 positions"):
        ChoiceWork(loaded, [long], PAIRS, [(" cat", " man")], batch_size=1)
    texts = DataConfig(format="text")
    with pytest.raises(ConfigError, match="which `format: text` has none of"):
        evaluator.evaluate(Local(loaded), ROWS, texts, None, EvaluationConfig(scoring="likelihood"))
