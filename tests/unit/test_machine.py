"""Limits of control groups count, those above too."""

from pathlib import Path

import psutil

from heliostat import machine


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_version_2_count_those_above_too(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/pod/container")
    pod, container = tmp_path / "sys/fs/cgroup/pod", tmp_path / "sys/fs/cgroup/pod/container"
    write(container, memory__max="max", memory__current="700", memory__stat="anon 600\ninactive_file 100")
    assert machine.available_bytes(tmp_path) > 10**6
    write(pod, memory__max="1000", memory__current="900", memory__stat="anon 600\ninactive_file 250")
    assert machine.available_bytes(tmp_path) == 350
    write(container, memory__max="750")
    assert machine.available_bytes(tmp_path) == 150


def test_limits_of_version_1_count(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="11:cpu:/a\n5:memory:/not/seen/from/inside\n1:name=systemd:/b")
    root = tmp_path / "sys/fs/cgroup/memory"
    write(root, memory__limit_in_bytes="5000", memory__usage_in_bytes="4800", memory__stat="inactive_file 300")
    assert machine.available_bytes(tmp_path) == 500


def test_without_limits_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert 0 < machine.available_bytes(tmp_path) <= psutil.virtual_memory().total
