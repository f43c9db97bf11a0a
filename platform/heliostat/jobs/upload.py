"""The files of this machine that a job needs, and where they lie in the job's folder. Knows nothing of Ray.

A job runs in a folder that mirrors the current one: relative paths mean the same there. Files from outside of it lie
below `files/`, and the job is told so. Hub names, models:/..., package:... and other URIs are left alone.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heliostat.data import records
from heliostat.data.config import TrainSource
from heliostat.errors import ConfigError, ModelError, ResourceError
from heliostat.experiment import ExperimentConfig
from heliostat.models import files
from heliostat.training import zero

# Ray's job server takes 100 MiB in one request (DASHBOARD_CLIENT_MAX_SIZE of ray._private.ray_constants, 2.60).
LIMIT_BYTES = 95 << 20
OUTSIDE = "files"


@dataclass(frozen=True)
class Upload:
    """What goes along with a job."""

    mounted: Sequence[Path] = ()
    """Folders that the cluster has at the same place: what is below is not sent."""
    here: Path = field(default_factory=Path.cwd)
    files: dict[str, Path] = field(default_factory=dict)
    """Place in the job's folder -> the file here."""

    def file(self, path: str) -> str:
        """Take one file along; returns its path in the job.

        Raises:
            ConfigError: there is no such file.
        """
        place = self._place(path)
        whole = self._whole(path)
        if not self._is_mounted(whole):
            if not whole.is_file():
                raise ConfigError(f"{path}: no such file (looked in {self.here})")
            self.files[place] = whole
        return place

    def data(self, source: str) -> str:
        """Take the files of a data source along, all that a pattern names; returns the source as the job reads it.

        Raises:
            DataError: there are none.
        """
        if _is_elsewhere(source):
            return source
        if not self._is_mounted(self._whole(source)):
            for path in records.local_files(source):
                self.file(str(path))
        return self._place(source)

    def model(self, reference: str) -> str:
        """Take a model folder or GGUF file along; returns the reference as the job reads it.

        Raises:
            ModelError: it looks like a path and is none; or it is an adapter whose base is a folder of this machine.
        """
        if _is_elsewhere(reference):
            return reference
        if self._is_mounted(self._whole(reference)) and reference.startswith(("/", "~", ".")):
            return self._place(reference)
        found = files.locate(reference)
        if isinstance(found, str):
            return reference
        if found.is_dir():
            _refuse_local_base(reference, found)
            for path in sorted(path for path in found.rglob("*") if path.is_file()):
                self.file(str(path))
            return self._place(reference)
        return self.file(reference)

    def package(self, folder: Path) -> None:
        """Take the library along, at the top of the job's folder, where Python looks."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                self.files[str(path.relative_to(folder.parent))] = path

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its place.

        Raises:
            ResourceError: they are more than Ray takes.
        """
        sizes = {place: path.stat().st_size for place, path in self.files.items()}
        if sum(sizes.values()) > LIMIT_BYTES:
            largest = max(sizes, key=lambda place: sizes[place])
            raise ResourceError(
                f"the job's files have {readable(sum(sizes.values()))}, and Ray takes {readable(LIMIT_BYTES)} with a "
                f"job; the largest is {self.files[largest]} ({readable(sizes[largest])}). Put large ones where the "
                "cluster reads them: a folder that it mounts at the same place (--mounted FOLDER), a model hub, "
                "the model registry"
            )
        return sizes

    def write(self, folder: Path) -> None:
        """Put all files at their places below the folder."""
        for place, path in self.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            files.link(path, target)

    def _whole(self, path: str) -> Path:
        return Path(os.path.normpath(self.here / Path(path).expanduser()))

    def _is_mounted(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.mounted)

    def _place(self, path: str) -> str:
        whole = self._whole(path)
        if self._is_mounted(whole):
            return str(whole)
        if whole.is_relative_to(self.here):
            return str(whole.relative_to(self.here))
        return f"{OUTSIDE}{whole}"


def of_config(upload: Upload, config: ExperimentConfig) -> dict[str, object]:
    """Take along what the configuration names; returns the keys whose value has to be another in the job.

    Keys of `serving` are left alone: no job serves, and its key files and certificates do not leave this machine.

    Raises:
        ConfigError, DataError, ModelError: a file is not there.
        ConfigError: storage_path is in the job's folder, which does not outlive it.
    """
    _check_storage(upload, config.storage_path)
    found: dict[str, tuple[object, object]] = {}
    for key, sources in _sources(config).items():
        as_list = [sources] if isinstance(sources, str) else sources
        moved = [_moved(upload, source) for source in as_list]
        found[key] = (sources, moved[0] if isinstance(sources, str) else moved)
    template, deepspeed = config.model.chat_template, config.training.deepspeed
    if template not in (None, "chatml"):
        found["model.chat_template"] = (template, upload.file(template))
    if deepspeed not in zero.PRESETS:
        found["training.deepspeed"] = (deepspeed, upload.file(deepspeed))
    if reference := config.model.model_name_or_path:
        found["model.model_name_or_path"] = (reference, upload.model(reference))
    if config.evaluation.baseline not in (None, "base"):
        found["evaluation.baseline"] = (config.evaluation.baseline, upload.model(config.evaluation.baseline))
    return {key: now for key, (before, now) in found.items() if before != now and not _same(before, now)}


def readable(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def _moved(upload: Upload, source: str | TrainSource) -> object:
    if isinstance(source, str):
        return upload.data(source)
    return {**source.model_dump(), "path": upload.data(source.path)}


def _sources(config: ExperimentConfig) -> Mapping[str, str | Sequence[str | TrainSource]]:
    data = config.data
    given = {"data.train": data.train, "data.validation": data.validation, "data.test": data.test}
    return {key: sources for key, sources in given.items() if sources is not None}


def _same(before: object, now: object) -> bool:
    """Whether two paths, or lists of paths, differ in their spelling only, such as ./a and a."""
    if isinstance(before, list) and isinstance(now, list):
        return all(map(_same, before, now))
    return os.path.normpath(str(before)) == now


def _check_storage(upload: Upload, path: str | None) -> None:
    if path is not None and not _is_elsewhere(path) and not Path(path).expanduser().is_absolute():
        raise ConfigError(
            f"storage_path: `{path}` would lie in the job's folder, which is deleted after it; give an absolute path "
            "that all nodes of the cluster share, or leave it out for HELIOSTAT_HOME of the cluster"
        )


def _is_elsewhere(reference: str) -> bool:
    return "://" in reference or reference.startswith(("models:/", "package:", records.HUB_PREFIX))


def _refuse_local_base(reference: str, folder: Path) -> None:
    """An adapter names its base by the path that it had when it was trained."""
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text()).get("base_model_name_or_path", "") if adapter.exists() else ""
    if base and not _is_elsewhere(base) and isinstance(files.locate(base), Path):
        raise ModelError(
            f"model `{reference}`: is an adapter of {base}, which is a file or folder of this machine; train it again "
            "with adapter.merge: true, or register it and name it as models:/..."
        )
