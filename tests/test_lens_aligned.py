"""Layer-wise NLL of aligned targets against the golden float64 numbers, from a forward pass and from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import moe_golden
import numpy as np
import pytest
import torch
from interp_plugins.logit_lens import aligned, curves, origin_states, states
from interp_plugins.logit_lens.aligned import PairScores, States
from interp_plugins.pairs import Pair, read_pairs
from safetensors.torch import load_file, save_file

import interp_core as ic

TOLERANCE = 2e-5
"""Of log-probabilities, entropies and divergences in float32; from the README beside the golden numbers."""
NAMES = {"logp": "logprob", "ent": "entropy", "rank": "rank"}


def golden(layout: Any = "packed") -> list[Pair]:
    return read_pairs(moe_golden.DATA / "pairs.json", layout=layout)


def streams(pairs: list[Pair]) -> list[tuple[States, States]]:
    return [aligned.pair_states(moe_golden.model(), pair) for pair in pairs]


def scored(of: list[tuple[States, States]], mode: Any = "exact", **how: Any) -> list[PairScores]:
    return list(aligned.score_pairs(moe_golden.model(), of, mode, **how))


@pytest.mark.parametrize("rows", [1, 130, 10_000])
def test_agrees_with_the_golden_numbers(rows: int) -> None:
    """Whatever goes through the unembedding together: one target of one text, some texts, all of them."""
    wanted, found = moe_golden.expected(), scored(streams(golden()), rows=rows)
    assert [one.sample for one in found] == [f"pair_{i}" for i in range(6)]
    assert found[0].layers == (-1, 0, 1, 2, 3)
    for letter, side in (("a", "agentic"), ("b", "assisted")):
        for name, field in NAMES.items():
            mine = np.concatenate([getattr(getattr(one, side), field).numpy() for one in found], 1)
            theirs = wanted[f"lens_{name}_{letter}_tokens"]
            assert mine.shape == theirs.shape
            assert np.array_equal(mine, theirs) if name == "rank" else np.abs(mine - theirs).max() < TOLERANCE, name
    for name, field in (("js", "js"), ("kl_ab", "kl")):
        mine = np.concatenate([getattr(one.apart, field).numpy() for one in found], 1)
        assert np.abs(mine - wanted[f"lens_{name}_tokens"]).max() < TOLERANCE


@pytest.mark.parametrize("mode", ["topk_rest", "topk_renorm"])
def test_divergence_of_likeliest_tokens(mode: Any) -> None:
    found = scored(streams(golden()), mode, top=16)
    mine = np.concatenate([one.apart.js.numpy() for one in found], 1)
    wanted = moe_golden.expected()
    assert np.abs(mine - wanted[f"lens_js_topk16_{mode.removeprefix('topk_')}_tokens"]).max() < TOLERANCE
    if mode == "topk_rest":
        upper = np.concatenate([one.apart.js_upper.numpy() for one in found], 1)
        assert (mine <= wanted["lens_js_tokens"] + TOLERANCE).all() and (
            wanted["lens_js_tokens"] <= upper + TOLERANCE
        ).all()


def test_curves_and_their_last_row() -> None:
    wanted, found = moe_golden.expected(), curves.Curves.of(scored(streams(golden())))
    for scope in curves.SCOPES:
        for name, key in (
            ("nll_agentic", "nll_a"),
            ("nll_assisted", "nll_b"),
            ("delta_nll", "delta_nll"),
            ("js", "js"),
        ):
            assert np.abs(found.mean(f"{name}_{scope}") - wanted[f"{key}_{scope}"]).max() < TOLERANCE
        assert np.array_equal(found.values[f"logitlens_agentic_{scope}"], -found.values[f"nll_agentic_{scope}"])
    twice = float(wanted["WRONG_double_norm_nll_a_lastlayer_all"])
    assert abs(found.mean("nll_agentic_all")[-1] - twice) > 0.4
    tokens = np.concatenate([-one for one in [wanted["lens_logp_a_tokens"]]], 1).mean(1)
    assert np.abs(found.micro["nll_agentic_all"] - tokens).max() < TOLERANCE
    assert found.bands["delta_nll_all"].n == 6 and found.tests["all"].exact
    assert found.places == ("embed", "0", "1", "2", "3")


def test_scores_in_a_file() -> None:
    one = scored(streams(golden()[:1]))[0]
    back = curves.scores_of(one.sample, curves.tensors_of(one))
    assert curves.Curves.of([back]).mean("js_all").tolist() == curves.Curves.of([one]).mean("js_all").tolist()
    assert not curves.Curves.of([one]).bands
    with pytest.raises(ic.LoadError, match="no 'rank_assisted' among the scores"):
        curves.scores_of("x", {k: v for k, v in curves.tensors_of(one).items() if k != "rank_assisted"})


def test_progress_along_the_target() -> None:
    found = scored(streams(golden()))
    walk = curves.progress(found, bins=4)
    assert walk.shape == (5, 4) and not np.isnan(walk).any()
    one = curves.progress(found[:1], bins=50)  # as many bins as targets: the differences themselves
    delta = (found[0].assisted.logprob - found[0].agentic.logprob).numpy()
    assert np.allclose(one, delta)


def test_padded_and_packed_differ_as_transformers_has_it() -> None:
    """A hole moves every later token; with positions that count real tokens the packed numbers come back."""
    packed, padded = (scored(streams([golden(layout)[0]]))[0] for layout in ("packed", "padded"))
    assert torch.equal(packed.agentic.logprob, padded.agentic.logprob)
    assert (packed.assisted.logprob - padded.assisted.logprob).abs().max() > 0.1
    pair = golden("padded")[0]
    model = moe_golden.model()
    with torch.no_grad():
        out = model.hf(input_ids=pair.assisted.ids, attention_mask=pair.assisted.mask.long(), use_cache=False)
    columns = pair.assisted.columns([p - 1 for p in pair.assisted_positions])[0]
    wanted = out.logits[0, columns].log_softmax(-1).gather(-1, pair.target_ids()[:, None])[:, 0]
    assert (padded.assisted.logprob[-1] - wanted).abs().max() < TOLERANCE


def test_a_lens_that_does_not_end_in_the_models_output_is_refused() -> None:
    model, (agentic, _) = moe_golden.model(), streams(golden()[:1])[0]
    twice = replace(
        agentic, stream=torch.cat([agentic.stream[:-1], model.module("ln_final")(agentic.stream[-1:]).detach()])
    )
    with pytest.raises(ic.CapabilityError, match="pair_0 agentic: the last row of the lens .* or normed twice"):
        aligned.score(model, twice)
    aligned.score(model, agentic)
    with pytest.raises(ic.PositionError, match="from position 1 on"):
        aligned.read_states(model, golden()[0].agentic, [0, 3])


def test_only_needed_positions_are_unembedded() -> None:
    model, pair, rows = moe_golden.model(), golden()[0], []
    handle = model.hf.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[:-1].numel()))
    try:
        list(aligned.score_pairs(model, streams([pair]), "none"))
    finally:
        handle.remove()
    lens = 2 * 5 * len(pair)
    assert rows == [1, 1, lens, lens]  # a check per context, the targets' own logits, and one product for all rows


# Files


def test_states_written_and_read_back(tmp_path: Path) -> None:
    model, pairs = moe_golden.model(), golden()
    before = streams(pairs)
    store = states.StateStore(tmp_path, model)
    paths = store.write(one for pair in before for one in pair)
    assert len(paths) == 12 and set(load_file(paths[0])) == {f"layer.{i}" for i in range(-1, 4)}
    after = [store.pair(pair) for pair in pairs]
    for old, new in zip(scored(before), scored(after), strict=True):
        assert torch.equal(old.agentic.logprob, new.agentic.logprob) and torch.equal(old.apart.js, new.apart.js)
    part = store.read(pairs[0], "assisted", layers=[1, 3])
    assert part.layers == (1, 3) and torch.equal(part.stream[1], before[0][1].stream[-1])
    again = [path.read_bytes() for path in store.write(before[0])]
    assert again == [path.read_bytes() for path in paths[:2]]


def changed(path: Path, tensors: dict[str, torch.Tensor] | None = None, **header: Any) -> None:
    """The same file with other tensors or fields."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()[states.HEADER])
    save_file(load_file(path) if tensors is None else tensors, path, {states.HEADER: json.dumps({**head, **header})})


