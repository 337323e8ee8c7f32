"""What an edit's value may look like, and what it does: every site, operation, selection and batch against loops.

The law: a value has the shape of the selected part, or a suffix of it; then it acts as written. Every other shape is
refused before the model runs, and so is a suffix that is as well the part at one position. Nothing that a caller holds is written to, and a reading stays what it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from test_engine import executed
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.sites import SITES, Site

WIDTH = 5
POSITIONS: dict[str, Any] = {
    "all": None, "last": -1, "some": [3, 1], "stretch": slice(1, 4), "per row": "per row", "ragged": "ragged",
}  # fmt: skip
UNITS = {"all": None, "one": 1, "some": [1, 0]}
SITES_OF = {
    "llama": ("embed", "resid_post", "z", "k", "rot_q", "pattern", "mlp_act", "head_out", "resid_mid", "logits"),
    "gpt2": ("q", "v", "attn_in", "scores"),
    "granitemoe": ("attn_out", "mlp_out", "router_logits", "expert_out"),
}


def batch(rows: int, *, padded: bool = False) -> ic.Tokens:
    """Rows of five tokens; padded ones are one or two tokens shorter, all but the first."""
    ids = torch.randint(3, 90, (rows, WIDTH), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones(rows, WIDTH, dtype=torch.bool)
    if padded:
        for row in range(1, rows):
            mask[row, : 1 + row % 2] = False
    return ic.Tokens(ids, mask)


def chosen(name: str, tokens: ic.Tokens) -> tuple[Any, list[list[int]], bool]:
    """A selection of positions for a batch, the columns that it means row by row, and whether it drops the axis."""
    real = [torch.nonzero(row).flatten().tolist() for row in tokens.mask]
    everything = [list(range(WIDTH))] * len(real)
    if name == "all":
        return None, everything, False
    if name == "last":
        return -1, [[row[-1]] for row in real], True
    if name in ("some", "stretch"):
        place = [-1, 1] if name == "some" else slice(0, 2)
        picked = [[row[i] for i in place] if name == "some" else row[place] for row in real]
        return place, picked, False
    counts = [2] * len(real) if name == "per row" else [1 + row % 2 for row in range(len(real))]
    places = [[(row + i) % 2 for i in range(n)] for row, n in enumerate(counts)]
    return places, [[real[row][i] for i in own] for row, own in enumerate(places)], False


class Case:
    """A selection of a site in a batch: the part's shape by its axes, and what an edit makes of the whole value."""

    def __init__(self, model: ic.Model, name: str, units: Any, where: str, tokens: ic.Tokens) -> None:
        self.tokens, self.attention = tokens, "query" in SITES[name].axes
        layer = model.atlas.layers(name)[-1] if SITES[name].layered else None
        self.site = Site(name, layer) if units is None else Site(name)[layer, units]
        self.clean = model.run(tokens, read=Site(name, layer))[Site(name, layer)].as_subclass(Tensor).clone()
        pos, self.columns, self.single = chosen(where, tokens)
        if pos is not None:
            self.site = self.site.at(query=pos) if self.attention else self.site.at(pos)
        self.unit_axis = SITES[name].axes.index(SITES[name].unit) if SITES[name].unit else None
        size = self.clean.shape[self.unit_axis] if self.unit_axis is not None else 0
        self.units = range(size) if units is None else units if isinstance(units, list) else [units]
        self.dropped = isinstance(units, int)
        self.ragged = len({len(row) for row in self.columns}) > 1

    @property
    def shape(self) -> list[int]:
        """Of the part that is selected."""
        axes = dict(enumerate(self.clean.shape))
        pos = 2 if self.attention else 1
        axes[pos] = len(self.columns[0])
        if self.unit_axis is not None:
            axes[self.unit_axis] = len(self.units)
        if self.ragged:  # rows strung together, then what is left
            del axes[pos]
            axes[0] = sum(map(len, self.columns))
            order = [0, *(axis for axis in axes if axis not in (0, self.unit_axis)), self.unit_axis]
            if not self.attention:
                order = list(axes)
            else:  # keys are strung too, and heads come last
                axes[0] *= axes.pop(3)
                order = [0, self.unit_axis]
        else:
            order = list(axes)
        gone = {pos} if self.single else set()
        if self.dropped:
            gone.add(self.unit_axis)
        return [axes[axis] for axis in order if axis not in gone]

    def ambiguous(self, shape: list[int]) -> bool:
        """Whether a value of this shape may be meant for one position of each row as well as for every row."""
        pos = 1 if not self.attention else 1 if self.dropped else 2
        return not (self.single or self.ragged) and shape == self.shape[1:] == self.shape[:pos] + self.shape[pos + 1 :]

    def entries(self) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Per number, or vector of what lies along the last axis: where it is in the whole value, and in the part."""
        flat, features = 0, self.unit_axis == self.clean.ndim - 1
        units: list[Any] = [None] if self.unit_axis is None else [self._features()] if features else list(self.units)
        for row, columns in enumerate(self.columns):
            for i, column in enumerate(columns):
                for key in range(self.clean.shape[3]) if self.attention else [None]:
                    for j, unit in enumerate(units):
                        tail = () if unit is None or self.dropped or features else (j,)
                        middle = () if self.single else (i,)
                        if self.attention:
                            full: tuple[Any, ...] = (row, unit, column, key)
                            part = (flat, *tail) if self.ragged else (row, *tail, *middle, key)
                        else:
                            full = (row, column) if unit is None else (row, column, unit)
                            part = (flat, *tail) if self.ragged else (row, *middle, *tail)
                        yield full, part
                    flat += 1

    def _features(self) -> Any:
        return self.units[0] if self.dropped else list(self.units)

    def after(self, op: str, value: Any) -> Tensor:
        """The whole value after an edit, by a loop."""
        result = self.clean.clone()
        spread = value.to(result.dtype).expand(self.shape) if isinstance(value, Tensor) and op != "project" else None
        for full, part in self.entries():
            old = self.clean[full]
            if op == "set":
                result[full] = spread[part]
            elif op == "add":
                result[full] = old + spread[part]
            elif op == "scale":
                result[full] = old * value
            elif op == "zero":
                result[full] = 0
            elif op == "apply":
                result[full] = old * 2
            else:
                along = value.to(old.dtype)
                result[full] = old - (old @ along) / (along @ along) * along
        return result


def double_in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def value_for(case: Case, op: str, seed: int) -> Any:
    """A value that the operation takes there; None where it takes none."""
    generator = torch.Generator().manual_seed(seed)
    if op == "project":
        return torch.randn(case.shape[-1], generator=generator, dtype=torch.float64)
    if op in ("set", "add"):
        cut = seed % 3  # the whole shape, or a suffix
        cut -= case.ambiguous(case.shape[cut:])
        return torch.randn(case.shape[cut:], generator=generator, dtype=torch.float64)
    return {"scale": -1.5, "zero": None, "apply": double_in_place}[op]


def edit_of(site: Site, op: str, value: Any) -> ic.Edit:
    return site.zero() if op == "zero" else getattr(site, op)(value)


def cases(family: str, name: str, tokens: ic.Tokens) -> Iterator[Case]:
    model = tiny_model(family, torch.float64)
    for units, where in itertools.product(UNITS.values(), POSITIONS):
        if (units is None or SITES[name].unit) and not (len(tokens) == 1 and where == "ragged"):
            yield Case(model, name, units, where, tokens)


def projects(case: Case) -> bool:
    """Whether the part has a last axis of features for directions to lie along."""
    return not case.attention and not (case.dropped and case.unit_axis == case.clean.ndim - 1) and not case.ragged


BATCHES = {"1 row": batch(1), "2 rows": batch(2), "square": batch(WIDTH), "padded": batch(3, padded=True)}
KINDS = ("resid_post", "z", "pattern", "mlp_act", "expert_out", "resid_mid")
"""One site of each kind: plain, a view, inside attention, features as units, derived, written elsewhere than read."""
SOME = [
    pytest.param(family, name, marks=() if name in KINDS else pytest.mark.slow, id=f"{family}-{name}")
    for family, names in SITES_OF.items()
    for name in names
]


@pytest.mark.parametrize(("family", "name"), SOME)
@pytest.mark.parametrize("kind", BATCHES)
def test_values_act_as_written(family: str, name: str, kind: str) -> None:
    tokens = BATCHES[kind]
    model = tiny_model(family, torch.float64)
    tried = 0
    for number, case in enumerate(cases(family, name, tokens)):
        if name == "expert_out" and number % 3:
            continue  # each costs as much as all experts
        ops = [("set", "add")[number % 2], ("scale", "zero", "apply", "project")[number % 4]]
        for op in ops:
            if (op == "project" or name == "router_logits") and not (projects(case) and op != "apply"):
                continue
            value = value_for(case, op, number)
            kept = value.clone() if isinstance(value, Tensor) else None
            whole = case.site.whole
            run = model.run(tokens, read=whole, edits=edit_of(case.site, op, value), allow_noop=True)
            wanted = case.after(op, value)
            seen = [len(tokens), 1, WIDTH, 1] if case.attention else [len(tokens), WIDTH] + [1] * (wanted.ndim - 2)
            real = tokens.mask.view(seen)
            got = run[whole].as_subclass(Tensor)
            gap = torch.where(real, got - wanted, 0).nan_to_num(0.0)
            near = max(1e-9, 16 * torch.finfo(got.dtype).eps)  # routers compute in float32 whatever the model does
            assert float(gap.abs().max()) <= near * float(wanted.clamp(-1e6, 1e6).abs().max()), (str(case.site), op)
            assert kept is None or torch.equal(kept, value)
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize(("family", "name"), SOME)
def test_every_other_shape_is_refused_before_the_pass(family: str, name: str) -> None:
    model, tried = tiny_model(family, torch.float64), 0
    for tokens in (BATCHES["2 rows"], BATCHES["square"]):
        for case in cases(family, name, tokens):
            axes, right = list(case.clean.shape), case.shape
            shapes = {shape for n in range(1, len(axes) + 1) for shape in itertools.permutations(axes, n)}
            shapes |= {(1, *right), (*right, 1), (len(tokens) + 1, *right[1:]), tuple(right[:-1])}
            for shape in sorted(shapes):
                n = len(shape)
                if n <= len(right) and list(shape) == right[len(right) - n :] and not case.ambiguous(list(shape)):
                    continue
                value = torch.zeros(shape, dtype=torch.float64)
                with pytest.raises(ic.PlanError, match="the value is"):
                    model.run(tokens, edits=case.site.add(value))
                tried += 1
    assert tried > 100


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_on_other_engines(engine: str) -> None:
    model = tiny_model("llama", attention="eager").on(engine)  # in float64, eager attention makes padded rows NaN
    tokens = BATCHES["padded"]
    for name in ("z", "resid_post"):
        for units, where in itertools.product(UNITS.values(), POSITIONS):
            if where != "stretch" and (units is None or SITES[name].unit):
                case = Case(model, name, units, where, tokens)
                value = value_for(case, "set", 0).float()
                run = model.run(tokens, read=case.site.whole, edits=case.site.set(value))
                gap = run[case.site.whole].as_subclass(Tensor) - case.after("set", value)
                assert float(gap[tokens.mask].abs().max()) <= 1e-4
                with pytest.raises(ic.PlanError, match="the value is"):
                    model.run(tokens, edits=case.site.set(value[..., :-1]))


def test_sweeps_and_generation_take_the_same_values() -> None:
    """Each edit as one variant of a sweep, and while generating the first token, gives the logits of its run."""
    model, tokens, score = tiny_model("llama", torch.float64), BATCHES["2 rows"], ic.score.logit(5)
    edits = []
    for number, (units, where) in enumerate(itertools.product(UNITS.values(), ("all", "last", "some", "stretch"))):
        case = Case(model, "z", units, where, tokens)
        edits.append(case.site.add(value_for(case, "add", number)))
    swept = model.sweep(tokens, edits, score).values
    for edit, values in zip(edits, swept, strict=True):
        run = model.run(tokens, edits=edit)
        torch.testing.assert_close(values, run.logits.as_subclass(Tensor)[:, -1, 5], atol=1e-9, rtol=0)
        per_position = edit.value.ndim > 2 - isinstance(edit.site.units, int)
        if per_position and edit.site.pos in (None, (-1, 1)):
            with pytest.raises(ic.PlanError, match="these positions move"):
                model.generate(tokens, edits=edit, max_new_tokens=1, stop_at_eos=False)
        else:
            made = model.generate(tokens, edits=edit, max_new_tokens=1, stop_at_eos=False)
            assert made.ids[:, 0].tolist() == run.logits[:, -1].argmax(-1).tolist()
    wrong = S.z[1, 2].at(-1).set(torch.zeros(3, 24, dtype=torch.float64))  # one row too many: each would find its own

    def refused() -> None:
        with pytest.raises(ic.PlanError, match="the value is"):
            model.sweep(tokens, [wrong], score)

    assert executed(refused).attentions == 0


# What is held stays what it is


def falcon() -> ic.Model:
    """A family that adds attention into its MLP's output, in place."""
    from transformers import FalconConfig, FalconForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf = FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return ic.load(hf.eval())


