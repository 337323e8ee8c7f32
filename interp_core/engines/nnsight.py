"""nnsight, imported on behalf of users who did not ask for it."""

from __future__ import annotations

from types import ModuleType


def library() -> ModuleType:
    """nnsight, without its side effect on code that has no Python source file.

    Importing nnsight puts a `Tensor.backward` in place that parses its caller's source, to see whether it stands in a
    `with` line; where that source is no Python (a documentation page, a template, a cell of another kernel) a plain
    `loss.backward()` ended in its `SyntaxError`. Such a call is no trace.
    """
    import nnsight
    from nnsight.intervention.backward import BackwardTracer

    if "parse" not in vars(BackwardTracer):
        inherited = BackwardTracer.parse

        def parse(self: BackwardTracer, source: str, lineno: int) -> object:
            try:
                return inherited(self, source, lineno)
            except SyntaxError:
                return None

        BackwardTracer.parse = parse
    return nnsight
