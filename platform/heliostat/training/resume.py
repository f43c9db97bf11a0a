"""Go on with a run by its folder or name, and mend the folder first if asked to. Knows folders, not training."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from heliostat import experiment, state, storage
from heliostat.errors import ConfigError
from heliostat.training import checkpoint, mirror, runs, trainer
from heliostat.training.trainer import TrainResult


def resume(reference: str, console: Console, *, repair: bool = False) -> TrainResult:
    """Train an unfinished run to its end, by the configuration in its folder.

    `reference`: a run folder or a URI of one; or its name, or what stands before its number, in the state
    folder's runs. With `repair` the folder is mended before.

    Raises:
        ConfigError: there is no such run, it is over, or its configuration cannot be read.
        ResourceError: another process is working on it.
    """
    folder = mirror.fetch_run(reference) if storage.is_remote(reference) else find(reference)
    config = experiment.load(folder / "config.yaml")
    if repair:
        with runs.locked(folder):
            mend(folder, trainer.config_hash(config), lambda text: console.print(text, highlight=False, markup=False))
    return trainer.train(config, console, run=runs.reopen(folder))


def find(reference: str) -> Path:
    """The run folder that is meant: of several runs with that name the last.

    Raises:
        ConfigError: there is none.
    """
    named = sorted(state.runs().glob(f"{reference}-[0-9][0-9][0-9][0-9]"), reverse=True) if "/" not in reference else []
    for folder in (Path(reference).absolute(), state.runs() / reference, *named):
        if (folder / "config.yaml").exists():
            return folder
    raise ConfigError(
        f"`{reference}` is no run folder (with a config.yaml), and {state.runs()} has no run of that name"
    )


def mend(folder: Path, config_hash: str, tell: Callable[[str], object]) -> None:
    """Check every checkpoint, set aside those that are not whole, and write run.json anew if it cannot be read."""
    root = folder / "checkpoints"
    if not runs.facts(folder):
        attempts = max([int(path.name.removeprefix("attempt-")) for path in root.glob("attempt-[0-9]*")], default=1)
        runs.write(folder, config_hash, attempts)
        tell(f"{folder / 'run.json'} could not be read and was written anew")
    for each in checkpoint.newest_first(root):
        if faults := each.faults():
            tell(checkpoint.set_aside(each, faults))
    whole = checkpoint.newest_first(root)
    steps = ", ".join(str(each.step) for each in whole)
    tell(f"goes on from step {whole[0].step} (whole checkpoints: {steps})" if whole else "goes on from the beginning")