@pytest.mark.parametrize("checked", [True, False], ids=["known from load", "found in a run"])
def test_a_reading_stays_what_it_was(checked: bool, ids: torch.Tensor) -> None:
    model = falcon()
    if not checked:
        model = ic.load(model.hf, check=False)
    seen: list[Tensor] = []
    hook = model.hf.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        plain = model.hf(ids).logits
    hook.remove()
    run = model.run(ids, read=[S.mlp_out[1], S.mlp_out[1].at(-1)])
    assert torch.equal(run[S.mlp_out[1]], seen[0]) and torch.equal(run[S.mlp_out[1].at(-1)], seen[0][:, -1])
    assert torch.equal(run.logits, plain)
    with torch.inference_mode():
        assert not checked or torch.equal(model.run(ids, read=S.mlp_out[1])[S.mlp_out[1]], seen[0])
    made = model.generate(ids, read=S.mlp_out[1], max_new_tokens=2, stop_at_eos=False)
    torch.testing.assert_close(made.steps[0][S.mlp_out[1]].as_subclass(Tensor), seen[0], atol=1e-5, rtol=1e-5)
    score = lambda logits: logits[0, -1, 5]  # noqa: E731
    nothing = torch.zeros(2, 7, 64, requires_grad=True)
    score(model.run(ids, edits=S.mlp_out[1].add(nothing), allow_noop=True).logits).backward()
    graded = model.run(ids, read=S.mlp_out[1], grad=score)
    torch.testing.assert_close(graded.grad[S.mlp_out[1]].as_subclass(Tensor), nothing.grad)
    assert torch.equal(graded[S.mlp_out[1]], seen[0])


