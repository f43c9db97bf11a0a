"""Tokenizers that put a language's name around a text: mBART, mBART-50, NLLB. Knows no model.

mBART writes it behind the text, and its decoder starts with the target's; the others write it before the text, where
generation must be made to begin (https://huggingface.co/docs/transformers/model_doc/mbart).
"""

import difflib
from typing import Any

from heliostat.errors import ConfigError

KEYS = ("src_lang", "tgt_lang")


def languages_of(tokenizer: Any) -> tuple[str | None, ...]:
    """The languages of sources and targets, either None where it is not chosen; () for other tokenizers."""
    return tuple(getattr(tokenizer, key) for key in KEYS) if _has_languages(tokenizer) else ()


def set_languages(tokenizer: Any, src_lang: str | None, tgt_lang: str | None) -> None:
    """Set them in the tokenizer, which is saved with them; None is what it was saved with.

    Raises:
        ConfigError: one is missing or unknown, or given for a tokenizer without languages.
    """
    given = dict(zip(KEYS, (src_lang, tgt_lang), strict=True))
    if not _has_languages(tokenizer):
        for key, name in given.items():
            if name:
                raise ConfigError(f"model.{key}: {name}: the model's tokenizer has no languages; drop the key")
        return
    # Without one the tokenizer would take its own default, English, or the source's for the target.
    for key, name in given.items():
        setattr(tokenizer, key, _checked(tokenizer, key, name or tokenizer.init_kwargs[key]))


def generation_start(tokenizer: Any) -> dict[str, int]:
    """The settings of generation_config.json by which an answer begins as trained targets do."""
    if not _has_languages(tokenizer):
        return {}
    language: int = tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)
    before = tokenizer(text_target="a")["input_ids"][0] == language
    return {"forced_bos_token_id" if before else "decoder_start_token_id": language}


def _has_languages(tokenizer: Any) -> bool:
    return "tgt_lang" in tokenizer.init_kwargs


def _checked(tokenizer: Any, key: str, name: str | None) -> str:
    known = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    known = [token for token in known if token not in tokenizer.special_tokens_map.values()]
    if name is None:
        raise ConfigError(
            f"model.{key}: the model's tokenizer wants the name of a language, such as {known[0]}; set it"
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise ConfigError(f"model.{key}: the model's tokenizer has no language `{name}`; near: {', '.join(near)}")
    return name
