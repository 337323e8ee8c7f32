"""Methods on many prompts: in batches what they give one by one, in order, resumed; what cannot be joined is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import tiny_model, toy_model
from tolerances import close
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

TEXTS = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: wet\nA:", "Q: old\nA:", "Q: old\nA: young\n\nQ: dry\nA:", "Q: hot\nA:"]
TWINS = ["Q: big\nA: small\n\nQ: wet\nA:", "Q: hot\nA:", "Q: big\nA:", "Q: hot\nA: young\n\nQ: big\nA:", "Q: dry\nA:"]


class CountConfig(ic.Config):
    """Settings.

    Attributes:
        factor: of each prompt, or of all.
        notes: not per prompt.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"factor"})
    factor: list[float] | float = 1.0
    notes: Any = None


@dataclass(frozen=True, eq=False)
class Counts(ic.Result):
    """What prompts give, each and together."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "norm": ("batch", "pos"), "attention": ("head", "batch", "query", "key"), "last": ("batch",),
        "total": ("d_model",), "mean": ("d_model",), "tokens": (),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {
        "total": "sum", "mean": "mean", "tokens": "sum", "starts": "rows", "vocab": "union", "how": "first", "rows": "sum"
    }  # fmt: skip
    norm: Tensor
    attention: Tensor
    last: Tensor
    total: Tensor
    mean: Tensor
    tokens: Tensor
    starts: tuple[str, ...]
    vocab: dict[str, str]
    how: str
    rows: int
    layer: int = 2


class Counting(ic.Method):
    """Per prompt and over prompts; axes as wide as the batch."""

    name = "counting"
    Config = CountConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: CountConfig) -> Counts:
        """One pass."""
        run = model.run(tokens, read=[S.resid_post[2], S.pattern[2], S.resid_post[2].at(-1)], logits=False)
        stream, mask = run[S.resid_post[2]], tokens.mask[..., None]
        factor = torch.as_tensor(config.factor).expand(len(tokens))
        last = run[S.resid_post[2].at(-1)]
        return Counts(
            stream.norm(dim=-1), run[S.pattern[2]].transpose(0, 1), last.norm(dim=-1) * factor,
            (stream * mask).sum((0, 1)), last.mean(0), tokens.mask.sum(), tuple(row[0] for row in tokens.labels),
            {str(i): model.word(i) for i in tokens.ids.unique().tolist()}, f"{len(tokens)} rows", len(tokens),
        )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_make_what_one_batch_makes(batch_size: int, side: str) -> None:
    """Rows in order and laid out as the whole batch, padded where that is; sums, means and the rest joined by their
    rules; settings per prompt go with their prompts."""
    model = toy_model()
    tokens, factor = model.tokens(TEXTS), [1.0, 2.0, 3.0, 4.0, 5.0]
    if side == "right":
        shift = [-int(row.long().argmax()) for row in tokens.mask]
        ids, mask = (
            torch.stack([row.roll(n) for row, n in zip(x, shift, strict=True)]) for x in (tokens.ids, tokens.mask)
        )
        tokens = replace(tokens, ids=ids, mask=mask)
    whole = Counting()(model, tokens, factor=factor)
    parts = Counting()(model, tokens, batch_size=batch_size, factor=factor)
    real = tokens.mask
    for name in ("last", "total", "mean", "tokens"):
        close(getattr(parts, name).float(), getattr(whole, name).float(), model)
    assert parts.norm.shape == whole.norm.shape and parts.attention.shape == whole.attention.shape
    close(parts.norm[real], whole.norm[real], model)
    for row, keep in enumerate(real):
        chosen = parts.attention[:, row][:, keep][:, :, keep], whole.attention[:, row][:, keep][:, :, keep]
        close(*chosen, model)
        assert batch_size > 4 or parts.attention[:, row][:, ~keep].isnan().all()
    assert parts.starts == whole.starts and parts.vocab == whole.vocab and parts.rows == 5 and parts.layer == 2
    assert parts.how == f"{min(batch_size, 5)} rows" or batch_size == 2


STUDIES: dict[str, dict[str, Any]] = {
    "logit_lens": {"at": -1},
    "activation_patching": {"corrupted": TWINS, "answer": [" cold", " dry", " young", " wet", " cold"], "other": " big"},
    "ablations": {"kind": "mean", "reference": TWINS[:2], "over": "all", "score": "logprob", "answer": " dry"},
    "attribution_patching": {"corrupted": TWINS, "layers": [1, 2], "score": score.logprob([" cold", 300, " young", 5, " dry"])},
    "path_patching": {"corrupted": TWINS, "senders": ["z[1,2]", "mlp_out[0]"], "at": -1},
    "function_vectors": {"trials": 2, "shots": 3, "questions": 2, "top": 2, "layers": [2]},
}  # fmt: skip


def condition(result: Any, value: Tensor) -> float:
    """What rounding is relative to: shares are divided by the difference of two scores, which may be small."""
    divided = float((result.source - result.base).abs().min()) if hasattr(result, "source") else 1.0
    return max(1.0, float(value.nan_to_num().abs().max())) / min(1.0, divided or 1.0)


@pytest.mark.parametrize("name", STUDIES)
def test_every_method_of_ours(name: str) -> None:
    """In batches as one by one; the answers and corrupted prompts of each prompt go with it."""
    model, settings = toy_model(), STUDIES[name]
    together = ic.method(name)(model, TEXTS, batch_size=2, **settings)
    per_prompt = ic.method(name).Config.PER_PROMPT
    for number, text in enumerate(TEXTS):
        own = {k: v[number] if k in per_prompt and isinstance(v, list) else v for k, v in settings.items()}
        if isinstance(own.get("score"), score.Score):
            own["score"] = score.logprob(own["score"].targets[0][number])
        one = ic.method(name)(model, text, **own)
        for field, axes in one.AXES.items():
            value, wanted = getattr(together, field), getattr(one, field)
            if wanted is None or "batch" not in axes:
                assert (value is None) == (wanted is None)
                continue
            part = value.narrow(axes.index("batch"), number, 1)
            if wanted.is_floating_point():
                close(part.nan_to_num(), wanted.nan_to_num(), model, size=condition(one, wanted))
            else:
                assert torch.equal(part, wanted), field
    assert not any(field.name == "tokens" and len(together.tokens) != 5 for field in fields(together))


def test_work_that_all_prompts_share_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, calls = type(ic.method("function_vectors")), []
    inner = kind._extracted
    monkeypatch.setattr(kind, "_extracted", lambda *args: calls.append(1) or inner(*args))
    assert kind()(toy_model(), TEXTS, batch_size=1, **STUDIES["function_vectors"]).top_ids.shape[0] == 5 and calls == [
        1
    ]


def test_scores_and_positions_of_each_prompt_go_with_it() -> None:
    model = toy_model()
    at = [[0], [1], [2], [-1], [0]]
    lens = ic.method("logit_lens")
    assert torch.equal(lens(model, TEXTS, at=at, batch_size=2).top_ids, lens(model, TEXTS, at=at).top_ids)
    targets = [[7], [8], [9], [10], [11]]
    parts = lens(model, TEXTS, at=[-1], targets=targets, batch_size=2)
    assert parts.target_ids.tolist() == targets
    edits = {"site": "resid_post", "layers": [1], "at": ic.PerRow((0, 1, 2, -2, 3))}
    nll = score.nll(model.tokens(TEXTS, " cold"), "target")
    tokens = model.tokens(TEXTS, " cold")
    patched = ic.method("ablations")
    close(
        patched(model, tokens, score=nll, batch_size=2, **edits).effect,
        patched(model, tokens, score=nll, **edits).effect,
        model,
    )


@pytest.mark.parametrize("family", ["gemma2", "qwen3_5"])
def test_families(family: str) -> None:
    """Also where padding changes numbers on one side or both: batches are then of one length."""
    model = tiny_model(family)
    lens = ic.method("logit_lens")
    ids = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2, 9)]
    tokens = ic.Tokens.stack([model.input(row) for row in ids])
    parts = lens(model, tokens, at=-1, batch_size=3)
    for number, row in enumerate(ids):
        close(parts.top_logprob[number], lens(model, row, at=-1).top_logprob[0], model)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of every batch that `Counting` runs."""
    rows: list[int] = []
    inner = Counting.run

    def run(self: Counting, model: ic.Model, tokens: ic.Tokens, config: CountConfig) -> Counts:
        rows.append(len(tokens))
        return inner(self, model, tokens, config)

    monkeypatch.setattr(Counting, "run", run)
    return rows


