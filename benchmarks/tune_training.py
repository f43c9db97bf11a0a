"""What Ray Tune costs around trainings, and what early stops save.

    python -m benchmarks.tune_training [--seconds 60] [--json FILE]

overhead: the wall time of a search, from an idle cluster to its results in MLflow, against the seconds that its trials
trained, divided by how many ran at once. Trials are sized to train for about `--seconds`.
early stops: the best validation loss of a grid of learning rates trained in full, against the best that the same rates
reach under ASHA, and the steps of both. All on the quickstart's data and model. Only ratios mean something elsewhere.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import cluster, experiment
from heliostat.experiment import ExperimentConfig
from heliostat.quickstart import schedules
from heliostat.tuning import search, training_search

CONFIG = Path(__file__).parents[1] / "jobs" / "examples" / "cron" / "tune.yaml"
RATES = [1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


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


def main() -> None:
    """Run both, print the ratios."""
    parser = argparse.ArgumentParser(description="Overhead and savings of training searches")
    parser.add_argument("--seconds", type=float, default=60, help="training time of one trial")
    parser.add_argument("--steps", type=int, default=300, help="steps of a trial in full, for early stops")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HELIOSTAT_HOME"] = str(folder / "state")
        schedules.write(folder / "cron")
        with cluster.connected():
            result = {"overhead": overhead(folder, options.seconds), "early_stops": early_stops(folder, options.steps)}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2))
    print(f"wall time / (training time / concurrency): {result['overhead']['ratio']:.2f}")
    print(f"ASHA's best loss / the grid's: {result['early_stops']['loss_ratio']:.3f}, "
          f"at {result['early_stops']['steps_ratio']:.2f} of its steps")  # fmt: skip


if __name__ == "__main__":
    main()
