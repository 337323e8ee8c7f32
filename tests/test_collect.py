"""Activations of many texts: the same as one by one, in bounded memory, resumed after a kill, read back lazily."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from pictures import inputs, picture
from tolerances import close
from torch import Tensor

import interp_core as ic
from interp_core import activations, collect
from interp_core import sites as S

WORDS = ("big", "hot", "old", "wet", "small")
TEXTS = [f"Q: {WORDS[n % 5]}\nA:" + f" {WORDS[n % 3]}" * (7 * n % 11) for n in range(17)]
READS = [
    S.resid_post, S.z[3].at(-1), S.z[2, 1], S.pattern[1], S.pattern[2, 3].at(query=-1), S.pattern[0].at(query=[0, -1], key="words"),
    S.mlp_out[[0, -1]].at("words"), S.q[1, [0, 2]].at(slice(1, None)), S.logits.at(-1), S.pattern[4].at(query="words", key=-1),
]  # fmt: skip
"""Whole and in parts; selected positions differ in number from text to text."""


def spanned(model: ic.Model, texts: list[str]) -> list[ic.Tokens]:
    return [model.tokens(text).name(words=(0, len(text))) for text in texts]


def same(
    acts: ic.Activations, model: ic.Model, texts: list[Any], reads: list[S.Site], parts: Sequence[S.Site] = ()
) -> None:
    """Hold what was collected of each text against a run of it alone."""
    assert len(acts) == len(texts)
    for number, text in enumerate(texts):
        run = model.run(text, read=reads)
        for site in [*reads, *parts]:
            stacked = site.info.layered and not isinstance(site.layers, int)
            wanted = run[site].as_subclass(Tensor).squeeze(1 if stacked else 0)
            value = acts[site, number]
            assert type(value) is Tensor and value.dtype == wanted.dtype and value.shape == wanted.shape, (site, number)
            close(value, wanted, model)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_text_has_what_it_has_alone(tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs together; sites, their parts, tokens and names; texts in the order in which they were given."""
    model = toy_model()
    texts = spanned(model, TEXTS)
    monkeypatch.setattr(collect, "SHARD_BYTES", 1 << 18)
    acts = model.collect(iter(texts), READS, out=tmp_path, batch_size=batch_size)
    parts = [S.resid_post[3].at(-1), S.resid_post[[0, 2]], S.resid_post[1].at("words"), S.pattern[1, 0].at(query=-1)]
    same(acts, model, texts, READS, parts)
    assert len(list((tmp_path / "shards").iterdir())) > 2 and acts.reads == tuple(READS)
    again = ic.Activations.open(str(tmp_path))
    for number in (0, 5, -1):
        tokens, given = again.tokens(number), texts[number]
        assert torch.equal(tokens.ids, given.ids) and tokens.spans == given.spans and tokens.labels == given.labels
        assert tokens.texts == given.texts and tokens.offsets == given.offsets
        assert torch.equal(again[S.resid_post[2], number], acts[S.resid_post[2], number])
    assert all(map(torch.equal, again.values("z[3]@-1"), (acts[S.z[3].at(-1), n] for n in range(len(acts)))))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_5"])
def test_every_site_of_families(tmp_path: Path, family: str) -> None:
    """Windows, sinks, linear attention, latent attention; in batches where padding changes nothing, else by length."""
    model = tiny_model(family)
    ids = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2, 9, 7)]
    reads = [S.named(n) for n in dict.fromkeys(n for n, _ in model.atlas.entries) if not model.can(n, "read")]
    acts = model.collect(ids, reads, out=tmp_path, batch_size=3)
    same(acts, model, ids, reads)


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_engines(tmp_path: Path, engine: str) -> None:
    model = ic.load(tiny_model("llama").hf, engine=engine, check=False)
    ids = [torch.arange(3, 3 + n) for n in (5, 9, 2)]
    acts = model.collect(ids, [S.resid_post, S.z[1].at(-1)], out=tmp_path, batch_size=3)
    same(acts, model, ids, [S.resid_post, S.z[1].at(-1)])


def test_dtypes_are_kept_and_images_run_alone(tmp_path: Path) -> None:
    model = tiny_model("qwen3_vl", dtype=torch.bfloat16)
    pictured = inputs("qwen3_vl", [[picture("qwen3_vl")]])
    texts, site = [torch.arange(5, 12), pictured], S.resid_post[1].at("vision")
    acts = model.collect(texts, [S.resid_post[1]], out=tmp_path / "a")
    assert acts[S.resid_post[1], 0].dtype == torch.bfloat16
    assert torch.equal(acts[site, 1], model.run(pictured, read=S.resid_post[1])[site][0])
    assert "vision" in acts.tokens(1).spans and not acts.tokens(1).inputs


