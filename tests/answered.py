"""What every page of a recipe must answer, and in which order."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from interp_core.report.html import STYLE

ORDER = ("<h1>", "What was asked", "What came out", "What it cost", ">Settings<", "How it was made", ">versions<")


def finding_of(page: Path) -> str:
    """The sentence that stands first of what came out; the page answers in order, and names no folder of this machine.

    Everything from the cost on is folded away, and no section is empty.
    """
    text = page.read_text()
    body = text.replace(STYLE, "")
    places = [body.find(part) for part in ORDER]
    assert -1 not in places and places == sorted(places), dict(zip(ORDER, places, strict=True))
    for folder in (*page.parents, Path.cwd(), Path.home()):
        where = text.find(str(folder))
        assert len(folder.parts) < 3 or where < 0, text[max(0, where - 200) : where + 200]
    assert "interp_core 0." in body and "<section></section>" not in body and "Model(" not in body
    came_out = body[body.index("What came out") :]
    assert "<summary" not in body[: body.index("What came out")]
    finding = re.match("What came out</h2><p><b>(.*?)</b></p>", came_out, re.S)
    assert finding is not None, came_out[:200]
    return unescape(finding[1])


def without_cost(page: Path) -> str:
    """A page without what the run cost and when it was made."""
    folded = re.sub("What it cost.*?</details>", "", page.read_text(), flags=re.S)
    return re.sub(r"20\d\d-\d\d-\d\d(T[\d:.]+Z)?", "", folded)
