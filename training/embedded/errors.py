"""Errors that a user can act on: printed as one line, without a traceback."""


class TrainingError(Exception):
    """Bad input: the message names the flag, file or key, what was expected and what was found."""