def test_states_of_another_text_or_layout_are_refused(tmp_path: Path) -> None:
    """Positions and ids of the targets are the same, the streams are not."""
    pair, padded = golden()[0], golden("padded")[0]
    assert pair.assisted_positions == padded.assisted_positions
    store = states.StateStore(tmp_path, moe_golden.model())
    store.write(aligned.pair_states(store.model, pair))
    with pytest.raises(ic.LoadError, match="pair_0 assisted: states of another context"):
        store.pair(padded)
    ids = pair.agentic.ids.clone()
    ids[0, 1] += 1
    with pytest.raises(ic.LoadError, match="pair_0 agentic: states of another context"):
        store.pair(replace(pair, agentic=ic.Tokens(ids, pair.agentic.mask)))
    with pytest.raises(ic.PlanError, match=r"pair_0.assisted.safetensors is there: states of another context"):
        store.claim([padded])
    store.claim([pair])


def test_states_that_do_not_fit_are_refused_by_sample_and_field(tmp_path: Path) -> None:
    model, pair = moe_golden.model(), golden()[0]
    both, store = aligned.pair_states(model, pair), states.StateStore(tmp_path, model)

    def refused(match: str, tensors: dict[str, torch.Tensor] | None = None, **header: Any) -> None:
        path = store.write(both)[0]
        changed(path, tensors, **header)
        with pytest.raises(ic.LoadError, match=match):
            store.pair(pair)

    rows = {f"layer.{layer}": row for layer, row in zip(both[0].layers, both[0].stream, strict=True)}
    own = store.identity
    refused("pair_0 agentic: states of another model .other weights.", model={**own, "weights": "0" * 64})
    refused(
        "pair_0 agentic: states of another model .dtype was bfloat16, is float32.", model={**own, "dtype": "bfloat16"}
    )
    refused(
        "pair_0 agentic: layers 0, 2 are missing", {k: v for k, v in rows.items() if k not in ("layer.0", "layer.2")}
    )
    refused(
        r"pair_0 agentic: layer 1 is torch.float32 \[3, 64\]; the pair has 14",
        {**rows, "layer.1": rows["layer.1"][:3].clone()},
    )
    huge = {**rows, "layer.2": (rows["layer.2"] * 1e6).half()}
    refused("pair_0 agentic: layer 2 has .* not finite.*float16 ends at 65,504", huge)
    refused("pair_0 agentic: positions are 14, the pair's 14, the first that differs is 1", positions=[1] * 14)
    refused("pair_0 agentic: metadata 'lens_states' is missing or no interp-lens-states/1", format="x")
    states.state_file(tmp_path, pair.name, "agentic").write_bytes(b"no")
    with pytest.raises(ic.LoadError, match="pair_0 agentic: .* is damaged"):
        store.pair(pair)
    with pytest.raises(ic.LoadError, match="pair_1 agentic: no file pair_1.agentic.safetensors"):
        store.pair(golden()[1])
    with pytest.raises(ic.PlanError, match="layer 0 has 1 numbers that are not finite"):
        broken = both[0].stream.clone()
        broken[1, 0, 0] = torch.inf
        store.write([replace(both[0], stream=broken)])
    with pytest.raises(ic.PlanError, match="layer 3 is normed already"):
        store.write([replace(both[0], normed_last=True)])


