"""nnsight beside us: imported without side effects on the caller's own code."""

from __future__ import annotations

from pathlib import Path

import torch

from interp_core.engines.nnsight import library


def test_backward_works_in_a_file_that_is_no_python(tmp_path: Path) -> None:
    library()
    page = tmp_path / "page.md"
    page.write_text("| `query=…` | a table |\nloss.backward()\n")
    loss = torch.ones(2, requires_grad=True)
    exec(compile("\nloss.sum().backward()", str(page), "exec"), {"loss": loss})
    assert torch.equal(loss.grad, torch.ones(2))
