"""API keys: the file, the ring that follows it, and what a check gives away."""

import hashlib
import hmac
import json
import logging
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import ConfigError
from heliostat.serving import keys
from heliostat.serving.keys import KeyRing

ENTRY = {"name": "alice", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def names(ring: KeyRing, *presented: str | None) -> list[str | None]:
    found = [ring.check(key) for key in presented]
    return [key.name if key else None for key in found]


def test_the_file_holds_no_key_and_is_its_owners_alone(path: Path) -> None:
    secret = keys.add(path, "alice", models=["cron"], requests_per_minute=60, max_concurrent=2)
    assert secret.startswith("hsk_")
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (entry,) = keys.listing(path)
    assert entry.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert (entry.name, entry.models, entry.requests_per_minute, entry.max_concurrent) == ("alice", ("cron",), 60, 2)
    assert entry.sha256 not in repr(entry)
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == ["keys.json"]


def test_keys_are_added_checked_and_revoked(path: Path) -> None:
    alice, bob = keys.add(path, "alice"), keys.add(path, "bob")
    assert names(KeyRing(path), alice, bob, alice[:-1], alice + "x", "", None) == [
        "alice", "bob", None, None, None, None,
    ]  # fmt: skip
    keys.revoke(path, "alice")
    assert names(KeyRing(path), alice, bob) == [None, "bob"]


def test_names_are_unique(path: Path) -> None:
    keys.add(path, "alice")
    with pytest.raises(ConfigError, match="`alice` is taken"):
        keys.add(path, "alice")
    with pytest.raises(ConfigError, match=r"no key has the name `bob` \(there are: alice\)"):
        keys.revoke(path, "bob")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("", {}, "name"),
        ("a b", {}, "name"),
        ("a\n", {}, "name"),
        ("-a", {}, "name"),
        ("a" * 65, {}, "name"),
        ("a", {"models": []}, "models"),
        ("a", {"models": ["cron@3"]}, "models"),
        ("a", {"requests_per_minute": 0}, "requests_per_minute"),
        ("a", {"max_concurrent": -1}, "max_concurrent"),
    ],
)
def test_wrong_values_are_refused_by_name(path: Path, name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys.add(path, name, **values)
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys.json:1: .* not JSON"),
        ("{\n\n'keys': []}", "keys.json:3: .* not JSON"),
        ("[]", "keys.json: .*"),
        ("{}", "keys: Field required"),
        ('{"keys": 3}', "keys: "),
        ('{"keys": ["hsk_secret"]}', "entry 1: "),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "name": "bob", "sha256": "hsk_secret"}]}), r"entry 2 \(bob\): sha256: "),
        (json.dumps({"keys": [{**ENTRY, "sha256": "A" * 64}]}), r"entry 1 \(alice\): sha256: "),
        (json.dumps({"keys": [{**ENTRY, "key": "hsk_secret"}]}), r"entry 1 \(alice\): key: Extra inputs"),
        (json.dumps({"keys": [{**ENTRY, "created": "hsk_secret"}]}), r"entry 1 \(alice\): created: "),
        (json.dumps({"keys": [{**ENTRY, "models": []}]}), r"entry 1 \(alice\): models: "),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "sha256": "1" * 64}]}), "two entries have the name `alice`"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "name": "bob"}]}), "the same sha256"),
    ],
)
def test_a_malformed_file_is_told_with_the_entry_and_without_values(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        KeyRing(path)
    assert str(path) in str(error.value)
    assert "hsk_secret" not in str(error.value)


def test_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heliostat keys add"):
        KeyRing(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        keys.add(tmp_path / "missing" / "keys.json", "alice")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        keys.listing(tmp_path / "latin")


def test_a_running_ring_follows_its_file(path: Path, clock: Clock) -> None:
    alice = keys.add(path, "alice")
    ring = KeyRing(path, clock=clock)
    bob = keys.add(path, "bob")
    assert names(ring, alice, bob) == ["alice", None], "it has not looked again yet"
    clock.now += keys.RELOAD_S
    assert names(ring, alice, bob) == ["alice", "bob"]
    keys.revoke(path, "alice")
    clock.now += keys.RELOAD_S
    assert names(ring, alice, bob) == [None, "bob"]


def test_an_edit_in_place_counts(path: Path, clock: Clock) -> None:
    alice = keys.add(path, "alice")
    ring = KeyRing(path, clock=clock)
    path.write_text(path.read_text().replace("alice", "carol"))
    clock.now += keys.RELOAD_S
    assert names(ring, alice) == ["carol"]


def test_a_mounted_secret_is_followed(tmp_path: Path, clock: Clock) -> None:
    """Kubernetes swaps a link to the folder that holds the files; their links do not change."""
    for folder, name in (("..1", "alice"), ("..2", "bob")):
        (tmp_path / folder).mkdir()
        keys.add(tmp_path / folder / "keys.json", name)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    alice = keys.add(tmp_path / "..1" / "keys.json", "carol")
    ring = KeyRing(tmp_path / "keys.json", clock=clock)
    assert names(ring, alice) == ["carol"]
    (tmp_path / "..new").symlink_to("..2")
    os.rename(tmp_path / "..new", tmp_path / "..data")
    clock.now += keys.RELOAD_S
    assert names(ring, alice) == [None]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("keys.json")
    keys.add(tmp_path / "link.json", "alice")
    assert (tmp_path / "link.json").is_symlink()
    assert [key.name for key in keys.listing(tmp_path / "keys.json")] == ["alice"]


def test_a_broken_file_keeps_the_keys_and_a_deleted_one_does_not(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    alice = keys.add(path, "alice")
    good = path.read_text()
    ring = KeyRing(path, clock=clock)

    path.write_text(good[:-10])
    for _ in range(3):
        clock.now += keys.RELOAD_S
        assert names(ring, alice) == ["alice"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "stay valid" in record.message

    path.unlink()
    clock.now += keys.RELOAD_S
    assert names(ring, alice) == [None]
    assert "no API key is valid" in caplog.records[-1].message
    path.write_text("broken")
    clock.now += keys.RELOAD_S
    assert names(ring, alice) == [None], "what was valid before is nothing"

    path.write_text(good)
    clock.now += keys.RELOAD_S
    assert names(ring, alice) == ["alice"]
    assert alice not in caplog.text
    assert hashlib.sha256(alice.encode()).hexdigest() not in caplog.text


def test_every_entry_is_compared_whatever_is_presented(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal work by construction: the same calls of the constant-time comparison, on texts of one length."""
    secrets = [keys.add(path, name) for name in ("first", "middle", "last")]
    ring = KeyRing(path)
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    entries = [key.sha256 for key in keys.listing(path)]
    for presented in (*secrets, "wrong", "x" * 100_000, "", None):
        compared.clear()
        ring.check(presented)
        assert [other for _, other in compared] == entries
        assert {len(one) for one, _ in compared} == {64}


def test_strange_texts_are_no_keys(path: Path) -> None:
    keys.add(path, "alice")
    assert names(KeyRing(path), "\ud800", "\x00", "ключ", " ", "hsk_", "a" * 10**6) == [None] * 6


def test_an_entry_for_nothing_lets_nobody_in(path: Path) -> None:
    """As a script writes it that hashes an unset variable."""
    path.write_text(json.dumps({"keys": [{**ENTRY, "sha256": hashlib.sha256(b"").hexdigest()}]}))
    assert names(KeyRing(path), None, "") == [None, None]


def _add_ten(path: Path, number: int) -> None:
    for index in range(10):
        keys.add(path, f"{number}-{index}")


def test_concurrent_edits_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_ten, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(keys.listing(path)) == 40
