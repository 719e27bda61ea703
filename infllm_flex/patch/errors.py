"""The one exception of this package."""


class UnsupportedModelError(ValueError):
    """No attention layer of a model can be made sparse, or one attends in a way that cannot be.

    Raised when patching wherever that can be told then, else by the first forward that shows it.
    The message names what was found, what was tried and what to do next, on one line.
    """
