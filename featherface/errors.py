"""Errors that a user can act on.

Each carries one sentence: what was wrong, where, and what to do. The command line prints it and exits with code 2.
"""


class FeatherFaceError(Exception):
    """Base of every error caused by input, files or options rather than by a fault of the package."""


class CheckpointError(FeatherFaceError):
    """A weights file cannot be read, or does not fit the model."""


class ImageError(FeatherFaceError):
    """An image cannot be read, or cannot be used."""


class DataError(FeatherFaceError):
    """A data set, annotation or prediction file is missing or malformed."""
