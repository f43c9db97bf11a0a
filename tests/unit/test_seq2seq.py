"""Encoder-decoders on the way from pairs of texts to answers: each step gives what transformers alone gives."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.data.config import DataConfig
from heliostat.data.packing import PackedDataset, collate_pairs
from heliostat.data.records import Row
from heliostat.data.tokens import TokenDataset, encode
from heliostat.errors import ConfigError
from heliostat.evaluation import completion, evaluator, generate
from heliostat.evaluation.config import GenerationSettings
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.models.base import InferenceModel
from heliostat.serving import parity
from heliostat.serving.config import EndpointArgs
from heliostat.serving.lane_model import LaneModel
from heliostat.serving.sampling import InvalidRequest, SamplingParams
from heliostat.tasks import IGNORED
from heliostat.training import objectives, setup
from tests import tiny

DATA = DataConfig(format="seq2seq", max_length=64)
TARGETS = ("house", "the big dog goes", "old", "a river at 3 o'clock", "man", "two cats", "market", "red")
ROWS = [
    Row({"source": tiny.TEXTS[number][: 8 + 3 * number], "target": target}, f"rows:{number}")
    for number, target in enumerate(TARGETS)
]
SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module", params=list(tiny.ENCODER_DECODERS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    folder: Path = tiny.write_model(tmp_path_factory.mktemp("seq2seq") / "model", request.param)
    return base.load_for_inference(str(folder))


def rows_of(loaded: InferenceModel) -> PackedDataset:
    encoded = encode(ROWS, loaded.tokenizer, DATA)
    return PackedDataset(TokenDataset(encoded.input_ids, encoded.loss_mask, encoded.offsets, {}), 64, packing=False)


def mean_loss(loaded: InferenceModel, row: Row) -> tuple[float, int]:
    """transformers' own loss of one pair, and the tokens it is the mean of."""
    source, target = (
        loaded.tokenizer(row.fields[name], return_tensors="pt")["input_ids"] for name in ("source", "target")
    )
    with torch.inference_mode():
        return loaded.model(input_ids=source, labels=target).loss.item(), target.shape[1]


def answer_alone(loaded: InferenceModel, text: str, **settings: Any) -> list[int]:
    """What transformers generates for one source, without start and end token."""
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    generated = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, **settings)
    output: list[int] = generated[0, 1:].tolist()
    end = loaded.tokenizer.eos_token_id
    return output[: output.index(end)] if end in output else output


def test_a_task_is_known_by_its_architecture(loaded: InferenceModel) -> None:
    assert loaded.task == "seq2seq"


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_is_the_mean_over_target_tokens_however_the_batch_is_cut(loaded: InferenceModel, size: int) -> None:
    rows = rows_of(loaded)
    objective = objectives.build("seq2seq", pad_token_id=loaded.tokenizer.pad_token_id)
    num_items = int(rows.num_label_tokens(slice(None)).sum())
    with torch.inference_mode():
        parts = [
            objective.loss(
                loaded.model, objective.batch([rows.row(i) for i in range(start, min(start + size, 8))], flatten=False),
                num_items,
            )
            for start in range(0, 8, size)
        ]  # fmt: skip
    expected = [mean_loss(loaded, row) for row in ROWS]
    assert sum(count for _, count in expected) == num_items
    assert sum(part.item() for part in parts) == pytest.approx(
        sum(loss * count for loss, count in expected) / num_items, rel=1e-4
    )


def test_a_row_without_labels_adds_nothing(loaded: InferenceModel) -> None:
    row = rows_of(loaded).row(0)
    row.labels[:] = IGNORED
    objective = objectives.build("seq2seq", pad_token_id=loaded.tokenizer.pad_token_id)
    assert objective.loss(loaded.model, objective.batch([row, row], flatten=False), 1).item() == 0


def test_evaluation_scores_and_answers_as_transformers_does(loaded: InferenceModel) -> None:
    losses = [mean_loss(loaded, row) for row in ROWS]
    tokens = sum(count for _, count in losses)
    found = evaluator.likelihood(loaded, ROWS, DATA)
    assert found["loss"] == pytest.approx(sum(loss * count for loss, count in losses) / tokens, rel=1e-4)
    examples = evaluator.predict(loaded, ROWS, DATA, SETTINGS, batch_size=3)
    expected = [answer_alone(loaded, row.fields["source"]) for row in ROWS]
    assert len({tuple(tokens) for tokens in expected}) > 2, "the sources have different answers"
    assert [example.prediction for example in examples] == loaded.tokenizer.batch_decode(expected)
    assert [example.reference for example in examples] == list(TARGETS)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 2}])