def published(path: Path, pair: Pair, embedding: bool = False, raw: bool = False, mode: str | None = "full") -> Path:
    """Hidden states as the published pipeline saves them: transformers' own, in float16, the last one normed."""
    model, content = moe_golden.model(), {}
    for side in aligned.SIDES:
        tokens = pair.tokens(side)
        with torch.no_grad():
            out = model.hf(
                input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True, use_cache=False
            )
        hidden = list(out.hidden_states[0 if embedding else 1 :])
        if raw:
            hidden[-1] = model.run(tokens, read="resid_post[3]", logits=False)["resid_post[3]"].plain
        content[side] = {"hidden_states": torch.cat(hidden).half()}
    torch.save({**content, "token_meta": {"save_mode": mode, "agentic_length": 3}}, path)
    return path


@pytest.mark.parametrize(("embedding", "raw"), [(False, False), (True, False), (False, True)])
def test_published_hidden_states(embedding: bool, raw: bool, tmp_path: Path) -> None:
    """The same curves to float16, whether the last row was saved normed, as transformers has it, or not."""
    pair = golden("padded")[0]
    found = origin_states.read_origin(published(tmp_path / "x.pt", pair, embedding, raw), moe_golden.model(), pair)
    assert [one.normed_last for one in found] == [not raw, not raw]
    wanted, mine = scored(streams([pair]))[0], scored([found])[0]
    kept = slice(0 if embedding else 1, None)
    assert mine.layers == wanted.layers[kept]
    assert (mine.assisted.logprob - wanted.assisted.logprob[kept]).abs().max() < 5e-3


def test_published_hidden_states_that_do_not_fit(tmp_path: Path) -> None:
    model, pair, path = moe_golden.model(), golden("padded")[0], tmp_path / "x.pt"

    def refused(match: str) -> None:
        with pytest.raises(ic.LoadError, match=match):
            origin_states.read_origin(path, model, pair)

    refused("there is no file .*, which should hold hidden states of pair_0")
    published(path, pair, mode="canonical")
    refused("pair_0: token_meta.save_mode is 'canonical': .* a target is predicted from the state before it")
    content = torch.load(published(path, pair), weights_only=True)
    torch.save(content | {"assisted": {"hidden_states": content["assisted"]["hidden_states"][:2]}}, path)
    refused(r"pair_0 assisted.hidden_states is \[2, 69, 64\]; the model has 4 layers of 64 and the context 69 columns")
    content["agentic"]["hidden_states"][2, :, 5] = torch.inf
    torch.save(content, path)
    refused("pair_0 agentic.hidden_states: layer 2 has 14 numbers that are not finite.*float16 ends at 65,504")
    torch.save(content | {"agentic": {}}, path)
    refused("pair_0 agentic.hidden_states is no tensor")
    torch.save({"a": Path("x")}, path)
    refused("cannot be read as hidden states of pair_0")
