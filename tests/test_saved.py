"""Readings as plain tensors in files, and whole runs in folders."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from pictures import inputs, picture
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

TEXTS = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: wet\nA:", "Q: old\nA: young\n\nQ: dry\nA: wet\n\nQ: big\nA:"]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def torch_saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["value"]


@pytest.mark.parametrize("again", [pickled, torch_saved, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_reading_are_plain_tensors(again: Callable[[Any], Any], dtype: torch.dtype) -> None:
    """Logits, gradients, whole sites and parts; with a graph where torch copies tensors that have one."""
    model = tiny_model("llama", dtype=dtype)
    ids = torch.tensor([[5, 17, 33, 8], [9, 54, 12, 70]])
    run = model.run(ids, read=[S.resid_post, S.z[1, 0].at(-1)], grad=lambda logits: logits[:, -1].sum())
    readings = [run.logits, run[S.resid_post], run[S.resid_post[1]], run[S.z[1, 0].at(-1)], run.grad[S.resid_post[0]]]
    for reading in readings:
        copied = again(reading)
        assert type(copied) is Tensor and copied.dtype == dtype and torch.equal(copied, reading)
    assert again is copy.copy or type(again([{"x": readings[1]}])[0]["x"]) is Tensor


def saved(folder: Path, run: ic.Run) -> ic.SavedRun:
    assert run.save(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "run.safetensors"]
    return ic.open_run(str(folder))


def full_run(model: ic.Model) -> ic.Run:
    """A padded batch with every kind of reading, edits, logits and gradients."""
    tokens = model.tokens(TEXTS).name(words=["small", "wet", "young"]).name(all_of=[(0, 8), (0, 3), (0, 12)])
    reads = [
        S.resid_post, S.z[3], S.z[2, 1].at(-1), S.q[1, [0, 2]].at("words"), S.mlp_out[[0, -1]].at("all_of"),
        S.resid_mid[2].at([[0, 1], [0], [2, -1]]), S.pattern[1], S.pattern[4, 2].at(query=-1), S.z[0].at([0, -1]),
        S.embed, S.final_norm.at(-1), S.mlp_act[1].at(tokens.mask),
    ]  # fmt: skip
    edits = [S.mlp_out[1].scale(0.5), S.resid_post[2].at("words").add(torch.ones(128)), S.z[3, 1].at(-1).zero()]
    edits += [S.pattern[2].knockout(query=-1, key=[0, 1])]
    return model.run(tokens, read=reads, edits=edits, grad=lambda logits: logits.logsumexp(-1).sum())


def asked(store: Any, site: S.Site) -> Any:
    """A value, or what the error says."""
    try:
        return store[site]
    except ic.InterpError as error:
        return f"{type(error).__name__}: {error}"


def test_all_that_a_run_gave_comes_back(tmp_path: Path) -> None:
    """Values of sites and of parts of them, refusals, receipts; without the model, and mapped from the file."""
    run = full_run(toy_model())
    again = saved(tmp_path / "run", run)
    parts = [S.resid_post[3], S.resid_post.at(-1), S.resid_post[[1, 2]], S.z[3, 1].at("words"), S.pattern[1, 0]]
    for site in [*run, *parts, S.resid_mid[1], S.resid_post[9], S.pattern[1].at(key=40)]:
        for before, after in ((run, again), (run.grad, again.grad)):
            expected, value = asked(before, site), asked(after, site)
            if isinstance(expected, str):
                assert value == expected
            else:
                assert type(value) is ic.Reading and torch.equal(value, expected), site
    for site in (S.resid_mid[2].at([[0, 1], [0], [2, -1]]), S.resid_post[1].at("all_of"), S.z[2, 1].at(-1)):
        assert all(map(torch.equal, again.rows(site), run.rows(site)))
    assert again.plan == run.plan and again.receipts == run.receipts and list(again) == list(run)
    assert torch.equal(again.logits, run.logits) and torch.equal(again.logits.at(-1), run.logits.at(-1))
    assert again.source == "toy:text" and "toy:text" in repr(again)
    for name in ("ids", "mask"):
        assert torch.equal(getattr(again.tokens, name), getattr(run.tokens, name))
    for name in ("texts", "offsets", "spans", "labels", "inputs"):
        assert getattr(again.tokens, name) == getattr(run.tokens, name), name
    anew = toy_model().run(again.tokens, again.plan.reads, again.plan.edits)
    torch.testing.assert_close(anew.logits, run.logits, atol=1e-4, rtol=1e-4)  # another kernel than with gradients


@pytest.mark.parametrize("logits", [False, -1, [[0, 1], [2], [0]]])
def test_logits_as_they_were_kept(tmp_path: Path, logits: Any) -> None:
    run = toy_model().run(TEXTS, read=S.resid_post[1].at(-1), logits=logits)
    again = saved(tmp_path, run)
    with pytest.raises(ic.ReadError, match="no gradients"):
        again.grad
    if logits is False:
        with pytest.raises(ic.ReadError, match="ended before the logits"):
            again.logits
        return
    assert torch.equal(again.logits, run.logits) and again.logits.site == run.logits.site


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5"])
def test_every_site_of_a_family(tmp_path: Path, family: str, padded: ic.Tokens) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    names = list(dict.fromkeys(name for name, _ in model.atlas.entries))
    run = model.run(padded, read=[S.named(name) for name in names if not model.can(name, "read")])
    again = saved(tmp_path, run)
    for site in run:
        for entry in model.atlas.select(site):
            one = S.Site(site.name, entry.layer) if site.info.layered else site
            assert again[one].dtype == run[one].dtype and torch.equal(again[one], run[one]), one


def test_inputs_of_images_are_kept(tmp_path: Path) -> None:
    run = tiny_model("qwen3_vl").run(inputs("qwen3_vl", [[picture("qwen3_vl")]]), read=S.vision_embed)
    again = saved(tmp_path, run)
    assert torch.equal(again[S.vision_embed], run[S.vision_embed])
    assert {n: v.shape for n, v in again.tokens.inputs.items()} == {n: v.shape for n, v in run.tokens.inputs.items()}


def test_what_no_folder_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = toy_model()
    run = model.run(TEXTS[0], edits=S.mlp_out[1].apply(lambda x: x * 2))
    with pytest.raises(ic.PlanError, match="a function has no JSON form"):
        run.save(tmp_path / "run")
    with pytest.raises(ic.LoadError, match="save takes a folder"):
        run.save(3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole")
    model = toy_model()
    return model.run(TEXTS, read=S.resid_post[1], edits=S.mlp_out[1].scale(0.5), logits=-1).save(folder)


def damaged(whole: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "run.json").write_text(json.dumps(change(json.loads((folder / "run.json").read_text()))))
    return folder


def test_a_run_without_any_part_of_its_head_is_refused(whole: Path, tmp_path: Path) -> None:
    """By the law that nothing half-read is given: each key in turn, and each value as a kind that it is not."""
    head = json.loads((whole / "run.json").read_text())
    for key in head:
        kinds: list[Any] = [lambda h, k=key: {n: v for n, v in h.items() if n != k}]
        kinds += [lambda h, k=key: h | {k: 7}] if key not in ("source", "model", "gradients") else []
        for change in kinds:
            with pytest.raises(ic.LoadError, match=r"run\.json|safetensors"):
                ic.open_run(damaged(whole, tmp_path, change))
    with pytest.raises(ic.LoadError, match="of format list"):
        ic.open_run(damaged(whole, tmp_path, lambda head: [head]))


def test_other_values_are_refused(whole: Path, tmp_path: Path) -> None:
    """Cut short, changed by a bit, taken away; a folder that holds nothing."""
    folder = damaged(whole, tmp_path, lambda head: head)
    path = folder / "run.safetensors"
    data = path.read_bytes()
    for other in (data[:-1], data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]):
        path.write_bytes(other)
        with pytest.raises(ic.LoadError, match="not the file that was saved with it"):
            ic.open_run(folder)
    path.unlink()
    with pytest.raises(ic.LoadError, match=r"run\.safetensors is missing"):
        ic.open_run(folder)
    with pytest.raises(ic.LoadError, match=r"there is no run\.json in it; run\.save"):
        ic.open_run(tmp_path / "nothing")


def test_writing_into_a_value_leaves_the_file(whole: Path) -> None:
    """Values are mapped copy-on-write."""
    before = (whole / "run.safetensors").read_bytes()
    run = ic.open_run(whole)
    run[S.resid_post[1]].zero_()
    assert not run[S.resid_post[1]].any() and (whole / "run.safetensors").read_bytes() == before