def test_a_batch_gives_what_each_source_gives_alone(loaded: InferenceModel, settings: dict[str, Any]) -> None:
    texts = [row.fields["source"] for row in ROWS]
    config = generate.changed_config(loaded.model, {"max_new_tokens": 12, **settings})
    prompts = [completion.encode_prompt(loaded, text) for text in texts]
    got = generate.generate(
        loaded.model, prompts, config=config, pad_token_id=loaded.tokenizer.pad_token_id, batch_size=4
    )
    assert got == [answer_alone(loaded, text, **settings) for text in texts]


def test_a_stream_is_the_completion(loaded: InferenceModel) -> None:
    pieces: list[str] = []
    completion.stream(loaded, ROWS[1].fields["source"], {"max_new_tokens": 12}, pieces.append)
    (whole,) = completion.complete(loaded, [ROWS[1].fields["source"]], {"max_new_tokens": 12})
    assert "".join(pieces) == whole


def test_pairs_are_padded_each_by_itself(loaded: InferenceModel) -> None:
    rows = rows_of(loaded)
    batch = collate_pairs([rows.row(0), rows.row(3)], loaded.tokenizer.pad_token_id)
    for place, number in enumerate((0, 3)):
        source = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        target = batch["labels"][place][batch["labels"][place] != IGNORED]
        for ids, text in ((source, ROWS[number].fields["source"]), (target, TARGETS[number])):
            assert ids.tolist() == loaded.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}], ids=str)
def test_what_is_served_is_what_transformers_generates(loaded: InferenceModel, extra: dict[str, Any]) -> None:
    texts = [row.fields["source"] for row in ROWS]

    async def ask(served: LaneModel, text: str) -> tuple[str, list[int]]:
        ids = await served.prompts.text(text)
        found = [delta async for _, delta in served.generate(ids, SamplingParams(12, extra=extra))]
        return "".join(delta.text for delta in found), [token for delta in found for token in delta.token_ids]

    async def test() -> list[tuple[str, list[int]]]:
        served, check = await parity.start(loaded, "pairs", EndpointArgs(cache_tokens=512))
        assert isinstance(served, LaneModel)
        try:
            await check()
            with pytest.raises(InvalidRequest, match="has an encoder"):
                await served.score([5, 6], 0)
            with pytest.raises(InvalidRequest, match="`logprobs` cannot be had of this model"):
                served.check([5, 6], SamplingParams(12, logprobs=0))
            return await asyncio.gather(*(ask(served, text) for text in texts))
        finally:
            served.close()

    answers = asyncio.run(test())
    expected = [answer_alone(loaded, text, **extra) for text in texts]
    end = loaded.tokenizer.eos_token_id
    assert [[token for token in tokens if token != end] for _, tokens in answers] == expected
    whole = loaded.tokenizer.batch_decode(expected, skip_special_tokens=True)
    # Half a character at the very end is not given out.
    assert [text.rstrip("\ufffd") for text, _ in answers] == [text.rstrip("\ufffd") for text in whole]


@pytest.mark.parametrize(
    ("model_type", "data", "message"),
    [
        ("gpt2", {"format": "seq2seq"}, r"data\.format=seq2seq trains an encoder-decoder .*`gpt2` is a decoder alone"),
        ("t5", {"format": "prompt_completion", "columns": {"prompt": "source", "completion": "target"}},
         r"data\.format=prompt_completion trains a decoder, but `t5` has an encoder; use seq2seq"),
    ],
)  # fmt: skip
def test_the_format_must_fit_the_architecture(
    model_type: str, data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"scratch": {"model_type": model_type, "vocab_size": 300}},
            "data": {"train": "x.jsonl", "max_length": 64, **data},
        }
    )
    with pytest.raises(ConfigError, match=message):
        setup.load_source(config, ROWS, tmp_path / "init")
