"""Which parameters a part's name stands for, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from heliostat.errors import ConfigError
from heliostat.models import freezing
from heliostat.models.config import AdapterConfig
from tests import tiny


@pytest.fixture(params=list(tiny.KEYS))
def model(request: pytest.FixtureRequest) -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(request.param, vocab_size=60, **tiny.KEYS[request.param])
    )


def learning(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_add_up(model: Any) -> None:
    everything = learning(model)
    freezing.freeze(model, ["embeddings"])
    without = learning(model)
    assert {name.split(".")[-2] for name in everything - without} <= {"wte", "wpe", "embed_tokens"}
    freezing.freeze(model, ["all-but-last-1", r"\.(mlp|ln_2|post_attention_layernorm)\."])
    assert learning(model) == {
        name for name in without if ".1." in name and ("attn" in name or "ln_1" in name or "input_" in name)
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["decoder.block"], "`decoder.block` is no parameter's name; they look like "),
        (["("], r"`\(` is no regular expression"),
        (["all-but-last-2"], "all-but-last-2 makes no sense with 2 blocks"),
        (["all-but-last-0"], "all-but-last-0 makes no sense"),
        (["embeddings", "."], "embeddings, . leaves nothing to learn"),
    ],
)
def test_what_makes_no_sense_is_told(model: Any, parts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.freeze: {message}"):
        freezing.freeze(model, parts)


@pytest.mark.parametrize("settings", [{"method": "freeze"}, {"freeze": ["embeddings"]}])
def test_the_method_and_its_parts_need_each_other(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need each other"):
        AdapterConfig.model_validate(settings)
