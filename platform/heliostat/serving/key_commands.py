"""`heliostat keys`: make, revoke and list API keys. Knows the command's words, not how keys are kept."""

from collections.abc import Sequence
from typing import Any

from heliostat.errors import ConfigError
from heliostat.serving import keys


def run(
    action: str,
    file: str,
    name: str | None,
    models: Sequence[str] | None,
    requests_per_minute: int | None,
    max_concurrent: int | None,
) -> dict[str, Any]:
    """Do `add`, `revoke` or `list` to the key file; `add` returns the key, the only time it is shown.

    Raises:
        ConfigError: the name is missing, taken or unknown, or the file cannot be read or written.
    """
    if action == "list":
        entries = [key.model_dump(mode="json", exclude={"sha256"}) for key in keys.listing(file)]
        return {"file": file, "keys": entries}
    if name is None:
        raise ConfigError(f"whose key? heliostat keys {action} {file} NAME")
    if action == "revoke":
        keys.revoke(file, name)
        return {"file": file, "name": name, "revoked": True}
    limits = {"requests_per_minute": requests_per_minute, "max_concurrent": max_concurrent}
    return {"file": file, "name": name, "key": keys.add(file, name, models=models, **limits)}


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    if "keys" in result:
        return "\n".join(map(_line, result["keys"])) or "no keys"
    if "key" in result:
        return f"{result['key']}\n(the key of `{result['name']}`; it is not shown again)"
    return f"the key of `{result['name']}` is revoked"


def _line(entry: dict[str, Any]) -> str:
    rate, concurrent = entry["requests_per_minute"], entry["max_concurrent"]
    limits = [f"{rate} requests a minute"] if rate else []
    limits += [f"{concurrent} at once"] if concurrent else []
    models = ", ".join(entry["models"]) if entry["models"] else "all models"
    return f"{entry['name']:<20} {entry['created']}  {models}; {', '.join(limits) or 'no limits'}"
