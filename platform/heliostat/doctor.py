"""`heliostat doctor`: what is and is not right on this machine, in words a person can act on."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from heliostat import state
from heliostat.errors import HeliostatError

Status = Literal["ok", "warning", "problem"]
Finding = tuple[Status, str]


def examine() -> dict[str, Any]:
    """Run all checks: {"ok": no problem was found, "checks": [{"name", "status", "text"}]}."""
    checks = []
    for name, check in CHECKS.items():
        try:
            status, text = check()
        except Exception as error:
            status, text = "problem", f"{type(error).__name__}: {error}"
        checks.append({"name": name, "status": status, "text": text})
    return {"ok": all(check["status"] != "problem" for check in checks), "checks": checks}


def _python() -> Finding:
    version = platform.python_version()
    if version.split(".")[:2] != ["3", "11"]:
        return "warning", f"{version} at {sys.prefix}; Heliostat is tested with Python 3.11"
    return "ok", f"{version} at {sys.prefix}"


def _packages() -> Finding:
    names = ("ray", "torch", "transformers", "peft", "deepspeed", "mlflow", "datasets")
    return "ok", "  ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    threads = f"{torch.get_num_threads()} threads"
    if torch.version.cuda and not torch.cuda.is_available():
        return "warning", f"{torch.__version__} ({build}), but no usable GPU: training runs on the CPU, {threads}"
    return "ok", f"{torch.__version__} ({build}), {threads}"


def _gpus() -> Finding:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return "ok", "none; leave training.use_gpu=false"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    bf16 = "bf16 supported" if torch.cuda.is_bf16_supported() else "no bf16: use training.fp16"
    return "ok", f"{count}: {names} ({bf16}); set training.use_gpu=true"


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if found is None:
        return "warning", "no C++ compiler; only DeepSpeed's compiled operators (offload optimizers) need one"
    return "ok", found


def _ray() -> Finding:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return "ok", f"{ray.__version__}; a private cluster is started for each command ({os.cpu_count()} CPUs here)"
    from heliostat import cluster

    with cluster.connected(address):
        return "ok", f"{ray.__version__}; {address} answers with {ray.cluster_resources().get('CPU', 0):g} CPUs"


def _mlflow() -> Finding:
    from heliostat.registry import store

    uri = store.shown(store.connect())
    try:
        with store.failures(f"MLflow at {uri}"):
            store.client().search_experiments(max_results=1)
    except HeliostatError as error:
        return "problem", str(error)
    return "ok", uri


def _disk() -> Finding:
    place = next(folder for folder in (state.folder(), *state.folder().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 2**30
    status: Status = "ok" if free > 10 else "warning" if free > 2 else "problem"
    advice = "" if status == "ok" else "; checkpoints need space: delete old runs, or set HELIOSTAT_HOME elsewhere"
    return status, f"{free:.0f} GiB free for {state.folder()}{advice}"


def _shared_memory() -> Finding:
    if not Path("/dev/shm").exists():
        return "warning", "no /dev/shm; Ray's object store will use the disk"
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < 1:
        return "warning", f"{free:.1f} GiB free in /dev/shm; in a container, start it with --shm-size=2g"
    return "ok", f"{free:.1f} GiB free in /dev/shm"


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "gpus": _gpus,
    "compiler": _compiler,
    "ray": _ray,
    "mlflow": _mlflow,
    "disk": _disk,
    "memory": _shared_memory,
}
