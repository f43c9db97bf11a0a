"""Models load by every kind of reference with exactly their weights; those that cannot be trusted do not load."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from heliostat import state
from heliostat.errors import ModelError
from heliostat.models import base, scratch
from tests import tiny
from tests.bundles import write_bundle

PROMPT = "the red cat goes to the house"
# Hugging Face's names of a Llama layer's weights -> llama.cpp's.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def model_folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a model folder to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "model"))


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([ids])).logits
    return result


def write_gguf(folder: Path, path: Path) -> Path:
    """The Llama model in `folder` as an unquantised GGUF file, as llama.cpp writes it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, base.load_tokenizer(str(folder))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [int(gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL) for token in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        short = gguf_name(name)
        count = next((number for part, number in heads.items() if f".{part}." in short), None)
        writer.add_tensor(short, (interleaved(tensor, count) if count else tensor).numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    if name in outer:
        return outer[name]
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(middle)]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs, Hugging Face halves: the rows of q and k are in another order."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape).contiguous()


def test_a_gguf_file_gives_exactly_the_weights_it_was_written_from(llama: Path, tmp_path: Path) -> None:
    loaded = base.load_for_inference(str(write_gguf(llama, tmp_path / "tiny.gguf")))
    original = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = base.load_tokenizer(str(llama))(PROMPT)["input_ids"]
    assert loaded.tokenizer(PROMPT)["input_ids"] == ids
    assert torch.equal(logits(loaded.model, ids), logits(original, ids))
    assert loaded.manifest is None
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == (scratch.END, scratch.PAD)


def test_a_gguf_file_is_converted_once_and_known_by_its_content(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "tiny.gguf")
    first = Path(base.resolve(str(path)))
    assert first.parent == state.converted_models()
    written = (first / "model.safetensors").stat().st_mtime_ns
    moved = shutil.copy(path, tmp_path / "sub.gguf")
    assert base.resolve(str(path)) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert Path(base.resolve(str(moved))).name.split("-")[-1] == first.name.split("-")[-1]
    assert not first.stat().st_mode & 0o022
    assert first.stat().st_mode & 0o055 == 0o055, "others may read what another user's run converted"


def test_a_damaged_gguf_file_is_named_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    whole = write_gguf(llama, tmp_path / "tiny.gguf").read_bytes()
    for content in (b"", b"not gguf at all", whole[: len(whole) // 2]):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.gguf`: cannot be loaded"):
            base.resolve(str(path))
        assert list(state.converted_models().iterdir()) == []


def test_references_that_are_no_models_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty`: the folder has no config\.json, so it is not a model folder"):
        base.resolve(str(tmp_path / "empty"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"notes\.txt`: is a file, but neither a model folder nor a \.gguf file"):
        base.resolve(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match="no such file or folder"):
        base.resolve(str(tmp_path / "gone"))
    assert base.resolve("some/hub-name") == "some/hub-name"


def test_a_hub_name_without_the_hub_is_one_clear_error() -> None:
    for load in (
        base.load_tokenizer,
        base.load_config,
        base.load_for_inference,
        lambda name: base.load_model(name, dtype=torch.float32),
    ):
        with pytest.raises(ModelError, match=r"model `no-such/model`: cannot be loaded: .*") as caught:
            load("no-such/model")
        text = str(caught.value)
        assert "must be a local folder, a GGUF file or an installed package" in text
        assert "\n" not in text


@pytest.mark.parametrize("load", [base.resolve, base.load_for_inference])
def test_pickles_and_remote_code_never_load(load: Any, model_folder: Path) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights"):
        load(str(model_folder))
    (model_folder / "pytorch_model.bin").unlink()
    config = json.loads((model_folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "modeling.py").write_text("raise SystemExit('code of the model was run')")
    with pytest.raises(ModelError, match=r"config\.json: has an `auto_map`"):
        load(str(model_folder))


def test_weights_other_than_safetensors_are_not_looked_for(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "weights.h5")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*safetensors"):
        base.load_model(str(model_folder), dtype=torch.float32)


def test_damaged_weights_and_configs_are_one_clear_error(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        base.load_model(str(model_folder), dtype=torch.float32)
    (model_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        base.load_tokenizer(str(model_folder))


def test_a_tokenizer_without_padding_pads_with_its_end_token(model_folder: Path) -> None:
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["pad_token"] = None
    path.write_text(json.dumps(settings))
    assert base.load_tokenizer(str(model_folder)).pad_token == scratch.END


def test_new_weights_follow_from_the_seed(tiny_bundle: Path) -> None:
    def weights(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        torch.manual_seed(0)
        found: torch.Tensor = base.new_model(str(tiny_bundle), seed=seed, dtype=dtype).transformer.wte.weight
        return found

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert weights(1, torch.bfloat16).dtype == torch.bfloat16
    untrained = base.load_untrained(str(tiny_bundle), seed=1)
    assert torch.equal(untrained.model.transformer.wte.weight, weights(1))
    assert not untrained.model.training


def test_the_dtype_is_as_asked(tiny_bundle: Path) -> None:
    assert base.load_for_inference(str(tiny_bundle)).model.dtype == torch.float32
    loaded = base.load_for_inference(str(tiny_bundle), dtype="bfloat16").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


def test_a_bundle_is_verified_before_it_is_loaded(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "bundle", format="chat")
    loaded = base.load_for_inference(str(made))
    assert loaded.manifest is not None
    assert loaded.manifest["format"] == "chat"
    assert loaded.path == str(made)
    assert loaded.model.generation_config.max_new_tokens == 8, "the bundle's decoding settings, not the model's"
    (made / "extra.txt").touch()
    with pytest.raises(ModelError, match=r"extra\.txt: does not belong to the bundle"):
        base.load_for_inference(str(made))