def test_a_killed_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 in the third batch; it goes on, also with batches of another size, and gives the same."""
    model, out = toy_model(), tmp_path / "study"
    child = os.fork()
    if not child:
        rows = passes(monkeypatch)
        inner = Counting.run

        def run(self: Counting, model: ic.Model, tokens: ic.Tokens, config: CountConfig) -> Counts:
            if len(rows) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self, model, tokens, config)

        monkeypatch.setattr(Counting, "run", run)
        Counting()(model, TEXTS, batch_size=1, out=out)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not (out / "result.json").exists()
    rows = passes(monkeypatch)
    again = Counting()(model, TEXTS, batch_size=2, out=out, progress=True)
    assert sum(rows) == 3 and "counting 5 of 5" in capsys.readouterr().err
    assert Counts.load(out) == again and (out / "DONE").exists() and json.loads((out / "manifest.json").read_text())
    assert Counting()(model, TEXTS, out=out) == again and sum(rows) == 3
    whole = Counting()(model, TEXTS)
    for name in ("last", "total", "mean"):
        close(getattr(again, name), getattr(whole, name), model)
    part = next((out / "parts").iterdir()) / "result.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    before = sum(rows)
    close(Counting()(model, TEXTS, out=out).total, whole.total, model)
    assert before < sum(rows) <= before + 2


def test_another_study_is_refused_with_what_differs(tmp_path: Path) -> None:
    model = toy_model()
    Counting()(model, TEXTS, out=tmp_path, factor=2.0)
    for x, settings, says in (
        (TEXTS, {"factor": 3.0}, "factor was 2.0, is 3.0"),
        (TEXTS[:4], {"factor": 2.0}, "other prompts"),
        (TEXTS, {"factor": 2.0, "notes": torch.ones(3)}, "notes was None, is "),
    ):
        with pytest.raises(ic.PlanError, match=f"holds another result: {says}"):
            Counting()(model, x, out=tmp_path, **settings)
    with pytest.raises(ic.PlanError, match="another result: of 'counting', not of 'logit_lens'"):
        ic.method("logit_lens")(model, TEXTS, at=-1, out=tmp_path)
    with pytest.raises(ic.PlanError, match="counting: notes cannot be told from another one .*ic.keyed"):
        Counting()(model, TEXTS, out=tmp_path / "b", notes=iter([]))
    with pytest.raises(ic.PlanError, match="out= takes a folder, not int 3"):
        Counting()(model, TEXTS, out=3)


@dataclass(frozen=True, eq=False)
class Mean(ic.Result):
    """A mean over prompts that nobody can join."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"mean": ("d_model",)}
    mean: Tensor


