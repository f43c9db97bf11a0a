"""Both searches, in one run: what Ray Tune costs around trainings, what early stops save, what a decoding search saves.

    python -m benchmarks.tune [--run FOLDER] [--seconds N] [--steps N] [--rounds N] [--json FILE]

See `tune_training` and `tune_decoding` for what is measured. The decoding part needs the folder of a finished training
run of the quickstart; without `--run` one is trained first.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import tune_decoding, tune_training
from heliostat import cluster, experiment
from heliostat.quickstart import schedules
from heliostat.quickstart.run import CONFIG
from heliostat.training import trainer


def trained(folder: Path) -> Path:
    """The folder of a new run of the quickstart's training."""
    data = [f"data.{split}={folder}/cron/{split}.jsonl" for split in ("train", "validation", "test")]
    return Path(trainer.train(experiment.load(CONFIG, data), Console(stderr=True)).run_folder)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that `--json` writes."""
    schedules.write(folder / "cron")
    with cluster.connected():
        training = tune_training.measure(folder, options.seconds, options.steps)
        run = options.run or trained(folder)
    settings = {"settings": 24, "prompts": 128, "batch_size": 16, "run": str(run.absolute())}
    (folder / "settings.json").write_text(json.dumps(settings))
    return {**training, "decoding": tune_decoding.compare(folder, options.rounds, threads=1)}


def main() -> None:
    """Run the benchmark, print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run of the quickstart")
    parser.add_argument("--seconds", type=float, default=60, help="training time of a trial (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of a trial in the comparison with the grid")
    parser.add_argument("--rounds", type=int, default=1, help="of the decoding part")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heliostat-benchmark-") as name:
        os.environ["HELIOSTAT_HOME"] = f"{name}/state"
        result = measure(Path(name), options)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(tune_training.table(result))
    print(tune_decoding.table(result["decoding"]))


if __name__ == "__main__":
    main()
