"""`heliostat keys`: what its three actions do, and what they show."""

import json
from pathlib import Path

import pytest

from heliostat.errors import ConfigError
from heliostat.serving import key_commands
from heliostat.serving.keys import KeyRing


def run(action: str, file: Path, name: str | None = None, models: list[str] | None = None) -> dict[str, object]:
    return key_commands.run(action, str(file), name, models, 60 if models else None, None)


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    added = run("add", file, "alice", ["cron"])
    secret = str(added["key"])
    key = KeyRing(file).check(secret)
    assert key is not None
    assert key.name == "alice"
    assert secret in key_commands.show(added)

    run("add", file, "bob")
    listed = run("list", file)
    assert key.sha256 not in json.dumps(listed)
    assert secret not in json.dumps(listed)
    alice, bob = key_commands.show(listed).splitlines()
    assert "alice" in alice
    assert "cron; 60 requests a minute" in alice
    assert "all models; no limits" in bob

    for name in ("alice", "bob"):
        assert f"`{name}` is revoked" in key_commands.show(run("revoke", file, name))
    assert key_commands.show(run("list", file)) == "no keys"
    assert KeyRing(file).check(secret) is None


@pytest.mark.parametrize("action", ["add", "revoke"])
def test_a_missing_name_is_asked_for(tmp_path: Path, action: str) -> None:
    with pytest.raises(ConfigError, match=f"whose key.* keys {action} .* NAME"):
        run(action, tmp_path / "keys.json")