def test_memory_holds_a_batch_and_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the values that are alive at a time, counted as they come and go, against all that is written."""
    import weakref

    alive = {"now": 0, "most": 0, "all": 0}
    inner = collect.row_values

    def gone(size: int) -> None:
        alive["now"] -= size

    def counted(*args: Any) -> list[Tensor]:
        values = inner(*args)
        for value in values:
            alive["now"] += value.nbytes
            alive["all"] += value.nbytes
            weakref.finalize(value, gone, value.nbytes)
        alive["most"] = max(alive["most"], alive["now"])
        return values

    monkeypatch.setattr(collect, "row_values", counted)
    monkeypatch.setattr(collect, "SHARD_BYTES", shard := 1 << 18)
    texts = (f"Q: {WORDS[n % 5]}\nA:" + " hot" * 20 for n in range(80))
    acts = toy_model().collect(texts, [S.resid_post, S.mlp_out, S.z], out=tmp_path, batch_size=2)
    batch = sum(value.nbytes for site in acts.reads for value in [acts[site, 0]]) * 2
    assert alive["all"] > 20 * (shard + batch) and alive["most"] <= shard + 2 * batch
    assert max(path.stat().st_size for path in (tmp_path / "shards").iterdir()) < 2 * (shard + batch)


def test_values_are_mapped_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard is opened before a value of it is asked for; values lie in the file's mapping, and writing leaves it."""
    monkeypatch.setattr(collect, "SHARD_BYTES", 1 << 15)
    model = toy_model()
    model.collect(TEXTS, S.resid_post[2], out=tmp_path, batch_size=2)
    opened: list[Path] = []
    inner = activations.mapped
    monkeypatch.setattr(activations, "mapped", lambda path: opened.append(path) or inner(path))
    acts = ic.Activations.open(tmp_path)
    assert not opened and "17 texts" in repr(acts)
    one, other = acts[S.resid_post[2], 0], acts[S.resid_post[2], 0]
    assert len(opened) == 1 and one.data_ptr() == other.data_ptr()
    before = opened[0].read_bytes()
    one.zero_()
    assert opened[0].read_bytes() == before


def runs_of(model: ic.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows with every pass."""
    rows: list[int] = []
    inner = ic.Model.run

    def run(self: ic.Model, x: Any, *args: Any, **more: Any) -> ic.Run:
        rows.append(len(x))
        return inner(self, x, *args, **more)

    monkeypatch.setattr(ic.Model, "run", run)
    return rows


@pytest.mark.parametrize("after", ["put", "add"])
def test_a_killed_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    """kill -9 once a shard is written, and once it is noted; the rest is done, and all is as if nothing had happened."""
    model = toy_model()
    monkeypatch.setattr(collect, "SHARD_BYTES", 1 << 15)
    child = os.fork()
    if not child:  # in the copy of this process
        shards = 0

        def killing(inner: Any) -> Any:
            def wrapped(self: Any, *args: Any, **more: Any) -> Any:
                nonlocal shards
                result = inner(self, *args, **more)
                shards += after == "add" or "shards/" in next(iter(args[0]))
                if shards == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        owner = ic.runs.RunFolder if after == "put" else ic.runs.Rows
        setattr(owner, after, killing(getattr(owner, after)))
        model.collect(TEXTS, S.resid_post[2], out=tmp_path, batch_size=2)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with pytest.raises(ic.LoadError, match="is not finished: call model.collect with the same arguments"):
        ic.Activations.open(tmp_path)
    noted = sum(json.loads(line)[0].get("shard") is not None for line in journal(tmp_path))
    rows = runs_of(model, monkeypatch)
    acts = model.collect(TEXTS, S.resid_post[2], out=tmp_path, batch_size=3)
    assert noted == (1 if after == "put" else 2) and 0 < sum(rows) < len(TEXTS)
    monkeypatch.undo()
    same(acts, model, TEXTS, [S.resid_post[2]])
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "DONE").exists()


def journal(folder: Path) -> list[str]:
    return (folder / "record/rows/texts.jsonl.journal").read_text().splitlines()


def test_what_is_there_is_kept_what_is_broken_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with more texts than before, whatever the size of batches."""
    model = toy_model()
    monkeypatch.setattr(collect, "SHARD_BYTES", 1 << 15)
    rows = runs_of(model, monkeypatch)
    model.collect(TEXTS[:9], S.resid_post[2], out=tmp_path, batch_size=2)
    assert sum(rows) == 9
    model.collect(TEXTS[:9], S.resid_post[2], out=tmp_path, batch_size=5)
    assert sum(rows) == 9
    model.collect(TEXTS, S.resid_post[2], out=tmp_path, batch_size=3)
    assert sum(rows) == len(TEXTS)
    path = sorted((tmp_path / "shards").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-100])
    acts = ic.Activations.open(tmp_path)
    with pytest.raises(ic.LoadError, match=r"000001\.safetensors cannot be read"):
        list(acts.values(S.resid_post[2]))
    acts = model.collect(TEXTS, S.resid_post[2], out=tmp_path)
    assert len(TEXTS) < sum(rows) < len(TEXTS) + 9
    monkeypatch.undo()
    same(acts, model, TEXTS, [S.resid_post[2]])
    path.unlink()
    assert len(model.collect(TEXTS, S.resid_post[2], out=tmp_path)) == len(TEXTS)


