"""An adapter trains few weights, loads with PEFT alone, merges to the same model, and belongs to one base only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GenerationConfig

from heliostat.errors import ConfigError, ModelError
from heliostat.models import adapters, base, bundle, files
from heliostat.models.config import AdapterConfig
from tests import tiny

IDS = torch.tensor([[261, 297, 293, 275, 268, 270]])
Attach = Callable[..., Any]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("adapters") / "base", request.param)


@pytest.fixture
def attach(base_folder: Path) -> Attach:
    def make(seed: int = 1, **settings: Any) -> Any:
        model = base.load_model(str(base_folder), dtype=torch.float32)
        config = AdapterConfig(method="lora", **{"lora_r": 4, **settings})
        return adapters.attach(model, config, base=str(base_folder), seed=seed)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def trained(model: Any) -> Any:
    """The model after two steps, so that the adapter is not the zero it starts as."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapter_bundle(folder: Path, base_folder: Path, model: Any) -> Path:
    """A bundle of the adapter, as training writes it."""
    model.save_pretrained(folder.with_name("adapter"))
    return bundle.write(
        folder, weights=folder.with_name("adapter"), tokenizer=tiny.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=8, eos_token_id=0),
        manifest={"base": {"reference": str(base_folder), "sha256": files.weights_sha256(base_folder)}},
    )  # fmt: skip


def test_only_adapters_are_trained_and_they_begin_as_nothing(attach: Attach, base_folder: Path) -> None:
    model = attach()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in names)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base_folder)))


