"""The one exception of this package."""


class UnsupportedModelError(ValueError):
    """No attention layer of a model can be made sparse.

    The message names what was found, what was tried and what to do next, on one line.
    """
