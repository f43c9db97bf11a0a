"""A model from scratch: a byte-level BPE tokenizer trained on the data, and the config of a new one. Knows no weights.

The worker initialises the weights from the folder written here (`heliostat.models.base.new_model`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from heliostat.errors import ConfigError

END = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, *, chat: bool = False, ends: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; GPT-2's byte alphabet) of at most `vocab_size` entries.

    With `chat`, the ChatML turn markers are tokens of their own. With `ends` it puts the end token behind every text,
    as those of encoder-decoders do.
    """
    special = [END, PAD, *(CHAT_TOKENS if chat else ())]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False)
    if ends:
        bpe._tokenizer.post_processor = TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, bpe.token_to_id(END))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(CHAT_TOKENS) if chat else [],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def write(folder: Path, tokenizer: Any, model_type: str, keys: dict[str, Any], max_length: int) -> Path:
    """Write config.json and the tokenizer of a new model to `folder`.

    The context length is `max_length` tokens unless `keys` sets it.

    Raises:
        ConfigError: an unknown architecture or config key, or values that do not fit together.
    """
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.scratch.model_type: transformers has no architecture `{model_type}`; use gpt2, llama, ..."
        )
    config_class = CONFIG_MAPPING[model_type]
    _check_keys(config_class, model_type, keys)
    owned = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }
    if config_class().is_encoder_decoder:
        owned |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": None}
    values = {"max_position_embeddings": max_length, **keys, **owned}
    try:
        # By the architecture's own names (gpt2: n_positions): given under two, a value would count or not by chance.
        config = config_class(**{config_class.attribute_map.get(key, key): value for key, value in values.items()})
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.scratch.config: {model_type} refuses it: {reason}") from error
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _check_keys(config_class: Any, model_type: str, keys: dict[str, Any]) -> None:
    """transformers accepts any key silently, so a typo would train another model than the one meant."""
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"model.scratch.config.{key}: {model_type} has no such key; it has {', '.join(sorted(known))}"
            )
