"""lm-eval's `local-completions` against the endpoint gives the model's own scores (the extra `heliostat[clients]`)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from heliostat.models import base
from tests.clients.conftest import MAX_LENGTH, Generated, Served

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install heliostat[clients]")

TASKS = Path(__file__).parent / "tasks"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def task(name: str, data: str, cache: Path) -> dict[str, Any]:
    """One of our tasks, with the path of its data."""
    settings: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    files = {"data_files": {"test": str(TASKS / f"{data}.jsonl")}, "cache_dir": str(cache)}
    return {**settings, "dataset_kwargs": files}


@pytest.fixture
def evaluated(endpoint: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one task against the endpoint; gives the results and the samples."""
    monkeypatch.setenv("OPENAI_API_KEY", endpoint.api_key)

    def run(name: str, data: str, **arguments: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        model = {
            "base_url": f"{endpoint.base_url}/completions",
            "model": endpoint.model,
            "tokenizer": str(endpoint.folder),
            "tokenizer_backend": "huggingface",
            "max_length": MAX_LENGTH,
            "max_retries": 1,
        }
        outcome = lm_eval.simple_evaluate(
            "local-completions",
            model_args=model | arguments,
            tasks=[task(name, data, tmp_path)],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        return outcome["results"][name], outcome["samples"][name]

    return run


def logprobs(model: base.InferenceModel, ids: Sequence[int]) -> list[float]:
    """Of each token but the first."""
    with torch.no_grad():
        scores = torch.log_softmax(model.model(torch.tensor([list(ids)])).logits[0].double(), dim=-1)
    return [float(scores[place, token]) for place, token in enumerate(ids[1:])]


def choice_scores(model: base.InferenceModel, question: str, choices: Sequence[str]) -> list[float]:
    """Log-likelihood of each choice after the question, tokenised together as lm-eval does."""
    context = len(model.tokenizer(question)["input_ids"])
    return [
        sum(logprobs(model, model.tokenizer(f"{question} {choice}")["input_ids"])[context - 1 :]) for choice in choices
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenized_requests": True},
        {"tokenized_requests": True, "batch_size": 8},
        {"tokenized_requests": True, "num_concurrent": 4},
        {"tokenized_requests": False},
        {"tokenized_requests": False, "batch_size": 8},
    ],
    ids=["tokens", "batches of tokens", "concurrent", "texts", "batches of texts"],
)
def test_multiple_choice_scores_are_the_models_own(
    evaluated: Any, loaded: base.InferenceModel, arguments: dict[str, Any]
) -> None:
    results, samples = evaluated("places", "places", **arguments)
    right = 0
    for row, sample in zip(rows("places"), sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        expected = choice_scores(loaded, row["question"], row["choices"])
        assert [float(found[0]) for found in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == row["answer"]
    assert results["acc,none"] == right / len(samples)


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "texts"])
def test_perplexity_is_the_models_own(evaluated: Any, loaded: base.InferenceModel, tokens: bool) -> None:
    # As text, the name of a special token is only text: what lm-eval puts first must be a plain token.
    [prefix] = loaded.tokenizer("\n")["input_ids"]
    results, _ = evaluated("sentences", "sentences", tokenized_requests=tokens, custom_prefix_token_id=prefix)
    texts = [row["text"] for row in rows("sentences")]
    total = sum(sum(logprobs(loaded, [prefix, *loaded.tokenizer(text)["input_ids"]])) for text in texts)
    words = sum(len(text.split()) for text in texts)
    characters = sum(len(text.encode()) for text in texts)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(-total / characters), rel=1e-4)


def test_perplexity_after_the_models_own_first_token(evaluated: Any, loaded: base.InferenceModel) -> None:
    results, _ = evaluated("sentences", "sentences")
    first = loaded.tokenizer.bos_token_id or loaded.tokenizer.eos_token_id
    texts = [row["text"] for row in rows("sentences")]
    total = sum(sum(logprobs(loaded, [first, *loaded.tokenizer(text)["input_ids"]])) for text in texts)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(-total / sum(map(len, texts))), rel=1e-4)


def test_generations_are_greedy_and_stop(evaluated: Any, loaded: base.InferenceModel, generated: Generated) -> None:
    _, samples = evaluated("continuations", "places", tokenized_requests=False)
    for row, sample in zip(rows("places"), sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        text = generated(loaded.tokenizer(row["question"])["input_ids"], 12)
        expected = text.split("the")[0].split("\n\n")[0]
        assert sample["filtered_resps"][0].rstrip("\ufffd") == expected.rstrip("\ufffd")
