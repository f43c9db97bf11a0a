"""`python -m k8s.validate --kuberay-crds DIR`: renders every overlay, with and without its options, and checks it.

Exit codes: 0 all is well, 1 something is wrong, 2 it could not be checked.
"""

import argparse
import sys
from pathlib import Path

from heliostat.errors import ConfigError
from k8s.validate import checks, references, render
from k8s.validate.manifests import Manifest, Problem
from k8s.validate.schemas import HOW_TO_GET, Kuberay


def main() -> int:
    """Check, tell what is wrong, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m k8s.validate", description="check the manifests in k8s/")
    parser.add_argument("--kuberay-crds", default="", metavar="DIR", help="folder of KubeRay's schemas, ray.io_*.yaml")
    options = parser.parse_args()
    try:
        crds = Kuberay(Path(options.kuberay_crds)) if options.kuberay_crds else None
        external = references.external()
        problems: list[Problem] = []
        everything: list[Manifest] = []
        for manifests in variants():
            everything += manifests
            problems += checks.installation(manifests, external, crds)
        problems += references.unused(everything, external)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in dict.fromkeys(str(problem) for problem in problems):
        print(line)
    print(f"{len(everything)} objects, {len(problems)} problems", file=sys.stderr)
    if crds is None:
        print(f"KubeRay's objects were not checked against its schemas. {HOW_TO_GET}", file=sys.stderr)
    return 1 if problems else 0


def variants() -> list[list[Manifest]]:
    """The objects of each overlay, as it is and with all options."""
    return [render.installation(overlay, options) for overlay in render.OVERLAYS for options in ((), [*render.OPTIONS])]


if __name__ == "__main__":
    sys.exit(main())
