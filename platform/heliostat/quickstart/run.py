"""`heliostat quickstart`: the whole path on this machine, from generated data to an answer over HTTP.

It calls what the other commands call, in their order, and knows only the order and what to say.
"""

import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import cluster, experiment, state
from heliostat.evaluation.completion import fill
from heliostat.experiment import ExperimentConfig
from heliostat.models import bundle
from heliostat.quickstart import schedules
from heliostat.registry import promotion, scoring, store
from heliostat.serving import launch
from heliostat.training import trainer
from heliostat.tuning import decoding_search

CONFIG = Path(__file__).parent / "train.yaml"


def configure(overrides: Sequence[str]) -> ExperimentConfig:
    """The quickstart's configuration, with its data in the state folder."""
    folder = state.folder() / "cron"
    files = [f"data.{split}={folder / split}.jsonl" for split in ("train", "validation", "test")]
    return experiment.load(CONFIG, [*files, *overrides])


class Quickstart:
    """The steps of the quickstart, each one line on the console."""

    def __init__(self, config: ExperimentConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line, with the seconds since the start."""
        self.console.print(f"[{time.monotonic() - self.started:4.0f} s] {text}", markup=False, highlight=False)

    def train(self) -> dict[str, Any]:
        """Generate the data, train, search decoding settings, evaluate and promote: the result so far."""
        folder = state.folder() / "cron"
        counts = schedules.write(folder)
        self.say(f"data: {counts['train']} training and {counts['test']} test phrases in {folder}")
        trained = trainer.train(self.config, self.console)
        assert trained.model_name is not None
        self.say(f"trained and registered {trained.model_uri}: validation loss {trained.metrics['eval_loss']:.4f}")
        searched = decoding_search.tune_decoding(self.config, trained.model_uri, self.console)
        uri = searched["model_uri"] or trained.model_uri
        self.say(f"decoding search over {searched['trials']} settings: {searched['verdict']}")
        scores = scoring.score(self.config, uri, self.console)
        low, high = scores["intervals"]["exact_match"]
        before = scores["baseline"]["exact_match"]
        self.say(
            f"exact match of {uri} on {scores['n']} unseen phrases: {scores['exact_match']:.3f} "
            f"[{low:.3f}, {high:.3f}] (before training: {before:.3f})"
        )
        families = "  ".join(f"{name} {group['exact_match']:.2f}" for name, group in scores["groups"].items())
        self.say(f"by phrasing family: {families}")
        gates = self.config.promotion.gates
        promoted = promotion.promote(trained.model_name, verify=_verify, gates=gates, reason="quickstart")
        self.say(f"models:/{promoted.name}@champion is version {promoted.version}")
        return {
            "model_uri": uri,
            "run_folder": trained.run_folder,
            "run_id": trained.run_id,
            "exact_match": scores["exact_match"],
            "exact_match_before": before,
            "families": {name: group["exact_match"] for name, group in scores["groups"].items()},
            "decoding": {key: searched[key] for key in ("settings", "kept_greedy", "gain", "interval", "verdict")},
        }

    def ask(self, endpoint: launch.Endpoint) -> dict[str, Any]:
        """Ask the endpoint one phrase that was never trained on, as any HTTP client would."""
        phrase, expected = schedules.UNSEEN_PHRASE
        request = {"model": endpoint.model_id, "prompt": fill(self.config.data.prompt_template, phrase)}
        answer = _post(f"{endpoint.url}/completions", request)["choices"][0]["text"].strip()
        self.say(f'asked "{phrase}", answered "{answer}" ({"right" if answer == expected else f"expected {expected}"})')
        body = json.dumps(request)
        self.say(f"endpoint: {endpoint.url}   try: curl {endpoint.url}/completions -d '{body}'"
                 " -H 'content-type: application/json'")  # fmt: skip
        self.say(f"runs and models: mlflow ui --backend-store-uri {store.shown(store.connect())}")
        return {"phrase": phrase, "answer": answer, "expected": expected, "url": endpoint.url}


def quickstart(overrides: Sequence[str], console: Console, *, keep: Any = None) -> dict[str, Any]:
    """Run it all; `keep`, if given, is called with the result while the endpoint is still up.

    Returns {"exact_match", "seconds", "answer", "model_uri", "url", ...}.

    Raises:
        HeliostatError: a step failed; Ray and the endpoint are shut down first.
    """
    steps = Quickstart(configure(overrides), console)
    with cluster.connected():
        result = steps.train()
        endpoint = launch.start(steps.config.serving, f"models:/{steps.config.registered_model_name}@champion")
        try:
            result |= steps.ask(endpoint)
            result["seconds"] = round(time.monotonic() - steps.started, 1)
            if keep is not None:
                keep(result)
        finally:
            endpoint.stop()
    return result


def _verify(folder: Path) -> None:
    bundle.verify(folder)


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
