"""What `dtype: bfloat16` costs in quality and brings in speed: `python -m benchmarks.precision [--text FILE]`.

SmolLM2-135M in float32 and in bfloat16, in one process, in turns: perplexity on a text, how often both have the same
likeliest next token, and the speed of the endpoint's engine. Knows nothing of HTTP and Ray.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import serve, streams
from benchmarks.streams import Ask, Round

TEXT = Path(__file__).parents[2] / "shared" / "data" / "text" / "tinyshakespeare.txt"
WINDOW, WINDOWS = 256, 64
CLIENTS, ROUNDS = (1, 4, 16), 2


def quality(exact: Any, half: Any, ids: Any) -> dict[str, float]:
    """Of the models on token ids (windows, tokens): perplexity of each, and the share of tokens they agree upon."""
    import torch
    from torch.nn.functional import cross_entropy

    losses: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    agreed = 0
    for window in ids:
        with torch.inference_mode():
            logits = {"float32": exact(window[None]).logits[0, :-1], "bfloat16": half(window[None]).logits[0, :-1]}
        for name, scores in logits.items():
            losses[name].append(float(cross_entropy(scores.float(), window[1:])))
        agreed += int((logits["float32"].argmax(-1) == logits["bfloat16"].argmax(-1)).sum())
    perplexity = {f"perplexity_{name}": math.exp(statistics.mean(found)) for name, found in losses.items()}
    return {**perplexity, "same_likeliest_token": agreed / (len(ids) * (ids.shape[1] - 1))}


async def speeds(exact: Any, half: Any) -> dict[str, float]:
    """Clients -> tokens a second of bfloat16 over those of float32, the median of the rounds."""
    from heliostat.serving.config import EndpointArgs
    from heliostat.serving.served import ServedModel

    vocabulary = streams.words(exact.tokenizer)
    args = EndpointArgs()
    running = {
        name: await ServedModel.start(each, name, args) for name, each in (("float32", exact), ("bfloat16", half))
    }
    for served in running.values():
        await _work_off(served, streams.requests(vocabulary, 2, seed=-1), 2)
    ratios: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    for number in range(ROUNDS):
        for clients in CLIENTS:
            asks = streams.requests(vocabulary, serve.REQUESTS[clients], seed=1000 * clients + number)
            # In another order each time, as load from elsewhere comes and goes.
            names = sorted(running, reverse=number % 2 == 1)
            done = {name: await _work_off(running[name], asks, clients) for name in names}
            ratios[clients].append(serve.speed(done["bfloat16"]) / serve.speed(done["float32"]))
    for served in running.values():
        served.close()
    return {f"speed_ratio_{clients}": statistics.median(found) for clients, found in ratios.items()}


async def _work_off(served: Any, asks: Sequence[Ask], clients: int) -> Round:
    return await streams.work_off(asks, clients, partial(serve.ask_engine, served))


def measure(text: Path) -> dict[str, float]:
    """Everything."""
    import torch

    from heliostat.models import base

    folder = base.resolve(serve.SMOLLM2)
    exact, half = base.load_for_inference(folder), base.load_for_inference(folder, dtype="bfloat16")
    ids = torch.tensor(exact.tokenizer(text.read_text()[: 8 * WINDOW * WINDOWS])["input_ids"][: WINDOW * WINDOWS])
    found = quality(exact.model, half.model, ids.view(WINDOWS, WINDOW))
    return {**found, **asyncio.run(speeds(exact, half))}


def main() -> None:
    """Run the benchmark, print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=TEXT, help="a text in English (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    result = {name: round(value, 4) for name, value in measure(options.text).items()}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