class Averaging(Counting):
    """Over all prompts."""

    name = "averaging"
    calls = 0

    def run(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> Mean:
        """Count the calls."""
        type(self).calls += 1
        return Mean(torch.ones(3) * len(tokens))


class Unsaid(Averaging):
    """The same, without saying what it returns."""

    name = "unsaid"

    def run(self, model: ic.Model, tokens: ic.Tokens, config: Any):  # type: ignore[no-untyped-def,override]
        """Count the calls."""
        type(self).calls += 1
        return Mean(torch.ones(3))


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"out": "x"}])
def test_what_is_made_of_all_prompts_together_is_refused_before_anything_runs(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in (Averaging, Unsaid):
        monkeypatch.setattr(kind, "calls", 0)
    with pytest.raises(
        ic.PlanError, match=r"averaging cannot be split into batches: its mean \[d_model\] is made of all"
    ):
        Averaging()(toy_model(), TEXTS, **options)
    assert Averaging.calls == 0 and not list(tmp_path.iterdir())
    assert Averaging()(toy_model(), TEXTS).mean[0] == 5
    with pytest.raises(ic.PlanError, match="cannot be split|`run` must say which class it returns"):
        Unsaid()(toy_model(), TEXTS, **options)
    assert Unsaid.calls <= 1


def test_a_batch_gives_the_class_that_run_says() -> None:
    class Other(Counting):
        def run_batches(self, model: ic.Model, batches: Iterable[Any], config: Any) -> Iterator[ic.Result]:
            return (ic.Result() for _ in batches)

    with pytest.raises(ic.PluginError, match="counting returned a Result for a batch: its `run` says .* a Counts"):
        Other()(toy_model(), TEXTS, batch_size=2)


def changed(**more: Any) -> type[Counting]:
    """`Counting`, whose results differ from batch to batch."""

    class Changing(Counting):
        def run_batches(self, model: ic.Model, batches: Iterable[Any], config: Any) -> Iterator[Counts]:
            for number, result in enumerate(super().run_batches(model, batches, config)):
                yield replace(result, **{name: value[number] for name, value in more.items()})

    return Changing


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (changed(layer=[1, 2, 3]), "layer differs between batches; if that is right, Counts.JOINS says .*prompts 0, 3"),
        (changed(last=[torch.ones(2), None, None]), "last is there in some prompts only"),
        (changed(total=[torch.ones(4)] * 3, mean=[torch.ones(4), torch.ones(5), torch.ones(4)]), ""),
    ],
)
def test_parts_that_do_not_fit_are_found_with_the_second(kind: type[Counting], says: str) -> None:
    if says:
        with pytest.raises(ic.PlanError, match=f"counting cannot be joined from batches: {says}"):
            kind()(toy_model(), TEXTS, batch_size=2)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("logit_lens", {"batch_size": 2}, r"rows have \[10, 4, 4, 10, 4\] tokens; choose positions that all have"),
        ("logit_lens", {"at": -1, "batch_size": 0}, "batch_size= takes a number of prompts from 1 on, not int 0"),
        ("logit_lens", {"at": -1, "batch_size": 2, "targets": [[1], [2]]}, "targets has 2 items for 5 prompts"),
        ("logit_lens", {"at": ic.PerRow((0, 1)), "batch_size": 2}, "at has 2 items for 5 prompts"),
        ("logit_lens", {"at": torch.ones(5, 10).bool(), "batch_size": 2}, "at is a mask of the padded batch"),
        ("activation_patching", {"answer": [" dry"], "batch_size": 1}, "answer has 1 items for 5 prompts"),
        ("activation_patching", {"score": score.logprob([1, 2]), "batch_size": 1}, "targets of 2 rows, there are 5"),
        ("activation_patching", {"site": "pattern", "batch_size": 1}, "attention of padded rows differs in width"),
        ("activation_patching", {"answer": " dry wet", "batch_size": 2}, r"is 2 tokens.*in the batch of prompts 0, 3"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], says: str) -> None:
    """What would be refused of all prompts together is refused of batches of them."""
    with pytest.raises(ic.InterpError, match=says):
        ic.method(name)(toy_model(), TEXTS, **options)


def test_progress_reaches_methods_that_show_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    ic.method("ablations")(toy_model(), TEXTS[:1], layers=[1], progress=True)
    assert "sweep 4 of 4" in capsys.readouterr().err
    ic.method("ablations")(toy_model(), TEXTS[:2], layers=[1], progress=True, batch_size=1)
    shown = capsys.readouterr().err
    assert "ablations 2 of 2" in shown and "sweep" not in shown
