"""Records of causal studies: written and read again, curves and thresholds without the model, populations, hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interp_plugins.visual.curves import curve
from interp_plugins.visual.records import Records
from interp_plugins.visual.threshold import threshold

import interp_core as ic


def row(
    sample: int, layer: int | None, delta: float, intervention: str = "replace:blind", **more: Any
) -> dict[str, Any]:
    return {
        "sample": f"s{sample}", "image": f"i{sample // 2}", "group": "bars", "pilot": sample < 8,
        "intervention": intervention, "mode": "random", "layer": layer, "hit": 1, "n_layers": 4, "delta": delta,
        "delta_sum": 2 * delta, "delta_first": delta, "delta_foil": None, "kl": abs(delta), "p": 0.2, "clean_p": 0.4,
        "right": float(sample % 3 == 0), "clean_right": float(sample % 2 == 0), "token": 5, "clean_token": 5 + sample % 2,
        "m": 1 + sample % 2, **more,
    }  # fmt: skip


def rows(n: int = 20) -> list[dict[str, Any]]:
    """A cliff at 2: 3, 2, 0, 0 nats, and 3 of blinding whole."""
    curves = [row(i, layer, delta + i / 100) for i in range(n) for layer, delta in enumerate((3, 2, 0, 0))]
    return curves + [row(i, None, 3 + i / 100, "blind") for i in range(n)]


def test_curves_and_tau_come_from_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(Records.of(rows()).text())
    records = Records.read(tmp_path / "records.jsonl")
    pilots, others = (records.effects("replace:blind", pilot=pilot) for pilot in (True, False))
    assert len(pilots.samples) == 8 and len(others.samples) == 12 and not {*pilots.samples} & {*others.samples}
    assert others.values[0].tolist() == pytest.approx([3.08, 2.08, 0.08, 0.08])
    for ratio, cliff in ((0.1, 2), (0.9, 1), (0.01, 4)):  # other thresholds, the same records
        tau = threshold(pilots.values, blind=records.blind(pilots), adaptive=True, ratio=ratio, boot=pilots.boot(200))
        found = curve(
            others.name, others.values, others.layers, tau.tau, blind=records.blind(others), boot=others.boot(200)
        )
        assert found.cliff.value == cliff and found.mean.units == 6
    assert records.hash == Records.of(rows()[::-1]).hash != Records.of(rows()[:-1]).hash


def test_measures_answers_and_populations() -> None:
    records = Records.of(rows())
    assert records.effects("replace:blind", measure="delta_sum").values[0, 0] == pytest.approx(6.16)
    assert records.effects("replace:blind", measure="rho").values[0, 0] == pytest.approx(-50)
    assert records.effects("replace:blind", measure="flip").values[:, 0].tolist() == [0, 1] * 6
    single, generated = (records.effects("replace:blind", answers=kind) for kind in ("single", "generated"))
    assert len(single.samples) == len(generated.samples) == 6 and not {*single.samples} & {*generated.samples}
    dependent = records.image_dependent()
    assert dependent == {f"s{i}" for i in range(20) if i % 2 == 0 and i % 3}  # right with the image, wrong without
    some = records.effects("replace:blind", where=lambda one: one["sample"] in dependent)
    assert set(some.samples) == dependent - {f"s{i}" for i in range(8)}
    np.testing.assert_array_equal(some.at(1), some.values[:, 1])
    assert len(set(records.effects("replace:blind", pilot=None).images)) == 10


def test_what_is_refused(tmp_path: Path) -> None:
    records = Records.of(rows())
    with pytest.raises(ic.ReadError, match="Did you mean 'replace:blind'"):
        records.effects("replace:blank")
    with pytest.raises(ic.ReadError, match="in mode 'black'"):
        records.effects("replace:blind", "black")
    with pytest.raises(ic.ReadError, match="say which: mode='random'"):
        Records.of([*rows(), row(0, 0, 1.0, mode="black")]).effects("replace:blind")
    with pytest.raises(ic.ReadError, match="sample s8 has none at layer 2"):
        Records.of([one for one in rows() if (one["sample"], one["layer"]) != ("s8", 2)]).effects("replace:blind")
    with pytest.raises(ic.ReadError, match="no delta_foil"):
        records.effects("replace:blind", measure="delta_foil")
    with pytest.raises(ic.PlanError, match="two records"):
        Records.of([*rows(), row(0, 0, 1.0)])
    with pytest.raises(ic.PlanError, match="no 'delta'"):
        Records.of([{name: value for name, value in row(0, 0, 1.0).items() if name != "delta"}])
    with pytest.raises(ic.ReadError, match="no layer 7"):
        records.effects("replace:blind").at(7)
    with pytest.raises(ic.ReadError, match="have no record of blind random"):
        Records.of(rows()[:-1]).blind(records.effects("replace:blind"))
    (tmp_path / "bad.jsonl").write_text('{"sample": 1}\n[1]\n')
    with pytest.raises(ic.LoadError, match="line 2, is a list"):
        Records.read(tmp_path / "bad.jsonl")
