"""How much cheaper a decoding search is than trying every setting on every prompt.

    python -m benchmarks.tune_decoding RUN [--settings N] [--prompts N] [--batch-size N] [--threads N] [--rounds N]

RUN is the folder of a finished training run, such as the quickstart's. Both contenders try the same settings on the
same prompts, each in a process of its own, in turns; medians over the rounds count:

plain   one process that loads the model anew for each setting, generates for all prompts, and scores
search  the race of `heliostat tune-decoding`: Ray and its actors from their start, settings stopped early

The start of Python, all imports and that of Ray count. The comparison on held-out prompts, which the plain loop has
not, is told apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.tuning.decoding_plan import Plan

REPOSITORY = Path(__file__).parents[1]
SPACE = {
    "do_sample": [True],
    "temperature": {"uniform": [0.1, 1.5]},
    "top_p": {"uniform": [0.5, 1.0]},
    "repetition_penalty": [1.0, 1.1, 1.3],
    "num_beams": [1, 1, 2, 4],
}
HOLDOUT = 64


def prepared(folder: Path) -> "Plan":
    """The search that `settings.json` in the folder asks for."""
    from heliostat import experiment
    from heliostat.tuning import decoding_plan

    settings = json.loads((folder / "settings.json").read_text())
    run = Path(settings["run"])
    config = experiment.load(run / "config.yaml")
    section = {
        "space": SPACE, "searcher": "random", "num_samples": settings["settings"] - 1, "metric": "exact_match",
        "prompts": settings["prompts"], "holdout_prompts": HOLDOUT, "num_seeds": 1,
    }  # fmt: skip
    values = {**config.model_dump(), "storage_path": str(folder / "runs"), "tune_decoding": section}
    values["evaluation"]["batch_size"] = settings["batch_size"]
    return decoding_plan.prepare(experiment.ExperimentConfig.model_validate(values), str(run / "bundle"))


def points(folder: Path) -> dict[str, Any]:
    """The settings that the search will draw: with random search they follow from the seed alone."""
    from heliostat.tuning.decoding_settings import SECTION
    from heliostat.tuning.searcher import PointSearcher

    plan = prepared(folder)
    found: list[Any] = []
    searcher = PointSearcher(
        plan.space, plan.config.tune_decoding, where=SECTION, metric="score", mode="max", seed=plan.config.seed,
        note=lambda index, point: found.append(point), fixed=plan.fixed,
    )  # fmt: skip
    for number in range(searcher.limit):
        searcher.suggest(str(number))
    (folder / "points.json").write_text(json.dumps(found))
    return {"settings": len(found), "prompts": len(plan.rows)}


def plain(folder: Path) -> dict[str, Any]:
    """Load, generate, score; for each setting anew."""
    started = time.perf_counter()
    from transformers import GenerationConfig

    from heliostat.evaluation import evaluator, metrics
    from heliostat.models import base

    plan = prepared(folder)
    imports, loading, generating = time.perf_counter() - started, 0.0, 0.0
    scores = []
    for point in json.loads((folder / "points.json").read_text()):
        started = time.perf_counter()
        loaded = base.load_for_inference(plan.task.model)
        loading += time.perf_counter() - started
        started = time.perf_counter()
        setting = plan.task.setting(point)
        config = GenerationConfig.from_dict(setting.generation_config(loaded.model.generation_config.to_dict()))
        examples = evaluator.predict(
            loaded, plan.rows, plan.config.data, config, batch_size=plan.task.batch_size, prefix=setting.prefix
        )
        scores.append(metrics.score(plan.metric, plan.metric.statistics(examples)))
        generating += time.perf_counter() - started
    return {"imports": imports, "loading": loading, "generating": generating, "best": max(scores)}


def search(folder: Path) -> dict[str, Any]:
    """The race, and the comparison on the held-out prompts after it."""
    started = time.perf_counter()
    from rich.console import Console

    from heliostat import cluster
    from heliostat.tuning import decoding_search
    from heliostat.tuning.search import concurrency

    plan = prepared(folder)
    phases = {"imports": time.perf_counter() - started}
    started = time.perf_counter()
    with cluster.connected():
        phases["ray"] = time.perf_counter() - started
        concurrent = concurrency(plan.task.resources, None, decoding_search.CONCURRENCY_KEY)
        started = time.perf_counter()
        outcomes = decoding_search.race(plan, folder / f"race-{time.time_ns()}", concurrent, Console(stderr=True))
        phases["race"] = time.perf_counter() - started
        started = time.perf_counter()
        best = decoding_search.select(outcomes, {}, greater_is_better=True)
        assert best is not None
        decoding_search.compare(plan, plan.task.setting(best.point) if best.index else None, concurrent)
        phases["holdout"] = time.perf_counter() - started
    reports = [outcome.results[-1] for outcome in outcomes]
    actors = {report["process"]: report["loading_seconds"] for report in reports}
    return {
        **phases,
        "actors": len(actors),
        "loading": sum(actors.values()),
        "generating": sum(report["seconds"] * report["prompts"] for report in reports),
        "prompts": sum(report["prompts"] for report in reports),
        "stopped": sum(outcome.state == "stopped" for outcome in outcomes),
        "best": best.results[-1]["score"],
    }


JOBS = {"points": points, "plain": plain, "search": search}


def run_job(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run a job in a new process; what it found, and how many seconds it took from the start of Python.

    Raises:
        RuntimeError: the job failed; with the end of its output.
    """
    command = [sys.executable, "-m", "benchmarks.tune_decoding", "--job", name, str(folder)]
    # The actors of the search have a thread for each of their CPUs; threads that outnumber free cores wait in loops.
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if name == "plain" else {})}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - started}


