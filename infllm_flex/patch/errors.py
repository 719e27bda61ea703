"""The one exception of this package."""


class UnsupportedModelError(ValueError):
    """No attention layer of a model can be sparse, or one layer attends in an unsupported way.

    `patch_model` raises it where the model shows this without running; otherwise the first forward
    does. The message says on one line what was found, what was tried and what to do next.
    """
