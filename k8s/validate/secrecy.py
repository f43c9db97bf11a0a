"""No secret is in the manifests: passwords, keys and tokens come from Secrets that are made by hand."""

import re
from collections.abc import Iterator
from typing import Any

from k8s.validate.manifests import Manifest, Problem

_NAME = re.compile(r"(?i)(password|passwd|secret|token|credential|api[-_]?key|access[-_]?key|private[-_]?key)")
# What is named so and is no secret: references, places, switches, counts.
_HARMLESS = re.compile(
    r"(?i)(ref|name|path|file|dir|provider|seconds|volume|type|mountServiceAccountToken|tokens|tokenizer\w*)$"
)
_IN_TEXT = [
    (re.compile(r"://[^/\s:@]+:[^/\s@$]+@"), "a URL with a password"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), "an access key of AWS"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"), "a token of a model hub"),
]


def check(manifest: Manifest) -> Iterator[Problem]:
    """Secrets in plain text, by kind, by name or by form."""
    if manifest.kind == "Secret":
        yield manifest.problem("kind", "a Secret in a file is a secret for all who read it; see docs/kubernetes.md")
        return
    for place, key, value in _leaves(manifest.body):
        if isinstance(value, str):
            for pattern, what in _IN_TEXT:
                if pattern.search(value):
                    yield manifest.problem(place, f"holds {what}; refer to a Secret")
        if _is_plain(key, value):
            yield manifest.problem(place, f"`{key}` is given in plain text; refer to a Secret with valueFrom")


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value that is named like a secret stands there itself."""
    if not isinstance(value, str) or not value or value.startswith("/"):
        return False
    return bool(_NAME.search(key)) and not _HARMLESS.search(key)


def _leaves(node: Any, place: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value with its place and its name; a variable's value is named as the variable."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = f"{place}.{name}" if place else str(name)
            named = str(node["name"]) if name == "value" and "name" in node else str(name)
            # What stands below a `redisPassword` is its value or a reference.
            yield from _leaves(value, inner, key if name == "value" and _NAME.search(key) else named)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{place}[{number}]", key)
    else:
        yield place, key, node
