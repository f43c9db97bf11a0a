"""Scores are what a plain computation gives; a model that knows the answers gets all of them, an untrained one none."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import evaluator
from heliostat.evaluation.bootstrap import Interval
from heliostat.evaluation.config import EvaluationConfig, GenerationSettings
from heliostat.evaluation.evaluator import Local, Scores, Source
from heliostat.evaluation.metrics import Example
from heliostat.evaluation.prefix import KEY, PromptPrefix
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


def scores(
    loaded: InferenceModel,
    rows: Sequence[Row] = ROWS,
    data: DataConfig = PAIRS,
    settings: GenerationSettings = SETTINGS,
    advance: evaluator.Advance = lambda done: None,
    **options: Any,
) -> Scores:
    config = EvaluationConfig.model_validate({"batch_size": 3, **options})
    return evaluator.evaluate(Local(loaded), rows, data, settings, config, advance=advance)


def predictions(found: Sequence[Example]) -> list[str]:
    return [example.prediction for example in found]


def test_a_model_that_knows_the_answers_gets_them_all(trained: InferenceModel) -> None:
    found = scores(trained, group_by="kind")
    assert found.metrics["exact_match"] == 1.0
    assert found.metrics["token_accuracy"] == 1.0
    assert found.metrics["loss"] < 0.5
    assert found.groups == {"even": {"exact_match": 1.0, "n": 4}, "odd": {"exact_match": 1.0, "n": 4}}
    assert found.n == 8
    assert [example.reference for example in found.examples] == [f" {answer}" for answer in ANSWERS]
    assert [text.strip() for text in predictions(found.examples)] == list(ANSWERS)
    assert [example.prompt for example in found.examples] == [f"{row.fields['prompt']} ->" for row in ROWS]
    expected = trained.tokenizer([f" {answer}" for answer in ANSWERS])["input_ids"]
    assert [example.tokens for example in found.examples] == [len(ids) for ids in expected]


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
    assert predictions(found.examples) == list(ANSWERS), "without the marks of the template"


def test_texts_have_a_likelihood_only(untrained: InferenceModel) -> None:
    found = scores(untrained, DOCUMENTS, TEXTS)
    assert set(found.metrics) == {"loss", "perplexity", "token_accuracy"}
    assert (found.examples, found.intervals, found.unscored, found.groups) == ([], {}, {}, {})


def test_too_few_new_tokens_cut_the_answer(trained: InferenceModel) -> None:
    found = scores(trained, settings=GenerationSettings(max_new_tokens=1))
    assert found.metrics["exact_match"] < 1.0
    assert found.metrics["token_accuracy"] == 1.0


def test_without_settings_the_models_own_defaults_decode(trained: InferenceModel) -> None:
    model = copy.deepcopy(trained.model)
    model.generation_config.max_new_tokens = 1
    short = predictions(evaluator.predict(replace(trained, model=model), ROWS, PAIRS, None, batch_size=8))
    long = predictions(evaluator.predict(trained, ROWS, PAIRS, SETTINGS, batch_size=8))
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


def test_chosen_metrics_come_with_intervals_and_by_example(trained: InferenceModel) -> None:
    wrong = [replace(row, fields={**row.fields, "completion": " nonsense"}) for row in ROWS[:2]]
    names = ["token_f1", "exact_match", "chrf", "macro_f1"]
    found = scores(trained, [*wrong, *ROWS[2:]], metrics=names, confidence=0.8)
    assert list(found.metrics) == ["loss", "perplexity", "token_accuracy", *names]
    assert list(found.intervals) == list(found.per_example) == names
    assert found.metrics["exact_match"] == found.metrics["token_f1"] == 6 / 8
    assert found.per_example["exact_match"] == [0, 0, 1, 1, 1, 1, 1, 1]
    for name, interval in found.intervals.items():
        assert interval.low < found.metrics[name] <= interval.high
    wider = scores(trained, [*wrong, *ROWS[2:]], confidence=0.99).intervals["exact_match"]
    assert wider.low < found.intervals["exact_match"].low
    assert scores(trained).intervals == {"exact_match": Interval(1.0, 1.0)}
    assert found.unscored == {}


def test_wrong_settings_of_a_metric_end_it_before_the_work(trained: InferenceModel) -> None:
    done: list[int] = []
    with pytest.raises(ConfigError, match=r"evaluation\.judge"):
        scores(trained, metrics=["judge"], advance=done.append)
    with pytest.raises(ConfigError, match=r"evaluation\.labels lacks"):
        scores(trained, metrics=["accuracy"], labels=["man"], advance=done.append)
    assert done == []


def test_a_metric_that_scores_no_row_is_no_score(trained: InferenceModel, capsys: pytest.CaptureFixture[str]) -> None:
    away = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "max_retries": 0}
    found = scores(trained, metrics=["exact_match", "judge"], judge=away)
    assert "judge" not in found.metrics
    assert "judge" not in found.intervals
    assert found.unscored == {"judge": len(ROWS)}
    assert all(mark != mark for mark in found.per_example["judge"])
    assert found.metrics["exact_match"] == 1.0
    assert "evaluation.judge: 8 of 8 answers have no score" in capsys.readouterr().err


def asked(
    loaded: InferenceModel, rows: Sequence[Row], data: DataConfig, prefix: PromptPrefix | None
) -> list[list[int]]:
    """The ids that the model is asked, in the order of the rows."""
    seen: dict[int, list[int]] = {}
    calls: list[dict[str, Any]] = []

    class Recorder(torch.nn.Module):
        """The model, keeping what `generate` is given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.model, name)

        def generate(self, **given: Any) -> Any:
            calls.append(given)
            return loaded.model.generate(**given)

    recorded = replace(loaded, model=Recorder())
    for index, row in enumerate(rows):
        evaluator.predict(recorded, [row], data, GenerationSettings(max_new_tokens=1), batch_size=1, prefix=prefix)
        seen[index] = calls.pop()["input_ids"][0].tolist()
    return [seen[index] for index in range(len(rows))]