def compare(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Run everything in `folder`; returns what `--json` writes."""
    facts = run_job("points", folder, threads)
    runs = [{name: run_job(name, folder, threads) for name in ("plain", "search")} for _ in range(rounds)]
    for run in runs:
        run["search"]["race_seconds"] = run["search"]["seconds"] - run["search"]["holdout"]
    medians = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in runs[0]
    }
    ratio = statistics.median(run["search"]["race_seconds"] / run["plain"]["seconds"] for run in runs)
    return {"settings": facts["settings"], "prompts": facts["prompts"], "ratio": ratio, **medians, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    plain, search = result["plain"], result["search"]
    whole = result["settings"] * result["prompts"]
    between = search["race"] - search["generating"] / max(1, search["actors"])
    return "\n".join([
        f"{result['settings']} settings x {result['prompts']} prompts: search / plain = {result['ratio']:.2f}",
        f"plain   {plain['seconds']:6.1f} s: imports and rows {plain['imports']:.1f}, loading {plain['loading']:.1f}, "
        f"generating {plain['generating']:.1f}",
        f"search  {search['race_seconds']:6.1f} s: imports and rows {search['imports']:.1f}, Ray {search['ray']:.1f}, "
        f"race {search['race']:.1f} (generating {search['generating']:.1f} in {search['actors']:g} actors; the rest, "
        f"{between:.1f}, is their start and Tune)",
        f"        {search['prompts']:g} of {whole} answers generated, {search['stopped']:g} settings stopped; "
        f"held-out comparison {search['holdout']:.1f} s more",
    ])  # fmt: skip


def main() -> None:
    """Run the benchmark, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_decoding", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument("--settings", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the plain loop (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job:
        print(json.dumps(JOBS[chosen.job](chosen.run)))
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-benchmark-") as name:
        settings = {key: getattr(chosen, key) for key in ("settings", "prompts", "batch_size")}
        (Path(name) / "settings.json").write_text(json.dumps({**settings, "run": str(chosen.run.absolute())}))
        result = compare(Path(name), chosen.rounds, chosen.threads)
    print(table(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
