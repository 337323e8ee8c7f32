"""Tables of pandas, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import CapabilityError


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a `pandas.DataFrame`.

    Raises:
        CapabilityError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise CapabilityError("to_dataframe needs pandas: pip install pandas; table() gives the same rows") from error
    return pandas.DataFrame(rows)
