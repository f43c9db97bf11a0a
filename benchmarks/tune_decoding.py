"""How much cheaper a decoding search is than trying every setting on every prompt.

    python -m benchmarks.tune_decoding RUN [--settings N] [--prompts N] [--batch-size N] [--threads N] [--rounds N]

RUN is the folder of a finished training run, such as the quickstart's. All contenders try the same settings on the
same prompts, in turns; medians over the rounds count:

evaluations  a loop of evaluations, each a process that loads the model, generates for all prompts, and scores
plain        one process that loads the model anew for each setting, generates for all prompts, and scores
search       the race of `heliostat tune-decoding`: Ray and its actors from their start, settings stopped early

The start of Python, all imports and that of Ray count. The comparison on held-out prompts, which the loops have not, is
told apart. So is how much better, on those prompts, the best of all settings is than the one that the search picks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.tuning.decoding_plan import Plan
    from heliostat.tuning.decoding_settings import Setting

REPOSITORY = Path(__file__).parents[1]
SPACE = {
    "do_sample": [True],
    "temperature": {"uniform": [0.1, 1.5]},
    "top_p": {"uniform": [0.5, 1.0]},
    "repetition_penalty": [1.0, 1.1, 1.3],
    "num_beams": [1, 1, 2, 4],
}
HOLDOUT = 160
# Jobs that use as many threads as told.
LOOPS = ("plain", "evaluation")
OTHERS = ("evaluations", "plain")


def prepared(folder: Path) -> "Plan":
    """The search that `settings.json` in the folder asks for."""
    from heliostat import experiment
    from heliostat.tuning import decoding_plan

    settings = json.loads((folder / "settings.json").read_text())
    run = Path(settings["run"])
    config = experiment.load(run / "config.yaml")
    section = {
        "space": SPACE, "searcher": "random", "num_samples": settings["settings"] - 2, "metric": "exact_match",
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
    """Load, generate, score; for each setting anew. Then, not timed, each setting's score on the held-out prompts."""
    started = time.perf_counter()
    from heliostat.models import base

    plan = prepared(folder)
    times = {"imports": time.perf_counter() - started, "loading": 0.0, "generating": 0.0}
    settings = [plan.task.setting(point) for point in json.loads((folder / "points.json").read_text())]
    for setting in settings:
        started = time.perf_counter()
        loaded = base.load_for_inference(plan.task.model)
        times["loading"] += time.perf_counter() - started
        started = time.perf_counter()
        score(plan, loaded, setting, plan.rows)
        times["generating"] += time.perf_counter() - started
    started = time.perf_counter()
    held_out = [score(plan, loaded, setting, plan.holdout) for setting in settings]
    return {**times, "untimed": time.perf_counter() - started, "held_out": held_out}


def evaluation(folder: Path) -> dict[str, Any]:
    """One evaluation; the caller says of which setting."""
    from heliostat.models import base

    plan = prepared(folder)
    point = json.loads((folder / "point.json").read_text())
    found = score(plan, base.load_for_inference(plan.task.model), plan.task.setting(point), plan.rows)
    return {"score": found}


def score(plan: "Plan", loaded: Any, setting: "Setting", rows: Sequence[Any]) -> float:
    """Generate for the rows with the setting; the metric's value."""
    from transformers import GenerationConfig

    from heliostat.evaluation import evaluator, metrics

    config = GenerationConfig.from_dict(setting.generation_config(loaded.model.generation_config.to_dict()))
    examples = evaluator.predict(
        loaded, rows, plan.config.data, config, batch_size=plan.task.batch_size, prefix=setting.prefix
    )
    return metrics.score(plan.metric, plan.metric.statistics(examples))


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
        "best": best.index,
    }


JOBS = {"points": points, "plain": plain, "evaluation": evaluation, "search": search}


def run_job(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run a job in a new process; what it found, and how many seconds it took from the start of Python.

    Raises:
        RuntimeError: the job failed; with the end of its output.
    """
    command = [sys.executable, "-m", "benchmarks.tune_decoding", "--job", name, str(folder)]
    # The actors of the search have a thread for each of their CPUs; threads that outnumber free cores wait in loops.
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if name in LOOPS else {})}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - started}


def evaluations(folder: Path, threads: int) -> dict[str, Any]:
    """Evaluate each setting in a process of its own, one after the other."""
    seconds = 0.0
    for point in json.loads((folder / "points.json").read_text()):
        (folder / "point.json").write_text(json.dumps(point))
        seconds += run_job("evaluation", folder, threads)["seconds"]
    return {"seconds": seconds}


def one_round(folder: Path, threads: int) -> dict[str, Any]:
    """All contenders once, each with its `seconds`."""
    run = {"evaluations": evaluations(folder, threads)}
    run |= {name: run_job(name, folder, threads) for name in ("plain", "search")}
    run["plain"]["seconds"] -= run["plain"].pop("untimed")
    run["search"]["seconds"] -= run["search"]["holdout"]
    held_out = run["plain"].pop("held_out")
    run["search"]["held_out_loss"] = max(held_out) - held_out[run["search"].pop("best")]
    return run


def compare(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Run everything in `folder`; returns what `--json` writes."""
    facts = run_job("points", folder, threads)
    runs = [one_round(folder, threads) for _ in range(rounds)]
    medians = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in runs[0]
    }
    ratios = {
        name: statistics.median(run["search"]["seconds"] / run[name]["seconds"] for run in runs) for name in OTHERS
    }
    return {"settings": facts["settings"], "prompts": facts["prompts"], "ratios": ratios, **medians, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    plain, search = result["plain"], result["search"]
    whole = result["settings"] * result["prompts"]
    between = search["race"] - search["generating"] / max(1, search["actors"])
    return "\n".join([
        f"{result['settings']} settings x {result['prompts']} prompts: search / evaluations = "
        f"{result['ratios']['evaluations']:.2f}, search / plain = {result['ratios']['plain']:.2f}; on held-out prompts "
        f"the best setting is better by {search['held_out_loss']:.4f} than the one picked",
        f"evaluations  {result['evaluations']['seconds']:.1f} s",
        f"plain   {plain['seconds']:6.1f} s: imports and rows {plain['imports']:.1f}, loading {plain['loading']:.1f}, "
        f"generating {plain['generating']:.1f}",
        f"search  {search['seconds']:6.1f} s: imports and rows {search['imports']:.1f}, Ray {search['ray']:.1f}, "
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
