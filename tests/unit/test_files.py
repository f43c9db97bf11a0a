"""Where a model reference leads, and what is refused because it would run code."""

import json
from pathlib import Path

import pytest

from heliostat.errors import ModelError
from heliostat.models import files


def test_folders_files_and_hub_names_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for reference in ("model", "./model", "~/model", str(tmp_path / "model")):
        assert files.locate(reference) == tmp_path / "model", reference
    assert files.locate("model.gguf") == tmp_path / "model.gguf"
    for reference in ("gpt2", "HuggingFaceTB/SmolLM2-135M", "models"):
        assert files.locate(reference) == reference


@pytest.mark.parametrize("reference", ["./gone", "/gone", "~/gone", "gone.gguf", "a/b/c", "models:/name/1"])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(reference: str) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder") as caught:
        files.locate(reference)
    assert f"model `{reference}`" in str(caught.value)


def test_a_file_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert files.locate("package:some_model_package/weights.gguf") == package / "weights.gguf"
    with pytest.raises(ModelError, match=r"the package `some_model_package` has no file `other\.gguf`"):
        files.locate("package:some_model_package/other.gguf")


@pytest.mark.parametrize("package", ["not_installed", "json.decoder", "a-b", "", "json.."])
def test_a_package_that_is_not_there_is_named(package: str) -> None:
    with pytest.raises(ModelError, match=r"the Python package `.*` is not installed; `make install`"):
        files.locate(f"package:{package}/x.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "b.pth", "c.pkl", "d.pickle", "e.ckpt", "f.joblib"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    files.refuse_unsafe(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=f"{name}: pickled weights can run code when loaded and are refused; convert"):
        files.refuse_unsafe(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_model_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"auto_map": {}}))
    files.refuse_unsafe(tmp_path)
    path.write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    with pytest.raises(ModelError, match=f"{name}: has an `auto_map`, which loads code shipped with the model"):
        files.refuse_unsafe(tmp_path)
    path.write_text("{")
    with pytest.raises(ModelError, match=f"{name}: is not valid JSON"):
        files.refuse_unsafe(tmp_path)


def test_the_identity_of_weights_is_their_names_and_contents(tmp_path: Path) -> None:
    def digest(**contents: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in contents.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "README.md").write_text(folder.name)
        return files.weights_sha256(folder)

    same = digest(a=b"1", b=b"2")
    assert digest(b=b"2", a=b"1") == same
    assert len({same, digest(a=b"1"), digest(a=b"2", b=b"1"), digest(a=b"1", c=b"2"), digest()}) == 5


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The one-block message sample of FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected
