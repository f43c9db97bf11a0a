"""The endpoint's application behind a real HTTP server, for requests that no client should send."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from heliostat.models import base
from heliostat.serving.config import EndpointArgs
from tests.service import SIZES, listening

MAX_BODY_BYTES = 1 << 18


@pytest.fixture(scope="package")
def url(tiny_bundle: Path) -> Iterator[str]:
    """Where an endpoint with the model `tiny` (128 tokens long) listens."""
    args = EndpointArgs(**SIZES, max_body_bytes=MAX_BODY_BYTES)
    with listening(base.load_for_inference(str(tiny_bundle)), args) as address:
        yield address