@pytest.mark.parametrize("value", [torch.ones(2, 7, 64), torch.ones(64)], ids=["whole", "suffix"])
def test_what_a_caller_holds_is_not_written_to(value: Tensor, ids: torch.Tensor) -> None:
    model, kept = falcon(), value.clone()
    set_to = model.run(ids, edits=S.mlp_out[1].set(value), read=S.mlp_out[1])
    assert torch.equal(value, kept) and torch.equal(set_to[S.mlp_out[1]], kept.expand(2, 7, 64))
    own = torch.ones(2, 7, 64)
    by_function = model.run(ids, edits=S.mlp_out[1].apply(lambda x: own))
    assert torch.equal(own, torch.ones(2, 7, 64)) and torch.equal(by_function.logits, set_to.logits)


@pytest.mark.parametrize(
    "site", [S.resid_post[1], S.resid_post[1].at(-1), S.z[1, 2], S.head_out[1, 0], S.logits], ids=str
)
def test_functions_that_work_in_place_do_what_their_result_says(site: Site, ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    run = model.run(ids, edits=site.apply(double_in_place), read=site.whole)
    wanted = model.run(ids, edits=site.apply(lambda x: x * 2), read=site.whole)
    assert torch.equal(run.logits, wanted.logits) and torch.equal(run[site.whole], wanted[site.whole])
    assert run.receipts[0].norm == wanted.receipts[0].norm > 0


OWN = ("llama", "gpt2", "gemma2", "granitemoe", "gptj", "deepseek_v3")


@pytest.mark.parametrize("family", [f if f in OWN else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_site_set_to_its_own_reading_changes_nothing(family: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    """Not a bit, but for attention, which is opened up by the edit too, and for routers, which select again."""
    model = tiny_model(family, dtype)
    names = [name for name in model.sites if not SITES[name].visual and not model.can(name, "write")]
    assert len(names) > 12
    for name in names:
        layer = model.atlas.layers(name)[-1] if SITES[name].layered else None
        site = Site(name, layer)
        clean = model.run(ids, read=site)
        again = model.run(ids, edits=site.set(clean[site].as_subclass(Tensor)), read=site, allow_noop=True)
        if name.startswith("router"):
            torch.testing.assert_close(
                again.logits, clean.logits, atol=0.1 if dtype is torch.bfloat16 else 1e-4, rtol=0
            )
        else:
            assert torch.equal(again.logits, clean.logits), name
            assert again.receipts[0].norm == 0


def test_a_neuron_has_no_direction(ids: torch.Tensor) -> None:
    with pytest.raises(ic.PlanError, match="directions lie along d_mlp, of which this selects a single one"):
        tiny_model("llama").run(ids, edits=S.mlp_act[1, 5].project(torch.ones(7)))
