"""How fast Heliostat's training loop is: against a bare PyTorch loop, and against padded training in the HF Trainer.

    python -m benchmarks.train [--data FILE] [--threads N] [--rounds N] [--json FILE]

All train the same new GPT-2-shaped model on the same documents, each in a process of its own, in turns; medians over
the rounds count. Only the ratios mean something on another machine. Knows nothing of how a contender works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contenders import MAX_LENGTH, PADDED_LENGTH, Settings

REPOSITORY = Path(__file__).parents[1]
ALPACA = REPOSITORY.parent / "shared" / "data" / "alpaca" / "alpaca_train.json"
CONTENDERS = {
    "ours": "Heliostat, packed",
    "plain": "PyTorch loop, packed",
    "padded": f"HF Trainer, padded to {PADDED_LENGTH}",
}


def run_job(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one job of `benchmarks.contenders` in a new process; returns what it printed last.

    Raises:
        RuntimeError: the job failed; with the end of its output.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.contenders", name, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(settings: Settings, rounds: int, folder: Path) -> dict[str, Any]:
    """Run everything in `folder`; returns what `--json` writes."""
    settings.save(folder)
    facts = run_job("prepare", folder, settings.threads)
    (folder / "facts.json").write_text(json.dumps(facts))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            runs[name].append(run_job(name, folder, settings.threads))
            print(f"round {number + 1}/{rounds}: {name} done", file=sys.stderr)
    memory = {name: run_job(name, folder, settings.threads)["peak_rss_mib"] for name in ("imports", "quickstart")}
    return {"settings": vars(settings), "data": facts, **summary(runs), "rss_mib": memory, "runs": runs}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios of ours to the others: of speed, and of tokens per CPU second."""
    contenders = {name: _medians(found) for name, found in runs.items()}
    ratios = {
        f"ours/{other}": {
            measure: statistics.median(
                mine["tokens"] / mine[measure] / (theirs["tokens"] / theirs[measure])
                for mine, theirs in zip(runs["ours"], runs[other], strict=True)
            )
            for measure in ("seconds", "cpu_seconds")
        }
        for other in runs
        if other != "ours"
    }
    return {"contenders": contenders, "ratios": ratios}


def _medians(found: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in found),
        "tokens_per_cpu_second": statistics.median(run["tokens"] / run["cpu_seconds"] for run in found),
        "tokens": statistics.median(run["tokens"] for run in found),
        "loss": statistics.median(run["loss"] for run in found),
        "peak_rss_mib": statistics.median(run["peak_rss_mib"] for run in found),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':26}{'real tokens/s':>14}{'per CPU s':>12}{'tokens':>9}{'peak RSS MiB':>14}"]
    for name, found in result["contenders"].items():
        lines.append(
            f"{CONTENDERS[name]:26}{found['tokens_per_second']:14,.0f}{found['tokens_per_cpu_second']:12,.0f}"
            f"{found['tokens']:9,.0f}{found['peak_rss_mib']:14,.0f}"
        )
    for name, ratio in result["ratios"].items():
        lines.append(f"{name}: {ratio['seconds']:.2f}x  (per CPU second {ratio['cpu_seconds']:.2f}x)")
    data, memory = result["data"], result["rss_mib"]
    lines += [
        f"real tokens among positions: packed {data['packed_fill']:.1%} at {MAX_LENGTH}, "
        f"padded {data['padded_fill']:.1%} at {PADDED_LENGTH}; {data['learned']:.1%} of the tokens are learned",
        f"RSS of a worker process: {memory['imports']:,.0f} MiB after its imports, "
        f"{memory['quickstart']:,.0f} MiB at most while it trains the quickstart's model",
    ]
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message if the data are not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ALPACA, help="Alpaca JSON file (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of the packed contenders")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those, not measured")
    parser.add_argument("--batch", type=int, default=6, help=f"sequences of {MAX_LENGTH} positions a step")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=192)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parsed = parser.parse_args(given)
    if not parsed.data.is_file():
        parser.error(f"--data: no file {parsed.data}; give a JSON array of {{instruction, input, output}} objects")
    return parsed


def main() -> None:
    """Run the benchmark, print the table."""
    chosen = vars(arguments())
    rounds, output = chosen.pop("rounds"), chosen.pop("json")
    settings = Settings(**{**chosen, "data": str(chosen["data"].absolute())})
    with tempfile.TemporaryDirectory(prefix="heliostat-benchmark-") as folder:
        result = compare(settings, rounds, Path(folder))
    print(table(result))
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
