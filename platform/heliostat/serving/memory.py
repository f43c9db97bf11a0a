"""What the KV cache needs and what this process may use. Knows sizes, not what is allocated."""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from heliostat.errors import ResourceError


def check_cache(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """See that a cache of so many tokens fits beside what is there now. `config`: the text model's.

    Raises:
        ResourceError: it does not; the message says how many bytes are needed, and how many there are.
    """
    needed = cache_bytes(config, tokens, dtype)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if needed > available:
        raise ResourceError(
            f"serving.cache_tokens={tokens} needs {needed} bytes of memory and {available} are available; lower it"
        )


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of so many tokens in all layers."""
    per_layer = 2 * find_num_key_value_heads(config) * find_head_dim(config)
    return int(config.num_hidden_layers * per_layer * dtype.itemsize * tokens)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: the machine's, or less where a control group sets a limit.

    `root`: where /proc and /sys are.
    """
    return min([int(psutil.virtual_memory().available), *_control_group_rooms(root)])


def _control_group_rooms(root: Path) -> list[int]:
    """Bytes left under each limit of this process's control groups and those above them, version 1 and 2.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html. What is cached of files that nothing
    uses (inactive_file) counts as used there, but is given up when memory is needed.
    """
    own = root / "proc/self/cgroup"
    rooms = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]:
            rooms += _room(folder, limit, used)
    return rooms


def _room(folder: Path, limit: str, used: str) -> list[int]:
    """What is left under one group's limit; nothing where it has none."""
    files = [folder / limit, folder / used, folder / "memory.stat"]
    # In a container, the path is often that of the host, which is not there.
    if not all(file.exists() for file in files):
        return []
    most, taken, statistics = (file.read_text() for file in files)
    if most.strip() == "max":
        return []
    idle = dict(line.split() for line in statistics.splitlines()).get("inactive_file", "0")
    return [max(0, int(most) - int(taken) + int(idle))]
