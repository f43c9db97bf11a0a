"""Training some of a model's own weights while the others stay. Knows names of parameters, not how they are trained."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from heliostat.errors import ConfigError

EMBEDDINGS = "embeddings"
_ALL_BUT_LAST = re.compile(r"all-but-last-(\d+)")


def freeze(model: Any, parts: Sequence[str]) -> None:
    """Keep the named parts of a transformers model from learning.

    `parts`: `embeddings` (tokens and positions; the output layer too where it shares their weights),
    `all-but-last-K` (all but the last K blocks) and regular expressions that are searched in the parameters' names.

    Raises:
        ConfigError: a part is not there, or nothing would be left to learn.
    """
    for part in parts:
        found = _parameters(model, part)
        if not found:
            names = [name for name, _ in model.named_parameters()]
            raise ConfigError(
                f"adapter.freeze: `{part}` is no parameter's name; they look like {names[0]}, {names[-1]}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"adapter.freeze: {', '.join(parts)} leaves nothing to learn")


def _parameters(model: Any, part: str) -> list[nn.Parameter]:
    if part == EMBEDDINGS:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
        return [parameter for layer in layers for parameter in layer.parameters()]
    if last := _ALL_BUT_LAST.fullmatch(part):
        kept = {id(parameter) for block in _blocks(model, int(last[1])) for parameter in block.parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in kept]
    try:
        return [parameter for name, parameter in model.named_parameters() if re.search(part, name)]
    except re.error as error:
        raise ConfigError(f"adapter.freeze: `{part}` is no regular expression ({error})") from error


def _blocks(model: Any, count: int) -> list[nn.Module]:
    """The last `count` of the model's blocks: its longest list of modules."""
    blocks = max((found for found in model.modules() if isinstance(found, nn.ModuleList)), key=len)
    if not 1 <= count < len(blocks):
        raise ConfigError(f"adapter.freeze: all-but-last-{count} makes no sense with {len(blocks)} blocks")
    return list(blocks)[-count:]
