"""Tiny random models whose completions are as long as asked for, and their versions in the registry."""

from pathlib import Path

from transformers import GenerationConfig

from heliostat.models import base, bundle, scratch
from heliostat.registry import store, versions
from heliostat.registry.versions import ModelVersion
from tests import tiny

POSITIONS = 512


def write_long_bundle(folder: Path, seed: int = 1, width: int = 32, layers: int = 2) -> Path:
    """A bundle without an end token; other seeds answer otherwise."""
    weights = folder.with_name(f"{folder.name}-weights")
    keys = {"n_embd": width, "n_layer": layers, "n_head": 2, "initializer_range": 0.3}
    scratch.write(weights, tiny.tokenizer(), "gpt2", keys, POSITIONS)
    base.load_untrained(str(weights), seed=seed).model.save_pretrained(weights)
    config = GenerationConfig(max_new_tokens=POSITIONS // 2, do_sample=False, pad_token_id=1, bos_token_id=0)
    manifest = {"task": "causal_lm", "format": "text"}
    tokenizer = tiny.tokenizer()
    return bundle.write(folder, weights=weights, tokenizer=tokenizer, generation_config=config, manifest=manifest)


def register_long_bundle(folder: Path, name: str, seed: int, alias: str = "challenger") -> ModelVersion:
    """The same, as a new version of the model `name`."""
    run_id = store.client().create_run(store.experiment_id("serving")).info.run_id
    return versions.register(run_id, write_long_bundle(folder, seed), name, {}, alias=alias)
