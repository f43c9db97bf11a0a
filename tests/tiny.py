"""Small models with random weights, for tests that need a real one but not a good one."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from heliostat.data.formats import CHATML
from heliostat.models.base import Head
from heliostat.models.scratch import train_tokenizer

KEYS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}
"""Keys for `write_model`: losses then do not depend on chance."""
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": {
        "d_model": 32,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        "max_position_embeddings": 128,
    },
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64},
}
TEXTS = [f"the {a} {b} goes to the {c} at {n} o'clock" for a in ["red", "big", "old"] for b in ["cat", "dog", "man"]
         for c in ["house", "river", "market"] for n in range(4)]  # fmt: skip


def tokenizer(*, ends: bool = False) -> Any:
    """A byte-level BPE tokenizer with a ChatML template; with `ends`, one for encoder-decoders, which do not chat."""
    made = train_tokenizer(TEXTS, 400, 128, chat=True, ends=ends)
    made.chat_template = None if ends else CHATML
    return made


LABELS = ("cat", "dog", "man")


def write_classifier(folder: Path, model_type: str, labels: tuple[str, ...] = LABELS) -> Path:
    """Write a random classifier and its tokenizer to `folder`."""
    made = tokenizer()
    head = Head("classification", labels, made.pad_token_id).keys()
    config = AutoConfig.for_model(model_type, vocab_size=len(made), **KEYS[model_type])
    config.update({**head, "eos_token_id": made.eos_token_id})
    torch.manual_seed(0)
    return _save(AutoModelForSequenceClassification.from_config(config), made, folder)


def write_model(folder: Path, model_type: str, **keys: Any) -> Path:
    """Write a random model and its tokenizer to `folder`. `keys`: more of its config."""
    pairs = model_type in ENCODER_DECODERS
    made = tokenizer(ends=pairs)
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    if pairs:
        ids |= {"decoder_start_token_id": made.bos_token_id, "forced_eos_token_id": None}
    shape = (ENCODER_DECODERS if pairs else KEYS)[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=len(made), **ids, **shape, **keys)
    torch.manual_seed(0)
    return _save((AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM).from_config(config), made, folder)


def _save(model: Any, made: Any, folder: Path) -> Path:
    # The usual initialisation is so small that all logits are alike; spread, greedy decoding has clear winners.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
