"""How long training waits for a checkpoint, with and without `training.async_save`: `python -m benchmarks.checkpoints`.

A GPT-2-shaped model in a DeepSpeed engine, in one process. Knows nothing of data and Ray.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

KEEP = 2


def measure(width: int, layers: int, saves: int, steps: int) -> dict[str, float]:
    """Medians over `saves` checkpoints, `steps` optimizer steps apart, of a model `layers` x `width`.

    Returns {"parameters", "gib" (of one checkpoint), "step_s" (without a checkpoint), and for both ways to save
    "*_wait_s" (until training goes on), "*_total_s" (of saving and the steps after it, until all is written)}.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from heliostat.training import engine
    from heliostat.training.config import TrainingConfig
    from heliostat.training.worker import LocalSession

    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=width, n_layer=layers, n_head=width // 64)
    ids = torch.randint(4096, (2, 128))

    def step() -> None:
        built.backward(built(input_ids=ids, labels=ids, use_cache=False).loss)
        built.step()

    with LocalSession() as session, tempfile.TemporaryDirectory() as folder:
        built = engine.build(GPT2LMHeadModel(config), TrainingConfig(num_workers=0), total_steps=1000)
        times = [_seconds(step) for _ in range(steps + 1)][1:]
        found = {"parameters": float(sum(p.numel() for p in built.module.parameters())), "step_s": _median(times)}
        for background in (False, True):
            root = Path(folder) / str(background)
            found.update(_saves(built, root, session, step, background=background, saves=saves, steps=steps))
        files = (Path(folder) / "True" / "attempt-01" / f"step_{saves:06d}-w1").rglob("*.*")
        return {**found, "gib": sum(path.stat().st_size for path in files if path.is_file()) / 2**30}


def _saves(
    built: Any, root: Path, session: Any, step: Any, *, background: bool, saves: int, steps: int
) -> dict[str, float]:
    from heliostat.training.saving import Saver

    saver = Saver(root, "attempt-01", session, keep=KEEP, trained_only=False, background=background)
    waits, totals = [], []
    for number in range(1, saves + 1):
        started = time.perf_counter()
        saver.save(built, {"step": number}, {})
        waits.append(time.perf_counter() - started)
        for _ in range(steps):
            step()
        saver.settle()
        totals.append(time.perf_counter() - started)
    name = "async" if background else "sync"
    return {f"{name}_wait_s": _median(waits), f"{name}_total_s": _median(totals)}


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def main() -> None:
    """Print the measurement as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 512), ("layers", 8), ("saves", 5), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
