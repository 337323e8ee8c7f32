"""The version of the package, below all that tell it; and those of others."""

from functools import cache
from importlib import metadata

__version__ = "0.1.0"


@cache  # looking for it goes through all that is installed
def version_of(package: str) -> str | None:
    """The version of an installed package; None where there is none of that name."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
