"""`heliostat merge`: its flags and output. Knows nothing of how adapters are merged."""

import argparse
from pathlib import Path

from heliostat.command import Command, Result


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="bundle of an adapter: a folder or models:/NAME/VERSION")
    parser.add_argument("folder", metavar="FOLDER", help="where the merged bundle goes; must not be there yet")


def _run(options: argparse.Namespace) -> Result:
    from heliostat.models import adapters, base
    from heliostat.registry import versions

    source = Path(base.resolve(versions.resolve(options.model).path))
    return {"model": options.model, "bundle": str(adapters.merge_bundle(source, Path(options.folder).absolute()))}


COMMAND = Command(
    "write the whole model that a bundle of an adapter stands for",
    _arguments,
    _run,
    lambda result: str(result["bundle"]),
)
