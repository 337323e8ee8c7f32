"""From numbers of single examples to tables with intervals: means, paired differences, and what chance would give.

Rows are one per example, method and form, with a number per metric; a number that is missing (None, NaN: skipped, or
not computed) does not count, and the table says how many do. Methods are compared on the examples that both have.

Source: the bootstrap of `interp_core.stats`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import interp_core as ic

KEYS = ("example", "method", "form")
Row = Mapping[str, Any]


def example_rows(example: Any, method: str, *tables: Sequence[Row], more: Row | None = None) -> list[dict[str, Any]]:
    """Rows of one example from the tables of its results (`Faithfulness.table()`, `Recovery.table()`, …), which have one
    row per form in the same order.

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
) -> list[dict[str, Any]]:
    """A row per method, form and metric: mean with its interval over examples, and the paired difference to a baseline.

    Args:
        rows: of single examples, see `example_rows`.
        metrics: names of their numbers.
        baseline: a method; of its forms, the one of the same name is compared, or its only one.
        boot: how intervals are drawn (default: 95 %, 2,000 resamples, seed 0).

    Raises:
        PlanError: no such baseline or metric, or an example twice.
    """
    boot = boot or ic.stats.Bootstrap()
    values: dict[tuple[str, str, str], dict[Any, float]] = {}
    for row in rows:
        for metric in metrics:
            series = values.setdefault((str(row["method"]), str(row["form"]), metric), {})
            if row["example"] in series:
                raise ic.PlanError(f"example {row['example']!r} is there twice for {row['method']} ({row['form']})")
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                series[row["example"]] = float(value)
    methods = dict.fromkeys(method for method, _, _ in values)
    if baseline is not None and baseline not in methods:
        raise ic.PlanError(f"no method {baseline!r} to compare with. {ic.errors.nearest(baseline, methods)}")
    if absent := [m for m in metrics if not any(series for (_, _, name), series in values.items() if name == m)]:
        known = (
            dict.fromkeys(name for row in rows for name in row if name not in KEYS) if isinstance(rows, list) else ()
        )
        raise ic.PlanError(f"no example has a number {absent[0]!r}. {ic.errors.nearest(absent[0], known)}")
    return [_line(key, series, _against(values, key, baseline), boot) for key, series in values.items()]


def _against(
    values: Mapping[tuple[str, str, str], Mapping[Any, float]], key: tuple[str, str, str], baseline: str | None
) -> Mapping[Any, float]:
    """The baseline's numbers for a method's, form's and metric's; nothing for its own."""
    method, form, metric = key
    if baseline is None or method == baseline:
        return {}
    own = {f: series for (m, f, name), series in values.items() if m == baseline and name == metric}
    return own.get(form, next(iter(own.values())) if len(own) == 1 else {})


def _line(
    key: tuple[str, str, str], series: Mapping[Any, float], other: Mapping[Any, float], boot: ic.stats.Bootstrap
) -> dict[str, Any]:
    """One line of the table; intervals need two examples."""
    method, form, metric = key
    numbers = list(series.values())
    line: dict[str, Any] = {"method": method, "form": form, "metric": metric, "examples": len(numbers)}
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
