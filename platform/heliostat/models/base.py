"""Load models and tokenizers: for training, and whole for inference. Knows nothing of data, Ray or DeepSpeed.

Only safetensors and GGUF weights are read, and no code that comes with a model is ever run.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import is_flash_attn_2_available

from heliostat import state, storage
from heliostat.errors import ModelError
from heliostat.models import bundle, files, remote
from heliostat.models.languages import languages_of
from heliostat.tasks import Task

ADAPTER_CONFIG = "adapter_config.json"

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


_CLASSES: dict[Task, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_NAMES: dict[Task, str] = {
    "causal_lm": "language model",
    "seq2seq": "encoder-decoder",
    "classification": "classifier (`heliostat evaluate` scores it, and the endpoint answers at /classify)",
}
# What the names of a task's architectures end with, in config.json.
_ARCHITECTURES: dict[Task, str] = {"classification": "ForSequenceClassification"}


@dataclass(frozen=True)
class Head:
    """What a model's outputs are: tokens, or labels, which are kept in its config."""

    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty: as the model's config says."""
    pad_token_id: int | None = None
    """By which a classifier finds the end of a text; needed with labels."""

    def keys(self) -> dict[str, Any]:
        """What the model's config must say."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "pad_token_id": self.pad_token_id,
        }


NEXT_TOKEN = Head()
"""Of a language model."""


@dataclass(frozen=True)
class InferenceModel:
    """A model ready for use: eval mode, decoding defaults in `model.generation_config`.

    Adapters are merged into the weights; one of virtual tokens cannot be, and `model` is then a
    `prefixed.VirtualTokensModel`.
    """

    model: Any
    tokenizer: Any
    manifest: dict[str, Any] | None
    path: str
    task: Task = "causal_lm"

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier, in the order of their numbers."""
        return tuple(self.model.config.id2label[number] for number in range(self.model.config.num_labels))

    def check_task(self, *needed: Task) -> None:
        """Raises:
        ModelError: the model is made for none of these tasks.
        """
        if self.task not in needed:
            raise ModelError(f"{self.path}: is a {_NAMES[self.task]}, and a {_NAMES[needed[0]]} is needed here")


def resolve(reference: str) -> str:
    """A folder or hub name that transformers can load: URIs are fetched and packages looked up, GGUF files converted
    (once), bundles verified.

    Raises:
        ModelError: it does not exist, or is not to be trusted.
    """
    place = remote.fetch(reference) if storage.is_remote(reference) else files.locate(reference)
    if isinstance(place, str):
        return place
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelError(f"model `{reference}`: is a file, but neither a model folder nor a .gguf file")
        return str(convert_gguf(place))
    if not (place / "config.json").exists() and not (place / ADAPTER_CONFIG).exists():
        raise ModelError(f"model `{reference}`: the folder has no config.json, so it is not a model folder")
    files.refuse_unsafe(place)
    if (place / bundle.MANIFEST).exists():
        bundle.verify(place)
    return str(place)


