"""The version of vLLM whose interfaces the plugin knows."""

SERVED_VERSION = "0.32"


def is_served_version(version: str) -> bool:
    """Whether a version of vLLM is of the minor version that is served."""
    return version.split(".")[:2] == SERVED_VERSION.split(".")
