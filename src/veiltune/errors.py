"""The exceptions of Veiltune, and the exit code each one ends a command with.

    VeiltuneError                     2
    ├── InputError (ValueError)       2   a bad argument, config or file: what was expected, what came, what to do
    │   ├── ConfigError               2   a TOML file or a --set override
    │   ├── DataError                 2   a table of texts and labels
    │   └── UnsupportedModelError     2   a model family or a cut that has no row in the table
    ├── PrivacyError                  3   a privacy plan that cannot be met
    ├── VendorError                   4   the other party
    │   ├── VendorUnreachableError    4   (also ConnectionError)
    │   ├── VendorRefusedError        4
    │   └── ProtocolError             4   a frame that breaks the protocol (also ValueError)
    ├── StorageError (OSError)        6   a disk that is full or cannot be written
    └── InterruptedRunError           130 the user asked to stop; the run resumes

Exit code 5 is kept for an audit whose lower bound exceeds the claim, 130 for Ctrl-C. Messages are one line and never
hold text, token ids, sample ids or gradients. An exception that replaces a standard one also inherits it.
"""

from __future__ import annotations


class VeiltuneError(Exception):
    """The root: everything that Veiltune raises on purpose."""

    exit_code: int = 2


class InputError(VeiltuneError, ValueError):
    """Something the caller gave is unusable."""


class RunInUseError(InputError):
    """Another process writes the run folder."""


class ConfigError(InputError):
    """A configuration value is unknown, missing or out of range."""


class DataError(InputError):
    """A table cannot be read as texts and labels."""


class UnsupportedModelError(InputError):
    """A model family, shape or cut that Veiltune has no table for."""


class PrivacyError(VeiltuneError):
    """A privacy plan is infeasible, or a step would break the guarantee that was stated."""

    exit_code = 3


class VendorError(VeiltuneError):
    """The other party refused, vanished or broke the protocol."""

    exit_code = 4


class VendorUnreachableError(VendorError, ConnectionError):
    """No answer from the vendor."""


class VendorRefusedError(VendorError):
    """The vendor answered with a refusal; its cause is the message."""


class ProtocolError(VendorError, ValueError):
    """A frame is malformed, oversized, out of order or not what the job declared."""


class StorageError(VeiltuneError, OSError):
    """The disk is full or cannot be written; what was there before is intact."""

    exit_code = 6


class InterruptedRunError(VeiltuneError):
    """The user asked to stop; the run folder resumes."""

    exit_code = 130
