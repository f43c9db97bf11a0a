"""A bundle is written whole or not at all, and any change to it is found and named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from heliostat.errors import ModelError
from heliostat.models import base, bundle
from tests import tiny
from tests.bundles import write_bundle

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "heliostat.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    return write_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_it_holds_what_it_says(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FILES
    manifest = bundle.verify(made)
    assert set(manifest["files"]) == FILES - {"heliostat.json"}
    assert (manifest["format_version"], manifest["task"], manifest["format"]) == (1, "causal_lm", "prompt_completion")


def test_transformers_alone_loads_the_same_model(made: Path) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(made)("the red cat goes to the house")["input_ids"]])
    assert ids.shape[1] > 5
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(made).eval()
        trained = AutoModelForCausalLM.from_pretrained(made.with_name("bundle-weights")).eval()
        ours = base.load_for_inference(str(made))
        expected = trained(ids).logits
        assert torch.equal(plain(ids).logits, expected)
        assert torch.equal(ours.model(ids).logits, expected)
    assert expected.std() > 0.1
    assert plain.generation_config.max_new_tokens == ours.model.generation_config.max_new_tokens == 8
    assert ours.tokenizer.chat_template == AutoTokenizer.from_pretrained(made).chat_template != ""


def test_weights_are_linked_not_copied(made: Path) -> None:
    weights = made.with_name("bundle-weights") / "model.safetensors"
    assert (made / "model.safetensors").stat().st_ino == weights.stat().st_ino


@pytest.mark.parametrize("name", sorted(FILES - {"heliostat.json"}))
def test_one_flipped_bit_in_any_file_is_found(name: str, own: Path) -> None:
    data = bytearray((own / name).read_bytes())
    data[len(data) // 2] ^= 1
    (own / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"bundle/{name}: is (damaged|not valid JSON)"):
        bundle.verify(own)


def test_a_damaged_manifest_is_found(own: Path) -> None:
    path = own / "heliostat.json"
    text = path.read_text()
    for bad in (text[:-20], "", "[]", "{}", '{"format_version": 1}', text.replace("{", "\xff", 1)):
        path.write_text(bad)
        with pytest.raises(ModelError, match=r"heliostat\.json: is damaged or not a bundle manifest"):
            bundle.verify(own)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(name: str, own: Path) -> None:
    (own / name).unlink()
    with pytest.raises(ModelError, match=name):
        bundle.verify(own)


@pytest.mark.parametrize("name", ["modeling_x.py", "extra.json", "model-00002.safetensors", "sub"])
def test_a_file_that_is_not_listed_is_refused(name: str, own: Path) -> None:
    if name == "sub":
        (own / name).mkdir()
    else:
        (own / name).write_text("{}")
    with pytest.raises(ModelError, match=f"bundle/{name}: does not belong to the bundle"):
        bundle.verify(own)


def _changed(own: Path, **changes: Any) -> None:
    path = own / "heliostat.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_pickles_and_code_are_refused_even_when_listed(own: Path) -> None:
    from heliostat.models.files import sha256

    (own / "pytorch_model.bin").write_bytes(b"x")
    listed = bundle.read_manifest(own)["files"]
    _changed(own, files={**listed, "pytorch_model.bin": sha256(own / "pytorch_model.bin")})
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights"):
        bundle.verify(own)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(version: Any, own: Path) -> None:
    _changed(own, format_version=version)
    with pytest.raises(ModelError, match=f"format_version {version} is not 1"):
        bundle.verify(own)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ""])
def test_a_listed_path_out_of_the_folder_is_refused(name: str, own: Path) -> None:
    (own.parent / "outside").write_text("x")
    _changed(own, files={name: "0" * 64})
    with pytest.raises(ModelError, match="its file list is not one"):
        bundle.verify(own)


def test_a_folder_that_is_no_bundle_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a bundle \(no heliostat\.json\)"):
        bundle.verify(tmp_path)


def test_writing_again_replaces_the_older_one(made: Path, own: Path) -> None:
    (own / "old file").write_text("old")
    weights = made.with_name("bundle-weights")
    again = bundle.write(
        own, weights=weights, tokenizer=tiny.tokenizer(), generation_config=GenerationConfig(max_new_tokens=3),
        manifest={"task": "causal_lm", "note": "naïve"},
    )  # fmt: skip
    assert again == own
    assert {path.name for path in own.iterdir()} == FILES
    assert bundle.verify(own)["note"] == "naïve"
    assert {path.name for path in own.parent.iterdir()} == {"bundle"}, "no temporary folder is left"


class TokenizerThatFails:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise OSError("disk full")


def test_writing_changes_neither_the_weights_nor_older_bundles_of_them(made: Path, own: Path) -> None:
    weights = made.with_name("bundle-weights")
    before = {path: path.read_bytes() for folder in (weights, made) for path in folder.iterdir()}
    bundle.write(
        own, weights=weights, tokenizer=tiny.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=3), manifest={"task": "causal_lm"},
    )  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before


def test_a_failure_while_writing_leaves_the_older_one_whole(made: Path, own: Path) -> None:
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        bundle.write(
            own, weights=made.with_name("bundle-weights"), tokenizer=TokenizerThatFails(),
            generation_config=GenerationConfig(), manifest={},
        )  # fmt: skip
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    bundle.write(
        own, weights=made.with_name("bundle-weights"), tokenizer=tiny.tokenizer(),
        generation_config=GenerationConfig(), manifest={},
    )  # fmt: skip
    assert {path.name for path in own.iterdir()} == FILES, "what the failure left is no part of the next one"
    bundle.verify(own)


def test_without_hard_links_files_are_copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("not supported on this file system")

    monkeypatch.setattr(os, "link", refuse)
    weights = made.with_name("bundle-weights")
    copied = bundle.write(
        tmp_path / "copy", weights=weights, tokenizer=tiny.tokenizer(), generation_config=GenerationConfig(),
        manifest={},
    )  # fmt: skip
    bundle.verify(copied)
    assert (copied / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()


def test_rewriting_a_file_of_the_weights_folder_would_be_noticed(tmp_path: Path) -> None:
    """A hard link shares the content: what changes one in place changes both, and the hash tells."""
    made = write_bundle(tmp_path / "bundle")
    weights = tmp_path / "bundle-weights" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged"):
        bundle.verify(made)


DERIVED = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.5, "eos_token_id": [0], "pad_token_id": 1}


def derive(source: Path, target: Path, **changes: Any) -> Path:
    return bundle.derive(source, target, generation_config=DERIVED, changes=changes)


def test_a_derived_bundle_differs_in_its_decoding_settings_alone(made: Path, tmp_path: Path) -> None:
    derived = derive(made, tmp_path / "new" / "bundle", decoding={"gain": 0.1})
    before, after = bundle.read_manifest(made), bundle.verify(derived)
    changed = {name for name in FILES if (made / name).read_bytes() != (derived / name).read_bytes()}
    assert changed == {"generation_config.json", "heliostat.json"}
    assert after["decoding"] == {"gain": 0.1}
    assert {key: after[key] for key in before if key != "files"} == {k: v for k, v in before.items() if k != "files"}
    loaded = GenerationConfig.from_pretrained(derived)
    assert {key: getattr(loaded, key) for key in DERIVED} == DERIVED


def test_a_derived_bundle_shares_its_other_files(made: Path, tmp_path: Path) -> None:
    derived = derive(made, tmp_path / "bundle")
    same = {name for name in FILES if (made / name).samefile(derived / name)}
    assert same == FILES - {"generation_config.json", "heliostat.json"}
    assert bundle.verify(made), "the old one is as it was"


def test_a_derived_bundle_may_lose_what_its_parent_had(made: Path, tmp_path: Path) -> None:
    first = derive(made, tmp_path / "first", prompt_prefix={"system_prompt": "x"}, other=1)
    second = derive(first, tmp_path / "second", prompt_prefix=None)
    assert "prompt_prefix" in bundle.read_manifest(first)
    assert "prompt_prefix" not in bundle.read_manifest(second)
    assert bundle.read_manifest(second)["other"] == 1


def test_deriving_replaces_what_an_earlier_try_left(made: Path, tmp_path: Path) -> None:
    derive(made, tmp_path / "bundle", decoding=1)
    (tmp_path / "bundle.tmp").mkdir()
    (tmp_path / "bundle.tmp" / "left.bin").write_bytes(b"over")
    assert bundle.verify(derive(made, tmp_path / "bundle", decoding=2))["decoding"] == 2


def test_only_bundles_can_be_derived_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a bundle"):
        derive(tmp_path, tmp_path / "bundle")
    assert bundle.read_generation_config(tmp_path) == {}


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_damaged_generation_config_is_named(own: Path, content: str, message: str) -> None:
    (own / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"generation_config\.json: {message}"):
        bundle.read_generation_config(own)
