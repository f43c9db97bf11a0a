"""Images: a tag that says what is inside, and says what constraints.txt says."""

import re
from collections.abc import Iterator

from heliostat import __version__
from k8s.validate.manifests import Manifest, Pod, Problem, pods
from k8s.validate.render import FOLDER

CONSTRAINTS = dict(
    line.strip().split("==")
    for line in (FOLDER.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line and not line.startswith("#")
)
RAY_VERSION = CONSTRAINTS["ray"]
_GPU = "nvidia.com/gpu"


def tag(device: str) -> str:
    """The tag of this project's image as k8s/Dockerfile builds it now; `device`: cpu or cuda."""
    return f"{__version__}-ray{RAY_VERSION}-{device}"


def check(manifest: Manifest) -> Iterator[Problem]:
    """Images without a fixed version, of other versions than constraints.txt has, or without CUDA for a GPU."""
    for pod in pods(manifest):
        for place, container in pod.containers():
            yield from _image(pod, f"{place}.image", str(container.get("image")), _wants_gpu(container))


def _image(pod: Pod, place: str, image: str, wants_gpu: bool) -> Iterator[Problem]:
    name, _, given = image.rpartition(":")
    if "/" in given or not name or given == "latest":
        yield pod.problem(place, f"`{image}` has no version; what runs would change by itself")
        return
    if not re.search(r"(^|/)heliostat$", name):
        if pod.is_ray:
            yield pod.problem(place, f"`{image}` is not Heliostat's image")
        return
    allowed = [tag("cuda")] if wants_gpu else [tag("cpu"), tag("cuda")]
    if given not in allowed:
        yield pod.problem(place, f"the tag is {given}, but this checkout makes {' or '.join(allowed)}")


def _wants_gpu(container: dict[str, object]) -> bool:
    resources = container.get("resources")
    return isinstance(resources, dict) and _GPU in (resources.get("limits") or {})
