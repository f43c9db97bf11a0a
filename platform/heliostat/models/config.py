"""The `model` and `adapter` sections: which model is trained, and which of its weights."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from heliostat.config import StrictModel


class ScratchConfig(StrictModel):
    """A new model: a tokenizer trained on the training data, and randomly initialised weights."""

    model_type: str = "gpt2"
    """Any causal architecture of transformers' AutoConfig: gpt2, llama, qwen3, ..."""
    vocab_size: PositiveInt = 4096
    """Upper bound of the byte-level BPE vocabulary, special tokens included."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of that architecture's config, such as n_layer, n_embd, n_head for gpt2."""


class ModelConfig(StrictModel):
    """The model that training starts from: an existing one, or one from scratch."""

    model_name_or_path: str | None = None
    """Hub name, local folder, GGUF file, registry URI (models:/NAME@ALIAS), or package:NAME/FILE for a file that an
    installed Python package ships."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    scratch: ScratchConfig | None = None
    chat_template: str | None = None
    """`chatml`, or the path of a Jinja file; default: the tokenizer's own."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ...; default: flash attention where it is installed, else sdpa."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model_name_or_path is None) == (self.scratch is None):
            raise ValueError("give exactly one of `model_name_or_path` (an existing model) and `scratch` (a new one)")
        return self


class AdapterConfig(StrictModel):
    """Which weights are trained: all of them, some of them, or low-rank adapters. Names and meanings are PEFT's."""

    method: Literal["full", "lora", "freeze"] = "full"
    freeze: list[str] = Field(default_factory=list)
    """Of `method: freeze`, what does not learn: `embeddings`, `all-but-last-K` (blocks), regular expressions that are
    searched in the parameters' names."""
    lora_r: PositiveInt = 16
    lora_alpha: PositiveInt | None = None
    """Default: 2 x lora_r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn the magnitudes of the weights apart from their directions (Liu et al. 2024, arXiv:2402.09353)."""
    loraplus_lr_ratio: float | None = Field(None, ge=1)
    """The learning rate of the B matrices over that of all else (LoRA+, Hayou et al. 2024, arXiv:2402.12354: 16)."""
    modules_to_save: list[str] | None = None
    merge: bool = False
    """Put merged full weights into the bundle instead of the adapter and a reference to its base."""

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> Self:
        if bool(self.freeze) != (self.method == "freeze"):
            raise ValueError("`method: freeze` and `freeze` (what does not learn) need each other")
        for name in ("use_rslora", "use_dora", "loraplus_lr_ratio"):
            if getattr(self, name) and self.method != "lora":
                raise ValueError(f"`{name}` is a variant of LoRA: it needs `method: lora`")
        return self
