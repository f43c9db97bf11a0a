"""The registry: everything that talks to MLflow."""

import os

# MLflow reads it at import, and would write a telemetry file into the home directory.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
