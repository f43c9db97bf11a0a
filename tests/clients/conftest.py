"""The endpoint's application for all clients: a tiny random chat model whose greedy answers `generate` knows, too."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from heliostat.models import base, scratch
from heliostat.serving.config import EndpointArgs
from tests import tiny
from tests.service import SIZES, listening

# Read when the libraries are imported: no look-ups on the internet, nothing sent anywhere.
os.environ.update({"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LANGSMITH_TRACING": "false"})

MAX_LENGTH = 512


@dataclass(frozen=True)
class Served:
    """What a client must know of the endpoint, and where its model lies."""

    base_url: str
    model: str
    api_key: str
    folder: Path


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an end token: a completion is as long as asked for."""
    folder = tmp_path_factory.mktemp("clients") / "tiny-chat"
    keys = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    scratch.write(folder, tiny.tokenizer(), "gpt2", keys, MAX_LENGTH)
    model = base.load_untrained(str(folder), seed=1).model
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def endpoint(model_folder: Path) -> Iterator[Served]:
    """The running endpoint."""
    args = EndpointArgs(**SIZES | {"cache_tokens": 8192})
    with listening(base.load_for_inference(str(model_folder)), args) as url:
        yield Served(f"{url}/v1", "tiny", "none", model_folder)


@pytest.fixture(scope="package")
def loaded(model_folder: Path) -> base.InferenceModel:
    """The served model, in this process."""
    return base.load_for_inference(str(model_folder))


Generated = Callable[[list[int], int], str]


@pytest.fixture(scope="package")
def generated(loaded: base.InferenceModel) -> Generated:
    """The greedy continuation of token ids by `generate` itself, of the given number of tokens."""
    import torch

    def continuation(ids: list[int], count: int) -> str:
        output = loaded.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return str(loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    return continuation


@pytest.fixture(scope="package")
def chat_ids(loaded: base.InferenceModel) -> Callable[[list[dict[str, str]]], list[int]]:
    """The ids of a conversation."""

    def render(messages: list[dict[str, str]]) -> list[int]:
        ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)

    return render
