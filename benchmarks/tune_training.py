"""What Ray Tune costs around trainings, and what early stops save; `benchmarks.tune` runs it.

overhead: the wall time of a search, from an idle cluster to its results in MLflow, against the seconds that its trials
trained, divided by how many ran at once. Trials are sized to train for a given time.
early stops: the best validation loss of a grid of learning rates trained in full, against the best that the same rates
reach under ASHA, and the steps of both. All on the quickstart's data and model. Only ratios mean something elsewhere.
"""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import experiment
from heliostat.experiment import ExperimentConfig
from heliostat.tuning import search, training_search

CONFIG = Path(__file__).parents[1] / "jobs" / "examples" / "cron" / "tune.yaml"
# In no order: to a halving that compares with what came before, a rising grid would look like one gain after the other.
RATES = [1e-3, 1.6e-2, 2e-3, 1e-4, 8e-3, 2.5e-4, 4e-3, 5e-4]


def configured(folder: Path, name: str, steps: int, **tuning: Any) -> ExperimentConfig:
    """The cron search with these settings of `tune_training`."""
    data = [f"data.{split}={folder}/cron/{split}.jsonl" for split in ("train", "validation", "test")]
    overrides = {"overrides": {"training.max_steps": steps}, "space": {"training.learning_rate": RATES}, **tuning}
    return experiment.load(
        CONFIG,
        [*data, f"name={name}", f"storage_path={folder}/runs",
         *(f"tune_training.{key}={json.dumps(value)}" for key, value in overrides.items())],
    )  # fmt: skip


def run(config: ExperimentConfig) -> dict[str, Any]:
    """The search's results, and its wall time in seconds."""
    started = time.monotonic()
    result = training_search.tune_training(config, Console(stderr=True))
    return {**result, "wall_s": time.monotonic() - started}


def overhead(folder: Path, seconds: float) -> dict[str, Any]:
    """Wall time over training time / concurrency, of four trials that all run to their end."""
    concurrent = search.concurrency({"CPU": 1}, None, "overhead")
    steps = round(seconds * steps_per_second(folder, concurrent))
    result = run(configured(folder, "overhead", steps, scheduler="none", searcher="random", num_samples=2 * concurrent))
    trained = sum(trial["seconds"] for trial in result["trials"])
    return {
        "trials": len(result["trials"]),
        "concurrent": concurrent,
        "trained_s": trained,
        "wall_s": result["wall_s"],
        "ratio": result["wall_s"] / (trained / concurrent),
    }


def steps_per_second(folder: Path, concurrent: int) -> float:
    """Of one trial while `concurrent` of them share the machine, evaluations included."""
    result = run(configured(folder, "speed", 60, scheduler="none", searcher="random", num_samples=concurrent))
    return float(sum(trial["steps"] / trial["seconds"] for trial in result["trials"]) / concurrent)


def early_stops(folder: Path, steps: int) -> dict[str, Any]:
    """The grid in full against the same grid under ASHA."""
    full = run(configured(folder, "grid", steps, searcher="grid", scheduler="none"))
    asha = run(configured(folder, "asha", steps, searcher="grid", scheduler="asha", grace_period=0.1))
    counts = {
        name: sum(trial["steps"] for trial in found["trials"]) for name, found in (("grid", full), ("asha", asha))
    }
    return {
        "grid_loss": full["value"],
        "asha_loss": asha["value"],
        "loss_ratio": asha["value"] / full["value"],
        "grid_steps": counts["grid"],
        "asha_steps": counts["asha"],
        "steps_ratio": counts["asha"] / counts["grid"],
    }


def measure(folder: Path, seconds: float, steps: int) -> dict[str, Any]:
    """Both, on the connected cluster; `folder` holds the quickstart's data in `cron/`."""
    return {"overhead": overhead(folder, seconds), "early_stops": early_stops(folder, steps)}


def table(result: dict[str, Any]) -> str:
    """The ratios for people."""
    overhead, early = result["overhead"], result["early_stops"]
    return (
        f"{overhead['trials']} trials of {overhead['trained_s'] / overhead['trials']:.0f} s, {overhead['concurrent']} "
        f"at once: wall time / (training time / concurrency) = {overhead['ratio']:.2f}\n"
        f"ASHA / grid: best validation loss {early['asha_loss']:.4f} / {early['grid_loss']:.4f} = "
        f"{early['loss_ratio']:.3f}, steps {early['asha_steps']} / {early['grid_steps']} = {early['steps_ratio']:.2f}"
    )
