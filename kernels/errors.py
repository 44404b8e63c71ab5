"""Errors that a user can act on. Commands print them as one line and leave with exit code 2."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: the field or file, its value, what is allowed."""


class ConfigError(InputError):
    """A configuration value is unknown, of a wrong type, or impossible together with another."""


class DataError(InputError):
    """A corpus, tokenizer or indexed dataset is missing, damaged or does not fit the model."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or does not fit the model or the run."""
