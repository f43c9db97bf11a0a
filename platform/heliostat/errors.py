"""Every error Heliostat raises on purpose. Knows nothing of the code that raises them.

HeliostatError            exit code 1: the work failed
├── UserError             exit code 2: the input is wrong; the message names the file, line, key or flag to change
│   ├── ConfigError       the YAML file or an override
│   ├── DataError         a data file, a line of it, a column
│   │   └── AuditFailed   data that can be read, but should not be trained on
│   ├── ModelError        a model, tokenizer or bundle that cannot be loaded or must not be trusted
│   ├── RegistryError     a registered model, version or alias that does not exist
│   ├── StorageError      a place such as s3://... that cannot be reached, read or written
│   └── ResourceError     workers, GPUs, ports or disk that are not there
├── GateRefused           exit code 3: a promotion gate said no
├── TrainingError         exit code 1: a worker or the driver failed while training
└── JobFailed             a job on a cluster failed, with the exit code of its command
"""

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError's number is where a disk is full or a quota used up."""


class HeliostatError(Exception):
    """The base of all errors raised on purpose; its message is fit to be shown to the user."""

    exit_code = 1
    facts: Mapping[str, Any] = MappingProxyType({})
    """What `--json` tells beside the message."""


class UserError(HeliostatError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable or malformed."""


class AuditFailed(DataError):
    """An audit of the data found what `data.audit` does not allow."""

    def __init__(self, message: str, facts: Mapping[str, Any]) -> None:
        """`facts` are those of the audit."""
        super().__init__(message)
        self.facts = facts


class ModelError(UserError):
    """A model, tokenizer or bundle cannot be loaded, or must not be trusted."""


class RegistryError(UserError):
    """A registered model, version or alias does not exist."""


class StorageError(UserError):
    """A place such as s3://... cannot be reached, read or written."""


class ResourceError(UserError):
    """The machine or cluster lacks what was asked for."""


class GateRefused(HeliostatError):
    """A promotion gate said no."""

    exit_code = 3


class TrainingError(HeliostatError):
    """Training failed for a reason other than the user's input."""


class JobFailed(HeliostatError):
    """A job on a cluster failed or was stopped."""

    def __init__(self, message: str, exit_code: int, facts: Mapping[str, Any]) -> None:
        """`exit_code` is that of the job's command; `facts` are those of the job."""
        super().__init__(message)
        self.exit_code = exit_code
        self.facts = facts