def test_others_are_refused_with_what_differs(tmp_path: Path) -> None:
    model = toy_model()
    model.collect(TEXTS[:4], [S.resid_post[2], S.z[1]], out=tmp_path)
    changed = [*TEXTS[:2], "Q: old", TEXTS[3]]
    with pytest.raises(ic.PlanError, match=r"other texts: text 2 \('Q: old'\) was another; give another folder"):
        model.collect(changed, [S.resid_post[2], S.z[1]], out=tmp_path)
    with pytest.raises(ic.PlanError, match="other texts: it has 4, 3 were given"):
        model.collect(TEXTS[:3], [S.resid_post[2], S.z[1]], out=tmp_path)
    with pytest.raises(
        ic.PlanError, match=r"another collection: read was \['resid_post\[2\]', 'z\[1\]'\], is \['z\[1\]'\]"
    ):
        model.collect(TEXTS[:4], S.z[1], out=tmp_path)
    with pytest.raises(ic.PlanError, match=r"another collection: .*other weights"):
        tiny_model("llama").collect([torch.arange(5)], [S.resid_post[2], S.z[1]], out=tmp_path)
    assert len(model.collect(TEXTS[:4], [S.resid_post[2], S.z[1]], out=tmp_path)) == 4


@pytest.mark.parametrize(
    ("texts", "read", "options", "kind", "says"),
    [
        ("Q: big", S.embed, {}, ic.PlanError, "collect takes texts, one by one, not str"),
        (TEXTS, (), {}, ic.PlanError, "collect needs sites"),
        (TEXTS, S.resid_post[9], {}, ic.SiteError, "9"),
        (TEXTS, S.embed.at([[0], [1]]), {}, ic.PlanError, "positions that mean the same in every text"),
        (TEXTS, S.embed, {"batch_size": 0}, ic.PlanError, "batch_size= takes a number of prompts from 1 on"),
        (TEXTS, S.embed, {"batch_size": True}, ic.PlanError, "batch_size= takes"),
        (TEXTS, S.embed, {"out": 3}, ic.PlanError, "takes a path"),
        ([], S.embed, {}, ic.PlanError, "collect got no texts"),
        ([*TEXTS, ""], S.embed, {}, ic.TextError, "text 17: .*empty"),
        (TEXTS, S.embed.at(11), {}, ic.PositionError, r"text 0 \('Q: big\\nA:'\): no position 11"),
        ([*TEXTS, 3], S.embed, {}, ic.TextError, "text 17: a model takes text"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path: Path, texts: Any, read: Any, options: dict[str, Any], kind: Any, says: str) -> None:
    model = toy_model()
    with pytest.raises(kind, match=says):
        model.collect(texts, read, **{"out": tmp_path, **options})


def test_what_is_not_there(tmp_path: Path) -> None:
    acts = toy_model().collect(TEXTS[:2], S.embed, out=tmp_path / "good")
    for index, found in ((S.resid_post[1], "takes a site and"), ((S.embed, 2), "no text 2: there are 2, 0 to 1")):
        with pytest.raises(ic.ReadError, match=found):
            acts[index]  # type: ignore[index]
    with pytest.raises(ic.ReadError, match=r"resid_post\[1\] was not read in this collection. It holds: embed"):
        acts[S.resid_post[1], 0]
    with pytest.raises(ic.LoadError):
        ic.Activations.open(tmp_path / "nothing")


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_model().collect(TEXTS, S.embed, out=tmp_path, progress=True)
    assert "collect 17 of 17, " in capsys.readouterr().err
