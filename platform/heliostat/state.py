"""The state folder: everything Heliostat writes on a machine unless told otherwise. Knows only its paths."""

import os
from pathlib import Path

# Ray sets it for the command of a submitted job.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def folder() -> Path:
    """`$HELIOSTAT_HOME`, or `.heliostat` in the current directory; absolute, not created here.

    The current directory of a submitted Ray job is deleted after it: there it is `.heliostat` in the home directory.
    """
    default = Path.home() if _RAY_JOB in os.environ else Path()
    return Path(os.environ.get("HELIOSTAT_HOME") or default / ".heliostat").absolute()


def runs() -> Path:
    """Where run folders go by default."""
    return folder() / "runs"


def audits() -> Path:
    """Where `heliostat audit` keeps the last audit of each experiment."""
    return folder() / "audits"


def token_cache() -> Path:
    """Tokenised data, keyed by content and configuration."""
    return folder() / "tokens"


def downloads() -> Path:
    """Copies of remote files: `$HELIOSTAT_CACHE`, or `downloads` in the state folder."""
    return Path(os.environ.get("HELIOSTAT_CACHE") or folder() / "downloads").absolute()


def converted_models() -> Path:
    """Hugging Face folders made from GGUF files, keyed by content."""
    return folder() / "models"


def mlflow_database() -> Path:
    """The embedded MLflow store."""
    return folder() / "mlflow.db"


def mlflow_artifacts() -> Path:
    """Artifacts of the embedded MLflow store."""
    return folder() / "artifacts"
