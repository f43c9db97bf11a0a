"""`heliostat plan` on the command line: its flags, and its result as a table. Imports what it needs when it runs."""

import argparse
import shutil
from typing import TYPE_CHECKING, Any

from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

HELP = "estimate memory, speed and hours of a training, and which settings fit"
_PARTS = ("weights", "optimizer", "activations", "gradients", "runtime")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command has beside the configuration and its overrides."""
    parser.add_argument("--gpu", help="H100-80GB, A100-40GB, L4, ..., or cpu (the default without training.use_gpu)")
    parser.add_argument("--num-workers", type=int, help="default: training.num_workers")
    parser.add_argument("--mfu", type=float, default=0.4, help="part of the peak speed reached (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The result of `heliostat.training.planning.plan` for the command's arguments.

    Raises:
        UserError: the configuration, the data, the model or a flag is wrong.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu:g}: must be above 0 and at most 1")
    overrides = list(options.overrides)
    if options.num_workers is not None:
        overrides.append(f"training.num_workers={options.num_workers}")
    if options.gpu is not None:
        overrides.append(f"training.use_gpu={options.gpu.lower() != 'cpu'}")
    from heliostat import experiment

    config = experiment.load(options.config, overrides)
    from heliostat.training import planning

    return planning.plan(config, options.gpu, options.mfu)


def show(result: dict[str, Any]) -> str:
    """The options in a table, with what it rests on above and what to set below."""
    from rich.console import Console

    console = Console(width=max(120, shutil.get_terminal_size().columns), highlight=False)
    with console.capture() as capture:
        console.print(_heading(result))
        console.print(_table(result["options"]))
        console.print(_advice(result))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _heading(result: dict[str, Any]) -> str:
    device, work, step = result["device"], result["work"], result["options"][0]["step"]
    batch, parameters = work["batch"], step["trained"] + step["frozen"]
    return (
        f"{result['model']}: {_short(step['trained'])} of {_short(parameters)} parameters learn, "
        f"in {result['precision']}\n"
        f"{work['steps']:,} steps, {_short(work['tokens'])} tokens; {batch['rows']} x {batch['tokens']} at a time\n"
        f"{result['workers']} x {device['name']}: {_gib(device['memory'])} GiB and {_short(device['flops'])}FLOP/s "
        f"each, of which {result['mfu']:.0%} are reached (--mfu)\n"
    )


def _table(options: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("method", "deepspeed", "checkpointing", box=None, pad_edge=False)
    for name in (*_PARTS, "GiB", "host", "tokens/s", "hours", ""):
        table.add_column(name, justify="right")
    for number, option in enumerate(options):
        settings, memory, speed = option["settings"], option["memory"], option["tokens_per_second"]
        table.add_row(
            settings["adapter.method"],
            settings["training.deepspeed"] + ("" if number else " *"),
            "yes" if settings["training.gradient_checkpointing"] else "no",
            *(_gib(memory[name]) for name in _PARTS),
            _gib(option["total"]),
            _gib(memory["host"]) if memory["host"] else "",
            f"{speed:,.0f}" if speed else "",
            _hours(option["hours"]),
            "fits" if option["fits"] else "too large",
        )
    return table


def _advice(result: dict[str, Any]) -> str:
    configured, best = result["options"][0], result["recommended"]
    if best is None:
        return (
            "\nnothing fits: lower training.per_device_train_batch_size (raising gradient_accumulation_steps) or\n"
            "data.max_length, or take more workers or a larger GPU"
        )
    changes = [f"{key}={str(value).lower()}" for key, value in best.items() if value != configured["settings"][key]]
    return f"\nrecommended: {' '.join(changes) or 'as configured (*)'}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{hours:.2f}" if hours >= 0.01 else "<0.01"


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g} "
