"""The door for Ray Serve: `import_path: serve.app:build`. Everything else is in heliostat.serving.endpoint."""

from heliostat.serving.endpoint import build

__all__ = ["build"]