def convert_gguf(path: Path) -> Path:
    """A Hugging Face folder with the de-quantised weights of a GGUF file; made once and kept, keyed by content."""
    target = state.converted_models() / f"{path.stem}-{files.sha256(path)[:12]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # transformers draws a progress bar here that no setting switches off.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with errors_named(str(path)), tempfile.TemporaryDirectory(dir=target.parent) as scratch, quiet:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers keeps the GGUF quantisation in the config, and then refuses to save the plain weights.
        del model.config.quantization_config
        plain = AutoModelForCausalLM.from_config(model.config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**source).save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.exists():  # else another process was quicker, with the same weights
                raise
    return target


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The fast tokenizer of a resolved model.

    Raises:
        ModelError: there is none, or it needs code of its own.
    """
    with errors_named(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(
            f"model `{source}`: has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str, revision: str | None = None) -> Any:
    """The architecture's config of a resolved model.

    Raises:
        ModelError: it does not exist or needs code of its own.
    """
    with errors_named(source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def task_of(source: str) -> Task:
    """The task of a resolved model: as its manifest says, else as its architecture's name does.

    Raises:
        ModelError: it does not exist, needs code of its own, or is made for a task that is not known here.
    """
    folder = Path(source)
    if (folder / bundle.MANIFEST).exists():
        named: Task = bundle.read_manifest(folder).get("task", "causal_lm")
        if named not in _CLASSES:
            raise ModelError(f"{folder}: its task is `{named}`, which this version does not know; install a newer one")
        return named
    if (folder / ADAPTER_CONFIG).exists():
        return "causal_lm"
    config = load_config(source)
    names = config.architectures or []
    found = (task for task, ending in _ARCHITECTURES.items() if any(name.endswith(ending) for name in names))
    return next(found, "seq2seq" if config.is_encoder_decoder else "causal_lm")


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    attention: str | None = None,
    head: Head = NEXT_TOKEN,
    options: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """The model with its weights, in `dtype`. A head that the stored model lacks gets random weights.

    `options` are more of `from_pretrained`'s.

    Raises:
        ModelError: it cannot be loaded, or has no safetensors weights.
    """
    with errors_named(source):
        model = _CLASSES[head.task].from_pretrained(
            source,
            **head.keys(),
            revision=revision,
            dtype=dtype,
            attn_implementation=attention or default_attention(),
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    return _without_cache(model, head)


def new_model(
    config_folder: str,
    *,
    seed: int,
    dtype: torch.dtype,
    attention: str | None = None,
    head: Head = NEXT_TOKEN,
    revision: str | None = None,
) -> Any:
    """Randomly initialised weights for the config.json in `config_folder`: equal seeds give equal weights."""
    config = load_config(config_folder, revision)
    for key, value in head.keys().items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    with errors_named(config_folder):
        made = _CLASSES[head.task].from_config(config, attn_implementation=attention or default_attention())
    return _without_cache(made.to(dtype), head)


def _without_cache(model: Any, head: Head) -> Any:
    """Classifiers read a text once: keys and values that are kept would never be used."""
    if head.task == "classification":
        model.config.use_cache = False
    return model


def grow(model: Any, vocabulary: int, *, seed: int = 0) -> None:
    """Give `model` at least `vocabulary` embeddings; the new ones are drawn around the mean of the others.

    See https://nlp.stanford.edu/~johnhew/vocab-expansion.html. Equal seeds give equal embeddings.
    """
    if model.config.get_text_config().vocab_size < vocabulary:
        torch.manual_seed(seed)
        model.resize_token_embeddings(vocabulary, mean_resizing=True)


def default_attention() -> str:
    """Flash attention where it is installed and can run, else PyTorch's scaled-dot-product attention."""
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def load_for_inference(reference: str, *, device: str = "cpu", dtype: str | None = None) -> InferenceModel:
    """A bundle folder, model folder, GGUF file or hub name, ready for its task; bundles are verified first.

    `dtype` (float32, bfloat16, ...) defaults to float32 on CPUs and to the stored one elsewhere.

    Raises:
        ModelError: it does not exist, is damaged, or must not be trusted.
    """
    source = resolve(reference)
    folder = Path(source)
    manifest = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).exists() else None
    kind: Any = getattr(torch, dtype) if dtype else (torch.float32 if device == "cpu" else "auto")
    tokenizer = load_tokenizer(source)
    task = task_of(source)
    if task == "seq2seq" and None in languages_of(tokenizer):
        raise ModelError(
            f"model `{source}`: its tokenizer names no src_lang and tgt_lang, so it is unknown between which languages "
            "it is to translate; write both in its tokenizer_config.json, or train it (model.src_lang, model.tgt_lang)"
        )
    if (folder / ADAPTER_CONFIG).exists():
        head = Head(task, tuple((manifest or {}).get("labels") or ()), tokenizer.pad_token_id)
        model = load_adapter(folder, dtype=kind, head=head)
    else:
        model = load_model(source, dtype=kind, attention="sdpa", head=Head(task))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return InferenceModel(model.to(device).eval(), tokenizer, manifest, source, task)


