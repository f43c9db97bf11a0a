"""A new model is what the configuration says: its vocabulary, its special tokens, its shape, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.errors import ConfigError, ModelError
from heliostat.models import base, scratch
from tests.tiny import TEXTS

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 32, "n_head": 2},
    "llama": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    "qwen3": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip


def tokenizer(vocab_size: int = 300, *, chat: bool = False) -> Any:
    return scratch.train_tokenizer(TEXTS, vocab_size, 64, chat=chat)


def test_special_tokens_are_tokens_of_their_own() -> None:
    plain, chat = tokenizer(), tokenizer(chat=True)
    for made in (plain, chat):
        assert (made.eos_token, made.bos_token, made.pad_token) == (scratch.END, scratch.END, scratch.PAD)
        assert made.pad_token_id != made.eos_token_id, "padding that looks like the end would be learned as it"
        assert made.model_max_length == 64
    for token in scratch.CHAT_TOKENS:
        assert len(chat(token)["input_ids"]) == 1
        assert len(plain(token)["input_ids"]) > 1
    text = f"a{scratch.CHAT_TOKENS[0]}b{scratch.END}c"
    assert chat.decode(chat(text)["input_ids"], skip_special_tokens=True) == "abc"


@pytest.mark.parametrize("text", ["the red cat", " two  spaces ", "naïve 数 🙂\n\ttab", "", "a\u0000b"])
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    made = tokenizer()
    assert made.decode(made(text)["input_ids"]) == text


@pytest.mark.parametrize("vocab_size", [270, 300, 5000])
@pytest.mark.parametrize("chat", [False, True])
def test_the_vocabulary_is_at_most_as_large_as_asked(vocab_size: int, chat: bool) -> None:
    made = tokenizer(vocab_size, chat=chat)
    assert len(made) <= vocab_size
    assert max(made.get_vocab().values()) == len(made) - 1
    assert len(made("the red cat")["input_ids"]) < len("the red cat"), "merges were learned"


def test_equal_texts_give_equal_tokenizers() -> None:
    assert tokenizer().backend_tokenizer.to_str() == tokenizer().backend_tokenizer.to_str()


@pytest.mark.parametrize("model_type", list(SHAPES))
def test_the_written_folder_is_the_model_asked_for(model_type: str, tmp_path: Path) -> None:
    made = tokenizer(chat=True)
    folder = scratch.write(tmp_path / "init", made, model_type, SHAPES[model_type], 64)
    config = base.load_config(str(folder))
    assert {key: getattr(config, key) for key in SHAPES[model_type]} == SHAPES[model_type]
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == (model_type, len(made), 64)
    assert (config.eos_token_id, config.pad_token_id) == (made.eos_token_id, made.pad_token_id)
    assert base.load_tokenizer(str(folder)).get_vocab() == made.get_vocab()
    model = base.new_model(str(folder), seed=1, dtype=torch.float32)
    again = base.new_model(str(folder), seed=1, dtype=torch.float32)
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        logits = model.eval()(ids).logits
        assert logits.shape == (1, 64, len(made))
        assert torch.equal(again.eval()(ids).logits, logits)


@pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings"])
def test_the_context_length_can_be_set_by_either_name(key: str, tmp_path: Path) -> None:
    folder = scratch.write(tmp_path / "init", tokenizer(), "gpt2", {**SHAPES["gpt2"], key: 128}, 64)
    assert base.load_config(str(folder)).n_positions == 128


def test_a_key_that_the_architecture_has_not_is_refused(tmp_path: Path) -> None:
    """transformers would take it in silence and train another model."""
    with pytest.raises(ConfigError) as caught:
        scratch.write(tmp_path / "init", tokenizer(), "gpt2", {"n_layers": 3}, 64)
    text = str(caught.value)
    assert text.startswith("model.scratch.config.n_layers: gpt2 has no such key; it has ")
    assert {"n_layer", "n_embd", "num_hidden_layers"} <= set(text.split("it has ")[1].split(", "))
    assert not (tmp_path / "init").exists()


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.scratch\.model_type: transformers has no architecture `gpt7`"):
        scratch.write(tmp_path / "init", tokenizer(), "gpt7", {}, 64)
    assert not (tmp_path / "init").exists()


def test_values_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.scratch\.config: gpt2 refuses it: .*n_layer"):
        scratch.write(tmp_path / "wrong type", tokenizer(), "gpt2", {"n_layer": "many"}, 64)
    folder = scratch.write(tmp_path / "init", tokenizer(), "gpt2", {"n_embd": 30, "n_head": 4}, 64)
    with pytest.raises(ModelError, match="divisible"):
        base.new_model(str(folder), seed=1, dtype=torch.float32)


def test_the_vocabulary_and_special_tokens_are_always_the_tokenizers(tmp_path: Path) -> None:
    made = tokenizer()
    keys = {**SHAPES["gpt2"], "vocab_size": 7, "eos_token_id": 99}
    folder = scratch.write(tmp_path / "init", made, "gpt2", keys, 64)
    written = json.loads((folder / "config.json").read_text())
    assert (written["vocab_size"], written["eos_token_id"]) == (len(made), made.eos_token_id)
