"""What this machine lets a process have. Knows nothing of who asks."""

from pathlib import Path

import psutil


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
