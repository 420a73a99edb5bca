"""What can go wrong, as one tree.

    PreftuneError
    +-- UserError            exit code 2: the input was refused, nothing was lost
    |   +-- ConfigError      a key, a value or a combination of options
    |   +-- DataError        a row, a file or a format
    |   +-- ArtifactError    a model, a tokenizer, a checkpoint or a cache that cannot be used
    +-- RunError             exit code 1: the run itself failed
        +-- NotFinite        a NaN or an infinity, stopped before it reached the weights
        +-- ResumeMismatch   the run folder belongs to another configuration
        +-- ReferenceMismatch  the policy does not start at its reference

Every message says what was found, what was allowed and what to do next.
"""

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "NotFinite",
    "PreftuneError",
    "ReferenceMismatch",
    "ResumeMismatch",
    "RunError",
    "UserError",
]


class PreftuneError(Exception):
    """The root of everything preftune raises on purpose."""

    exit_code = 1


class UserError(PreftuneError):
    """The user's input was refused."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a combination of options that has no meaning."""


class DataError(UserError):
    """A row, a file or a format that cannot be trained on."""


class ArtifactError(UserError):
    """A model, a tokenizer, a checkpoint or a cache that cannot be used."""


class RunError(PreftuneError):
    """The run failed after its input was accepted."""


class NotFinite(RunError):
    """A loss or a gradient is NaN or infinite; the weights were not touched."""


class ResumeMismatch(RunError):
    """What is on disk was written under another configuration."""


class ReferenceMismatch(RunError):
    """At step 0 the log-ratios are not zero: policy and reference differ."""
