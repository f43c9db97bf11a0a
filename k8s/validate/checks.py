"""All checks, in one place: of each object, of an installation as a whole, and of the list of what is made by hand."""

from collections.abc import Iterator, Sequence

from k8s.validate import commands, hardening, images, kuberay, references, schemas, secrecy, serve_config
from k8s.validate.manifests import Manifest, Problem
from k8s.validate.references import External
from k8s.validate.schemas import Kuberay

# What is asked of each object by itself.
EACH = (schemas.check, kuberay.check, images.check, secrecy.check, hardening.check, serve_config.check)


def installation(manifests: Sequence[Manifest], external: External, crds: Kuberay | None) -> Iterator[Problem]:
    """What is wrong with the objects of one overlay. `crds`: KubeRay's schemas; None leaves them out."""
    checks = (*EACH, crds.check) if crds else EACH
    for manifest in manifests:
        for check in checks:
            yield from check(manifest)
    yield from references.check(manifests, external)
    yield from commands.check(manifests)