SHOTS = (("1 + 1 ->", " 2"), ("2 + 2 ->", " 4"))


@pytest.mark.parametrize(("rows", "data"), [(ROWS, PAIRS), (DIALOGUES, CHATS)], ids=["pairs", "chats"])
def test_without_a_prefix_the_model_is_asked_what_was_trained(
    rows: list[Row], data: DataConfig, untrained: InferenceModel
) -> None:
    trained_on = DocumentEncoder(untrained.tokenizer, data).documents(rows)
    expected = [ids[: mask.argmax()].tolist() for ids, mask in trained_on]
    assert asked(untrained, rows, data, None) == expected
    assert asked(untrained, rows, data, PromptPrefix()) == expected


def test_a_prefix_comes_before_a_plain_prompt(untrained: InferenceModel) -> None:
    found = asked(untrained, ROWS[:2], PAIRS, PromptPrefix("Be brief.", SHOTS))
    text = "Be brief.\n\n1 + 1 -> 2\n\n2 + 2 -> 4\n\n"
    expected = DocumentEncoder(untrained.tokenizer, PAIRS).prompts([f"{text}{r.fields['prompt']} ->" for r in ROWS[:2]])
    assert found == expected


def test_a_prefix_comes_before_the_messages_of_a_chat_its_examples_before_a_first_question_only(
    untrained: InferenceModel,
) -> None:
    own = {"role": "system", "content": "own"}
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    question = {"role": "user", "content": "why?"}
    answer = {"role": "assistant", "content": "so"}
    rows = [
        Row({"messages": [question, answer]}, "a:1"),
        Row({"messages": [own, *earlier, question, answer, question]}, "a:2"),
    ]
    shots = [
        {"role": role, "content": text}
        for pair in SHOTS
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    expected = [
        [{"role": "system", "content": "Be brief."}, *shots, question],
        [own, *earlier, question],
    ]
    texts = [
        untrained.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in expected
    ]
    found = asked(untrained, rows, CHATS, PromptPrefix("Be brief.", SHOTS))
    assert found == untrained.tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_the_prefix_of_the_bundle_is_the_default(untrained: InferenceModel) -> None:
    prefix = PromptPrefix("Be brief.", SHOTS)
    bundled = replace(untrained, manifest={KEY: prefix.manifest()})
    assert asked(bundled, ROWS[:2], PAIRS, None) == asked(untrained, ROWS[:2], PAIRS, prefix)
    assert asked(bundled, ROWS[:2], PAIRS, PromptPrefix()) == asked(untrained, ROWS[:2], PAIRS, None)
    shown = evaluator.predict(bundled, ROWS[:2], PAIRS, SETTINGS, batch_size=2)
    assert [example.prompt for example in shown] == [f"{row.fields['prompt']} ->" for row in ROWS[:2]], "the row's own"


def test_stop_strings_end_the_answer_and_are_no_part_of_it(trained: InferenceModel) -> None:
    settings = GenerationSettings(max_new_tokens=12, stop_strings=[" big", "at 3", "s"])
    found = evaluator.predict(trained, ROWS, PAIRS, settings, batch_size=3)
    expected = ["red river", "the", "hou", "old cat goe", "market ", "o'clock", "man", "2"]
    assert [text.removeprefix(" ") for text in predictions(found)] == expected
    whole = evaluator.predict(trained, ROWS, PAIRS, SETTINGS, batch_size=3)
    assert found[1].tokens < whole[1].tokens, "generation stops there"
    assert found[6] == whole[6]


def test_a_whole_generation_config_is_taken_as_it_is(trained: InferenceModel) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=3.0, eos_token_id=None)

    def sampled(seed: int) -> list[Example]:
        return evaluator.predict(trained, ROWS, PAIRS, config, batch_size=3, seed=seed)

    assert {example.tokens for example in sampled(1)} == {5}
    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_sources_load_trained_and_untrained_models(tmp_path: Path, untrained: InferenceModel) -> None:
    stored = Source(untrained.path).load()
    assert torch.equal(stored.model.lm_head.weight, untrained.model.lm_head.weight)
    fresh, again, other = (Source(untrained.path, seed, "{{ 1 }}").load() for seed in (7, 7, 8))
    assert torch.equal(fresh.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(fresh.model.lm_head.weight, other.model.lm_head.weight)
    assert Local(fresh).chat_template == "{{ 1 }}"
    assert Local(stored).chat_template == untrained.tokenizer.chat_template
