"""From numbers of single examples to tables with intervals: means, paired differences, and what chance would give.

Rows are one per example, method and form, with a number per metric. A number that is missing (None, NaN: skipped, or
not computed) does not count, nor does one that its row marks as degenerate, unless asked for; the table says how many
do. Methods are compared on the examples that both have.

Source: the bootstrap of `interp_core.stats`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import interp_core as ic

KEYS = ("example", "method", "form")
MARKS = dict.fromkeys(("RISE", "MAS", "RISE+AP"), "degenerate") | dict.fromkeys(
    ("deletion AUC", "insertion AUC"), "degenerate AUC"
)
"""Per metric, the column that says that an example's number means nothing."""
Row = Mapping[str, Any]
Key = tuple[str, str, str]
"""Method, form and metric."""


def example_rows(example: Any, method: str, *tables: Sequence[Row], more: Row | None = None) -> list[dict[str, Any]]:
    """Rows of one example from the tables of its results (`Faithfulness.table()`, `Recovery.table()`, …).

    Args:
        tables: each of one row per form, in the same order.
        more: further columns, such as seconds.

    Raises:
        PlanError: tables of other forms.
    """
    out = []
    for rows in zip(*tables, strict=False):
        forms = {str(row["vector"]) for row in rows}
        if len(forms) > 1 or len({len(table) for table in tables}) > 1:
            raise ic.PlanError(f"tables of one example have one row per form, in the same order; here {sorted(forms)}")
        merged: dict[str, Any] = {"example": example, "method": method, "form": forms.pop()}
        for row in rows:
            merged |= {name: value for name, value in row.items() if name != "vector"}
        out.append({**merged, **(more or {})})
    return out


def examples_csv(rows: Iterable[Row]) -> str:
    """The CSV file of rows, whatever columns each has; keys first."""
    rows = list(rows)
    columns = dict.fromkeys([*KEYS, *(name for row in rows for name in row)])
    return ic.runs.csv_text(rows, list(columns))


def compare(
    rows: Iterable[Row],
    metrics: Sequence[str],
    *,
    baseline: str | None = None,
    boot: ic.stats.Bootstrap | None = None,
    degenerate: bool = False,
) -> list[dict[str, Any]]:
    """A row per method, form and metric: mean with its interval over examples, paired difference to a baseline.

    Args:
        rows: of single examples, see `example_rows`.
        metrics: names of their numbers.
        baseline: a method; of its forms, the one of the same name is compared, or its only one.
        boot: how intervals are drawn (default: 95 %, 2,000 resamples, seed 0).
        degenerate: also count numbers that are marked so (`MARKS`), as published tables do.

    Raises:
        PlanError: no such baseline or metric, or an example twice.
    """
    rows, boot = list(rows), boot or ic.stats.Bootstrap()
    values: dict[Key, dict[Any, float]] = {}
    marked: dict[Key, int] = {}
    for row, metric in product(rows, metrics):
        key = str(row["method"]), str(row["form"]), metric
        series = values.setdefault(key, {})
        if row["example"] in series:
            raise ic.PlanError(f"example {row['example']!r} is there twice for {row['method']} ({row['form']})")
        mark = bool(row.get(MARKS.get(metric, "")))
        marked[key] = marked.get(key, 0) + mark
        value = row.get(metric)
        series[row["example"]] = math.nan if value is None or (mark and not degenerate) else float(value)
    methods = dict.fromkeys(method for method, _, _ in values)
    if baseline is not None and baseline not in methods:
        raise ic.PlanError(f"no method {baseline!r} to compare with. {ic.errors.nearest(baseline, methods)}")
    known = dict.fromkeys(name for row in rows for name in row if name not in KEYS)
    if absent := [metric for metric in metrics if metric not in known]:
        raise ic.PlanError(f"no example has a number {absent[0]!r}. {ic.errors.nearest(absent[0], known)}")
    finite = {key: {e: x for e, x in series.items() if math.isfinite(x)} for key, series in values.items()}
    return [_line(key, series, _against(finite, key, baseline), boot, marked[key]) for key, series in finite.items()]


def _against(values: Mapping[Key, Mapping[Any, float]], key: Key, baseline: str | None) -> Mapping[Any, float]:
    """The baseline's numbers for a method's, form's and metric's; nothing for its own."""
    method, form, metric = key
    if baseline is None or method == baseline:
        return {}
    own = {f: series for (m, f, name), series in values.items() if m == baseline and name == metric}
    return own.get(form, next(iter(own.values())) if len(own) == 1 else {})


def _line(
    key: Key, series: Mapping[Any, float], other: Mapping[Any, float], boot: ic.stats.Bootstrap, marked: int
) -> dict[str, Any]:
    """One line of the table; intervals need two examples."""
    method, form, metric = key
    numbers = list(series.values())
    line: dict[str, Any] = {"method": method, "form": form, "metric": metric, "examples": len(numbers)}
    line["degenerate"] = marked
    line["mean"] = sum(numbers) / len(numbers) if numbers else math.nan
    interval = boot.mean(numbers, name=metric) if len(numbers) > 1 else None
    line |= {"low": interval.low if interval else math.nan, "high": interval.high if interval else math.nan}
    both = [example for example in series if example in other]
    line["pairs"] = len(both)
    if len(both) > 1:
        gap = boot.difference([series[e] for e in both], [other[e] for e in both], name=metric)
        line |= {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
    else:
        line |= dict.fromkeys(("difference", "difference_low", "difference_high"), math.nan)
    return line
