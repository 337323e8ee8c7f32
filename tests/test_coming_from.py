"""The pages for those who come from another library: their blocks run beside ours, and both give the same numbers.

Ours alone run in `test_docs.py` as well. pyvene is not installed here: of its page only our half runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_model
from tolerances import close

import interp_core as ic
from interp_core import sites as S

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's blocks, theirs (```py) and ours (```python), in order; nnsight reads a trace from its own file."""
    for number, code in enumerate(re.findall(r"^```(?:py|python)\n(.*?)^```", page.read_text(), re.M | re.S)):
        run_code(code, Path(f"block_{number}.py"), names)
    return names


def run_code(code: str, file: Path, names: dict[str, Any]) -> None:
    file.write_text(code)
    exec(compile(code, str(file.absolute()), "exec"), names)


def sites_named(page: Path) -> dict[str, ic.Site]:
    """The page's table of names: theirs, and the site that it is here."""
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| `(S\.[^`]+)`", page.read_text(), re.M)
    return {theirs: eval(ours, {"S": S}) for theirs, ours in rows}


def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Equal up to rounding; heads may lie side by side."""
    close(theirs.detach().reshape(ours.shape), ours.detach(), toy_model())


def the_studies_agree(names: dict[str, Any]) -> None:
    """What every page does in both ways: patch, ablate, steer, lens, map, pattern, gradient, sweep."""
    same(names["logits"], names["model"].run(names["text"]).logits)
    same(names["patched_logits"], names["patched"].logits)
    same(names["ablated_logits"], names["ablated"].logits)
    same(names["pattern"], names["looks"][S.pattern[2, 3]])
    same(names["gradient"], names["run_with_gradient"].grad[S.resid_post[2]])
    same(names["shares"], names["maps"].effect[0, :, 0])
    same(names["effects"], names["sweep"].grid())
    assert names["steered_text"] == names["french"] + names["steered"].texts[0]
    assert names["steered"].texts[0] != names["model"].generate(names["french"], max_new_tokens=4).texts[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_transformer_lens_and_we_give_the_same(folder: Path) -> None:
    page = DOCS / "from_transformer_lens.md"
    bridge = toy_model().on("transformer_lens").engine.bridge
    bridge.tokenizer = toy_model().tokenizer
    names = run_blocks(page, {"bridge": bridge})
    the_studies_agree(names)
    same(names["blind_logits"], names["blinded"].logits)
    assert torch.equal(names["lens_ids"].flatten(), names["result"].top_ids[0, :, -1, 0])
    same(names["streams"].sum(0), names["stream_5"])

    bridge.set_use_attn_result(True)
    _, cache = bridge.run_with_cache(names["text"])
    sites = sites_named(page)
    assert len(sites) == 20
    run = toy_model().run(names["text"], read=list(sites.values()))
    for theirs, site in sites.items():
        both = cache[theirs], run[site].plain
        same(*(map(torch.tril, both) if site.name == "scores" else both))  # masked scores are any very small number


def test_nnsight_and_we_give_the_same(folder: Path) -> None:
    from nnsight import TransformersModel

    page = DOCS / "from_nnsight.md"
    eager = ic.load("toy:text", attn_implementation="eager", check=False)
    names = run_blocks(page, {"nn": TransformersModel(eager.hf, tokenizer=eager.tokenizer)})
    the_studies_agree(names)
    assert [int(i) for i in names["lens_ids"]] == names["lens"].top_ids[0, 1:, -1, 0].tolist()

    sites = sites_named(page)
    assert len(sites) == 16
    reads = [f"    values.append({theirs})\n" for theirs in sites]
    trace = "with torch.no_grad(), nn.trace(text):\n    values = nnsight.save([])\n" + "".join(reads)
    run_code(trace, folder / "names.py", names)
    run = toy_model().run(names["text"], read=list(sites.values()))
    for theirs, site in zip(names["values"], sites.values(), strict=True):
        same(theirs, run[site])
