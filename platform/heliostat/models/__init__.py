"""Models, their adapters and their files."""

import logging
import sys

# bitsandbytes looks for a kernel as it is imported, which PEFT does: it would be downloaded from the hub, and run.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
