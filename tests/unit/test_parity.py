"""The endpoint's engine is compared with `generate`: equal for sound bundles, refused where the engine goes wrong."""

import random
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from heliostat.data.config import DataConfig
from heliostat.errors import ConfigError, GateRefused, ModelError
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.models.config import ModelConfig
from heliostat.serving import parity
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine
from tests import tiny
from tests.bundles import write_bundle

SMALL = EndpointArgs(max_batch_tokens=48, cache_tokens=1024, max_ongoing_requests=8)


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("parity") / request.param, request.param)


def prompts(count: int) -> list[list[int]]:
    """Short ones, and some that are longer than the model."""
    rng = random.Random(0)
    return [[rng.randrange(2, 260) for _ in range(rng.choice([1, 7, 40, 300]))] for _ in range(count)]


def test_a_sound_bundle_passes(folder: Path) -> None:
    parity.check(folder, prompts(10), SMALL)


def test_sampling_settings_do_not_disturb_the_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = base.load_for_inference

    def load_hot(reference: str) -> base.InferenceModel:
        loaded = load(reference)
        loaded.model.generation_config = GenerationConfig(
            do_sample=True, top_k=5, eos_token_id=0, pad_token_id=1, bos_token_id=0, stop_strings=["e"]
        )
        return loaded

    monkeypatch.setattr(base, "load_for_inference", load_hot)
    parity.check(folder, prompts(4), SMALL)


def test_an_engine_that_sees_other_weights_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's model is disturbed while it serves, and whole again for `generate`."""
    start, close = Engine.start, Engine.close

    def disturb(engine: Engine) -> None:
        with torch.no_grad():
            for parameter in engine._model.get_output_embeddings().parameters():
                parameter.mul_(-1)

    async def start_disturbed(engine: Engine) -> None:
        disturb(engine)
        await start(engine)

    def close_repaired(engine: Engine) -> None:
        close(engine)
        disturb(engine)

    monkeypatch.setattr(Engine, "start", start_disturbed)
    monkeypatch.setattr(Engine, "close", close_repaired)
    with pytest.raises(GateRefused, match=r"prompt 1 of 3 differs after \d+ equal tokens of \d+"):
        parity.check(folder, prompts(3), SMALL)


def test_what_the_endpoint_cannot_decode_is_told(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match=r"config.json: is damaged"):
        parity.check(folder, prompts(1), SMALL)
    with pytest.raises(ModelError, match=r"raise serving.cache_tokens"):
        parity.check(write_bundle(tmp_path / "sound"), prompts(1), EndpointArgs(cache_tokens=32))


def config(folder: Path, test: Path | None) -> ExperimentConfig:
    data = DataConfig(train=str(folder / "train.jsonl"), test=str(test) if test else None, format="prompt_completion")
    return ExperimentConfig(name="parity", model=ModelConfig(model_name_or_path="unused"), data=data)


def test_prompts_are_those_of_the_test_rows(folder: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(f'{{"prompt": "the {word}", "completion": "x"}}\n' for word in ("cat", "dog", "man")))
    tokenizer = base.load_tokenizer(str(folder))
    taken = parity.prompts_for(folder, 2, config(tmp_path, test))
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in taken] == ["the cat", "the dog"]
    assert len(parity.prompts_for(folder, 50, config(tmp_path, test))) == 3
    parity.check(folder, taken, SMALL)


def test_without_test_rows_there_are_a_few_texts(folder: Path) -> None:
    taken = parity.prompts_for(folder, 8)
    assert len({tuple(ids) for ids in taken}) == 8
    assert all(taken)
    with pytest.raises(ConfigError, match=r"promotion.parity_prompts: 9, .* only 8"):
        parity.prompts_for(folder, 9)