def load_untrained(config_folder: str, *, seed: int) -> InferenceModel:
    """The randomly initialised model that a from-scratch training starts from, to compare with."""
    task = task_of(config_folder)
    model = new_model(config_folder, seed=seed, dtype=torch.float32, attention="sdpa", head=Head(task))
    return InferenceModel(model.eval(), load_tokenizer(config_folder), None, config_folder, task)


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's description of the adapter in `folder`.

    Raises:
        ModelError: it is damaged.
    """
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return {**content, "base_model_name_or_path": str(content["base_model_name_or_path"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: is damaged or names no base model ({error!r})") from error


def base_of(folder: Path) -> str:
    """The resolved base model of the adapter in `folder`.

    Raises:
        ModelError: it cannot be found, or has other weights than those the adapter was trained on.
    """
    manifest = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).exists() else {}
    trained_on = manifest.get("base") or {}
    # The adapter itself names the copy on the machine that trained it.
    named = str(trained_on.get("reference"))
    base = resolve(named if storage.is_remote(named) else adapter_config(folder)["base_model_name_or_path"])
    digest = trained_on.get("sha256")
    if digest and Path(base).is_dir() and files.weights_sha256(Path(base)) != digest:
        raise ModelError(f"{folder}: its base model {base} has other weights than those the adapter was trained on")
    return base


def load_adapter(folder: Path, *, dtype: Any, head: Head = NEXT_TOKEN) -> Any:
    """The base model that the adapter in `folder` names, with the adapter: in its weights, where that can be.

    Raises:
        ModelError: see `base_of`; or the two do not fit together.
    """
    from peft import PeftModel

    from heliostat.models import prefixed

    model = load_model(base_of(folder), dtype=dtype, attention="sdpa", head=head)
    with errors_named(str(folder)):
        # The adapter brings the values; those of new tokens are the last ids.
        grow(model, 1 + max(added_tokens(folder), default=-1))
        if has_virtual_tokens(folder):
            return prefixed.load(model, folder)
        apart = _untie(model)
        loaded = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
        merged = loaded.merge_and_unload(safe_merge=True)
        if apart:
            _tie(merged)
        return merged


def added_tokens(folder: Path) -> list[int]:
    """The ids whose embeddings the adapter in `folder` brings along."""
    found = adapter_config(folder).get("trainable_token_indices") or []
    return sorted({token for ids in found.values() for token in ids} if isinstance(found, dict) else found)


def has_virtual_tokens(folder: Path) -> bool:
    """Whether the adapter in `folder` puts virtual tokens before every text, and so cannot be merged."""
    return adapter_config(folder).get("peft_type") in ("PREFIX_TUNING", "PROMPT_TUNING")


def _untie(model: Any) -> bool:
    """Give the output layer weights of its own, if it shares those of the embeddings.

    What is merged into one of two layers that share their weights would change the other.
    """
    output = model.get_output_embeddings()
    shared = output is not None and output.weight is model.get_input_embeddings().weight
    if shared:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    return shared


def _tie(model: Any) -> None:
    """Undo `_untie`, unless the layers have come to differ; the model's config then says that they do."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    same = torch.equal(first.weight, last.weight)
    if same:
        last.weight = first.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = same


@contextlib.contextmanager
def errors_named(source: str) -> Iterator[None]:
    """Turn what transformers raises for a missing, offline or unreadable model into one clear error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise ModelError(
            f"model `{source}`: cannot be loaded: {reason} "
            "(without internet, model.model_name_or_path must be a local folder, a GGUF file or an installed package)"
        ) from error
