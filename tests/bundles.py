"""Real bundles of tiny models, for tests that load, damage, register or ask them."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from heliostat.models import bundle
from tests import tiny


def write_bundle(folder: Path, model_type: str = "gpt2", **manifest: Any) -> Path:
    """A bundle at `folder` as training writes it; its weights stay linked in `<folder>-weights`."""
    weights = tiny.write_model(folder.with_name(f"{folder.name}-weights"), model_type)
    return bundle.write(
        folder,
        weights=weights,
        tokenizer=tiny.tokenizer(),
        generation_config=GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=[0], pad_token_id=1, bos_token_id=0
        ),
        manifest={"task": "causal_lm", "format": "prompt_completion", "prompt_template": None, **manifest},
    )
