"""The one exception of this package."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked. One line: the file or key, what was expected, what was found."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
