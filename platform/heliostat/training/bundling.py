"""Exported weights -> the bundle: adds tokenizer, decoding defaults, and where the model comes from."""

import importlib.metadata
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from heliostat import __version__, journal
from heliostat.data.tokens import TokenDataset
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, bundle, files
from heliostat.models.base import Head
from heliostat.models.languages import generation_start
from heliostat.training.setup import Source

# Documents looked at to find out which special token ends a turn.
_SAMPLE = 1000


def write(config: ExperimentConfig, run_folder: Path, source: Source, tokens: Path, lineage: dict[str, Any]) -> Path:
    """Make `<run folder>/bundle` from `<run folder>/weights`."""
    weights = run_folder / "weights"
    if config.adapter.merge and (weights / "adapter_config.json").exists():
        from heliostat.models import adapters  # PEFT takes seconds to import

        head = Head(config.data.task, source.labels, source.tokenizer.pad_token_id)
        weights = adapters.merge(weights, run_folder / "merged", head)
    made = assemble(config, weights, run_folder / "bundle", source, tokens, lineage)
    shutil.rmtree(run_folder / "merged", ignore_errors=True)
    return made


def assemble(
    config: ExperimentConfig, weights: Path, target: Path, source: Source, tokens: Path, lineage: dict[str, Any]
) -> Path:
    """Make a bundle at `target` from exported weights, which are linked."""
    generates = config.data.task != "classification"
    stops = stop_token_ids(TokenDataset.open(tokens), source.tokenizer) if generates else []
    manifest = {
        "task": config.data.task,
        "labels": list(source.labels) or None,
        "format": config.data.format,
        "prompt_template": config.data.prompt_template,
        "stop_token_ids": stops,
        "check_prompts": config.registry.check_prompts,
        "base": _base(config, source),
        **({"continues": config.model.model_name_or_path} if source.continues else {}),
        "lineage": lineage,
    }
    return bundle.write(
        target,
        weights=weights,
        tokenizer=source.tokenizer,
        generation_config=_generation_config(config, source, stops) if generates else None,
        manifest=manifest,
    )


def _generation_config(config: ExperimentConfig, source: Source, stops: list[int]) -> GenerationConfig:
    model = base.load_config(source.path, config.model.revision)
    start = {"decoder_start_token_id": model.decoder_start_token_id} if model.is_encoder_decoder else {}
    return GenerationConfig(
        eos_token_id=stops,
        pad_token_id=source.tokenizer.pad_token_id,
        bos_token_id=source.tokenizer.bos_token_id,
        **{**start, **generation_start(source.tokenizer)},
        **config.generation.model_dump(exclude_none=True),
    )


def stop_token_ids(tokens: TokenDataset, tokenizer: Any) -> list[int]:
    """The end token, and the special token that most documents end with where that is another (the end of a turn)."""
    documents = [tokens.document(index)[0] for index in range(min(_SAMPLE, len(tokens)))]
    # A template's own end of turn is the last token, or the last but one where the end token was put after it.
    places = [Counter(int(ids[place]) for ids in documents if len(ids) >= -place) for place in (-2, -1)]
    ends = [token for place in places for token, _ in place.most_common(1) if token in tokenizer.added_tokens_decoder]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def lineage(config_hash: str, data_hash: str, run: str) -> dict[str, Any]:
    """What the model was made by and from."""
    packages = ("torch", "transformers", "deepspeed", "peft", "ray")
    return {
        "run": run,
        "config_hash": config_hash,
        "data_hash": data_hash,
        "git_commit": git_commit(),
        "heliostat": __version__,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def git_commit() -> str | None:
    """The commit of the current directory's repository, marked when there are changes on top; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _base(config: ExperimentConfig, source: Source) -> dict[str, Any] | None:
    if source.from_scratch:
        return None
    folder = Path(source.path)
    return {
        "reference": source.path if source.continues else config.model.model_name_or_path,
        "revision": config.model.revision,
        "sha256": files.weights_sha256(folder) if folder.is_dir() else None,
    }


def final_metrics(run_folder: Path) -> dict[str, float]:
    """The last value of every metric, but those of the evaluation with the lowest loss."""
    latest: dict[str, float] = {}
    best: dict[str, float] = {}
    for row in journal.read(run_folder / journal.NAME)[0]:
        metrics = row["metrics"]
        if "eval_loss" in metrics:
            best = min(best or metrics, metrics, key=lambda found: found["eval_loss"])
        latest.update(metrics)
    return {name: value for name, value in {**latest, **best}.items() if not name.startswith("progress.")}