def test_equal_seeds_give_equal_adapters(attach: Attach) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        return [parameter for name, parameter in attach(seed).named_parameters() if "lora_A" in name]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_settings_are_pefts(attach: Attach) -> None:
    plain = attach().peft_config["default"]
    assert (plain.r, plain.lora_alpha, plain.lora_dropout) == (4, 8, 0.0)
    own = attach(lora_alpha=5, lora_dropout=0.5, lora_r=2).peft_config["default"]
    assert (own.r, own.lora_alpha, own.lora_dropout) == (2, 5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "`use_dora` needs `method: lora` or `qlora`"),
        ({"use_rslora": True}, "`use_rslora` needs `method: lora` or `qlora`"),
        ({"loraplus_lr_ratio": 16}, "`loraplus_lr_ratio` needs `method: lora` or `qlora`"),
        ({"method": "qlora", "init_lora_weights": "pissa"}, "`init_lora_weights` needs `method: lora`"),
        ({"method": "lora", "quantization_bit": 8}, "`quantization_bit` needs `method: qlora`"),
        ({"method": "prompt", "prefix_projection": True}, "`prefix_projection` needs `method: prefix`"),
        ({"method": "prompt", "merge": True}, "virtual tokens cannot be merged into weights; leave `merge` out"),
        ({"method": "prompt", "prompt_tuning_init": "TEXT"}, "`prompt_tuning_init_text` need each other"),
        ({"method": "prefix", "encoder_hidden_size": 8}, "`encoder_hidden_size` needs `prefix_projection: true`"),
        ({"method": "lora", "init_lora_weights": "pissa_niter_0"}, "should match pattern"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_with_the_method(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**settings)


def test_modules_that_are_not_there_are_named(attach: Attach) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.lora_target_modules: .*q_projection") as caught:
        attach(lora_target_modules=["q_projection"])
    assert "\n" not in str(caught.value)


def test_peft_alone_loads_the_saved_adapter(attach: Attach, tmp_path: Path) -> None:
    model = trained(attach())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_merged_and_loaded_it_is_the_model_that_was_trained(
    attach: Attach, base_folder: Path, variant: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(attach(**variant))
    expected = logits(model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base_folder))).abs().max() > 0.1
    loaded = base.load_for_inference(str(adapter_bundle(tmp_path / "bundle", base_folder, model)))
    assert torch.allclose(logits(loaded.model), expected, atol=1e-4)
    assert loaded.model.generation_config.max_new_tokens == 8
    merged = adapters.merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (merged / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.float32
    assert torch.allclose(logits(plain), expected, atol=1e-4)


def tied_model(like: Path, folder: Path) -> Any:
    """A model of the kind of `like`, saved at `folder`, whose output layer shares the weights of its embeddings."""
    kind = json.loads((like / "config.json").read_text())["model_type"]
    model = base.load_model(str(tiny.write_model(folder, kind, tie_word_embeddings=True)), dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("chosen", ["embeddings", "output", "both"])
@pytest.mark.parametrize("key", ["lora_target_modules", "modules_to_save"])
def test_layers_that_share_weights_come_apart_where_an_adapter_changes_one(
    key: str, chosen: str, base_folder: Path, tmp_path: Path
) -> None:
    """The embeddings and the output layer are one matrix; the adapter changes one of them, or both differently."""
    tied = tied_model(base_folder, tmp_path / "base")
    names = {"embeddings": ["wte", "embed_tokens"], "output": ["lm_head"]}
    wanted = [*names["embeddings"], *names["output"]] if chosen == "both" else names[chosen]
    there = [name for name in wanted if any(name == found.split(".")[-1] for found, _ in tied.named_modules())]
    attention = ["c_attn"] if tied.config.model_type == "gpt2" else ["q_proj"]
    settings = {"lora_target_modules": attention, key: [*(attention if key == "lora_target_modules" else ()), *there]}
    config = AdapterConfig(method="lora", lora_r=4, **settings)
    model = trained(adapters.attach(tied, config, base=str(tmp_path / "base"), seed=1))
    expected = logits(model)
    adapters.save(model, tmp_path / "adapter", None)
    merged = adapters.merge(tmp_path / "adapter", tmp_path / "merged")
    for loaded in (
        base.load_adapter(tmp_path / "adapter", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(merged),
    ):
        assert torch.allclose(logits(loaded), expected, atol=1e-4)


def test_layers_that_share_weights_still_do_where_no_adapter_changes_them(base_folder: Path, tmp_path: Path) -> None:
    tied = tied_model(base_folder, tmp_path / "base")
    model = adapters.attach(tied, AdapterConfig(method="lora", lora_r=4), base=str(tmp_path / "base"), seed=1)
    adapters.save(model, tmp_path / "adapter", None)
    loaded = base.load_adapter(tmp_path / "adapter", dtype=torch.float32)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.config.tie_word_embeddings


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}], ids=str
)
def test_pissa_begins_as_the_base_and_is_saved_for_it(
    attach: Attach, base_folder: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    untouched = AutoModelForCausalLM.from_pretrained(base_folder)
    model = attach(**{"init_lora_weights": "pissa", **settings})
    assert torch.allclose(logits(model), logits(untouched), atol=1e-4)
    began = adapters.beginning(model)
    assert began is not None
    assert all(weight.abs().max() > 0 for weight in began.values())
    adapters.save(trained(model.train()), tmp_path / "adapter", began)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    assert not torch.allclose(logits(model), logits(untouched), atol=0.1)
    assert loaded.peft_config["default"].r == 8


def test_another_base_than_the_trained_one_is_refused(attach: Attach, base_folder: Path, tmp_path: Path) -> None:
    own_base = tmp_path / "base"
    shutil.copytree(base_folder, own_base)
    model = attach()
    model.peft_config["default"].base_model_name_or_path = str(own_base)
    made = adapter_bundle(tmp_path / "bundle", own_base, model)
    base.load_for_inference(str(made))
    weights = bytearray((own_base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (own_base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=f"its base model {own_base} has other weights than those the adapter was"):
        base.load_for_inference(str(made))
    shutil.rmtree(own_base)
    with pytest.raises(ModelError, match=f"model `{own_base}`: no such file or folder"):
        base.load_for_inference(str(made))


def test_an_adapter_of_another_shape_is_refused(attach: Attach, base_folder: Path, tmp_path: Path) -> None:
    attach().save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(ModelError, match=r"adapter`: cannot be loaded: .*size mismatch"):
        base.load_adapter(tmp_path / "adapter", dtype=torch.float32)
