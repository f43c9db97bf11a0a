"""The `model` and `adapter` sections: which model is trained, and which of its weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from heliostat.config import StrictModel


class ScratchConfig(StrictModel):
    """A new model: a tokenizer trained on the training data, and randomly initialised weights."""

    model_type: str = "gpt2"
    """Any causal architecture of transformers' AutoConfig: gpt2, llama, qwen3, ...; for seq2seq bart, t5, ..."""
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
    add_tokens: list[str] = Field(default_factory=list)
    """Texts that become tokens of their own; their embeddings begin near the mean of the others, and learn."""
    add_special_tokens: list[str] = Field(default_factory=list)
    """The same for control tokens, which are no part of decoded text."""
    src_lang: str | None = None
    """Language of the sources, for models whose tokenizer wants its name (mBART: de_DE, NLLB: deu_Latn)."""
    tgt_lang: str | None = None
    """The same of the targets; both are kept with the model."""
    chat_template: str | None = None
    """`chatml`, or the path of a Jinja file; default: the tokenizer's own."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ...; default: flash attention where it is installed, else sdpa."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model_name_or_path is None) == (self.scratch is None):
            raise ValueError("give exactly one of `model_name_or_path` (an existing model) and `scratch` (a new one)")
        if self.scratch and (self.add_tokens or self.add_special_tokens):
            raise ValueError(
                "`add_tokens` and `add_special_tokens` are for existing models; `scratch` makes its own tokens"
            )
        if self.scratch and (self.src_lang or self.tgt_lang):
            raise ValueError("`src_lang` and `tgt_lang` are for existing models; a new tokenizer has no languages")
        return self


class AdapterConfig(StrictModel):
    """Which weights are trained: all, some of the model's own, or an adapter's. Names and meanings are PEFT's."""

    method: Literal["full", "freeze", "lora", "qlora", "ia3", "prefix", "prompt"] = "full"
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
    init_lora_weights: Literal[True] | Annotated[str, Field(pattern=r"^pissa(_niter_[1-9]\d*)?$")] = True
    """`pissa`: begin with the largest singular values of the weights instead of with nothing (Meng et al. 2024,
    arXiv:2404.02948); `pissa_niter_N`: find them approximately, with N iterations, in seconds."""
    loraplus_lr_ratio: float | None = Field(None, ge=1)
    """The learning rate of the B matrices over that of all else (LoRA+, Hayou et al. 2024, arXiv:2402.12354: 16)."""
    quantization_bit: Literal[4, 8] = 4
    """Of `method: qlora`, how the base is kept while training: 4 (nf4) or 8 (int8), both bitsandbytes'."""
    double_quantization: bool = True
    """With 4 bits, quantise the scales too (Dettmers et al. 2023, arXiv:2305.14314)."""
    target_modules: list[str] | None = None
    """Of `method: ia3`, the scaled layers; default: PEFT's choice for the architecture."""
    feedforward_modules: list[str] | None = None
    """Those of them whose inputs are scaled, not their outputs."""
    num_virtual_tokens: PositiveInt = 20
    """Of `method: prefix` and `prompt`."""
    prefix_projection: bool = False
    """Make the prefix by a small network, which the bundle leaves out (Li and Liang 2021, arXiv:2101.00190)."""
    encoder_hidden_size: PositiveInt | None = None
    """The width of that network; default: that of the model."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    """What the virtual tokens begin as, repeated or cut to their number, with `prompt_tuning_init: TEXT`."""
    modules_to_save: list[str] | None = None
    """Modules that learn whole, beside the adapter."""
    merge: bool = False
    """Put merged full weights into the bundle instead of the adapter and a reference to its base."""

    @property
    def keeps_base(self) -> bool:
        """Whether the model's own weights stay as they are and an adapter learns."""
        return self.method not in ("full", "freeze")

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether the adapter takes positions of its own, before every text."""
        return self.method in VIRTUAL_TOKENS

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> Self:
        if bool(self.freeze) != (self.method == "freeze"):
            raise ValueError("`method: freeze` and `freeze` (what does not learn) need each other")
        for name, methods in _METHODS_OF.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` needs `method: {'` or `'.join(methods)}`")
        if self.merge and self.has_virtual_tokens:
            raise ValueError("virtual tokens cannot be merged into weights; leave `merge` out")
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise ValueError("`prompt_tuning_init: TEXT` and `prompt_tuning_init_text` need each other")
        if self.encoder_hidden_size and not self.prefix_projection:
            raise ValueError("`encoder_hidden_size` needs `prefix_projection: true`")
        return self


VIRTUAL_TOKENS = ("prefix", "prompt")
_LORA = ("lora", "qlora")
_METHODS_OF = {
    "use_rslora": _LORA,
    "use_dora": _LORA,
    "init_lora_weights": ("lora",),
    "loraplus_lr_ratio": _LORA,
    "quantization_bit": ("qlora",),
    "double_quantization": ("qlora",),
    "target_modules": ("ia3",),
    "feedforward_modules": ("ia3",),
    "num_virtual_tokens": VIRTUAL_TOKENS,
    "prefix_projection": ("prefix",),
    "prompt_tuning_init": ("prompt",),
    "modules_to_save": (*_LORA, "ia3"),
}
"""Settings that mean nothing with any other method."""
