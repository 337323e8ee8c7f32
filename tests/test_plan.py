"""Plans and edits as data: equality, hashing, JSON, bad values."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import interp_core as ic
from interp_core import sites as S
from interp_core.plan import Plan

VECTOR = torch.arange(4.0)


def sample() -> Plan:
    edits = [
        S.resid_post[2].at(-1).add(VECTOR.clone()),
        S.z[1, 0].set(VECTOR.clone()),
        S.mlp_out.scale(0.5),
        S.z[0].zero(),
        S.resid_mid[0].project(VECTOR.clone()),
        S.pattern[1].knockout(query="text", key=[0, 1]),
        S.router_logits[0].mask([3, 1]),
    ]
    return Plan.of([S.resid_post, S.z[3, 5].at("target")], edits)


def test_equal_plans_are_equal_by_value() -> None:
    assert sample() == sample()
    assert hash(sample()) == hash(sample())
    other = Plan.of(edits=S.resid_post[2].at(-1).add(VECTOR + 1))
    assert other != Plan.of(edits=S.resid_post[2].at(-1).add(VECTOR))
    assert S.z.set(VECTOR) != S.z.set(VECTOR.double())
    assert S.z.set(VECTOR) != S.z.set(VECTOR.reshape(2, 2))


def test_pickle() -> None:
    assert pickle.loads(pickle.dumps(sample())) == sample()


def test_json_form_and_folder(tmp_path: Path) -> None:
    plan = sample()
    data = plan.to_json()
    assert data["reads"] == ["resid_post", "z[3,5]@target"]
    assert Plan.from_json(data, plan.tensors()) == plan
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert plan.describe().splitlines()[0] == "read  resid_post"
    assert "edit  resid_post[2]@-1 add float32[4]" in plan.describe()


def test_json_refusals(tmp_path: Path) -> None:
    plan = Plan.of(edits=S.z.set(VECTOR))
    with pytest.raises(ic.PlanError, match="its tensor .* is not given"):
        Plan.from_json(plan.to_json())
    with pytest.raises(ic.PlanError, match="this is 'other'"):
        Plan.from_json({"format": "other"})
    with pytest.raises(ic.PlanError, match="a function has no JSON form"):
        Plan.of(edits=S.z.apply(torch.relu)).to_json()
    with pytest.raises(ic.LoadError, match="holds no plan.json"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ic.LoadError, match="is not JSON"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Plan.of(edits=[S.z[0]]), r"say what to do there, \.set"),
        (lambda: Plan.of(reads=[3]), "read= takes sites like"),
        (lambda: S.z.set(3.0), "set takes a torch tensor, not float"),
        (lambda: S.z.scale(VECTOR), "scale takes a finite number"),
        (lambda: S.z.scale(True), "scale takes a finite number"),
        (lambda: S.z.apply(3), "apply takes a function"),
        (lambda: S.z.project(torch.zeros(4)), "direction of length zero"),
        (lambda: S.z.project(torch.zeros(2, 2, 2)), "takes .d. or .k d."),
        (lambda: S.z.mask([1]), "mask is for router_logits, not for z"),
        (lambda: S.pattern.mask([1]), "mask is for router_logits"),
        (lambda: S.pattern[0].knockout(), "leaves nothing to attend to"),
        (lambda: ic.Edit(S.z, "multiply"), "no edit is called 'multiply'"),
    ],
)
def test_bad_edits(make: object, says: str) -> None:
    with pytest.raises(ic.PlanError, match=says):
        make()  # type: ignore[operator]
