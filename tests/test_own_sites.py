"""A family may bring a site of its own: a name, and a function that finds it in a block. It is then a site like others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures import deepseek_v3
from interp_core.architectures.locate import Block
from interp_core.sites import SITES, Site, define

IDS = torch.tensor([[3, 5, 7, 9, 11]])


def latent(block: Block) -> None:
    """What keys and values are made of (DeepSeek-V2, multi-head latent attention)."""
    point = block.point("self_attn.kv_a_layernorm", "out")
    block.view("kv_latent", point, {"latent": int(block.stack.config.kv_lora_rank)})


@pytest.fixture
def family() -> Iterator[None]:
    known = dict(SITES)
    define("kv_latent", ("batch", "pos", "latent"), "latent that keys and values are made of", after="attn_in")
    registry = ic.registry("architectures")
    rows = list(registry.rows)
    hidden = {id(row): row.hidden for row in rows}
    registry.register("deepseek_v3", replace(deepseek_v3.FAMILY, sites=(latent,)))
    try:
        yield
    finally:
        registry.rows = rows
        for row in rows:
            row.hidden = hidden[id(row)]
        SITES.clear()
        SITES.update(known)


def passing(model: ic.Model, layer: int) -> Tensor:
    """What passes there, by a hook of one's own."""
    kept: list[Tensor] = []
    module = model.hf.model.layers[layer].self_attn.kv_a_layernorm
    handle = module.register_forward_hook(lambda _m, _a, output: kept.append(output.detach().clone()))
    try:
        model.hf(input_ids=IDS)
    finally:
        handle.remove()
    return kept[0]


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_it_is_read_edited_checked_and_listed_like_any_other(engine: str) -> None:
    model = ic.load(ic.testing.tiny("deepseek_v3", dtype=torch.float64), engine=engine)
    site: Site = S.kv_latent  # type: ignore[attr-defined]
    assert model.check is not None and model.check.ok
    assert "kv_latent" in {row.site.partition("[")[0] for row in model.check.rows}
    assert "kv_latent" in str(model.sites) and model.layers(site) == list(range(model.n_layers))
    run = model.run({"input_ids": IDS}, read=[site, S.resid_post])
    for layer in range(model.n_layers):
        torch.testing.assert_close(run[site[layer]].plain, passing(model, layer), atol=0, rtol=0)
    edit = site[1].at(-1).zero()
    edited = model.run({"input_ids": IDS}, read=site, edits=edit)
    assert float(edited[site[1]].plain[0, -1].abs().max()) == 0 and edited.receipts[0].norm > 0
    assert not torch.equal(edited.logits.plain, run.logits.plain)
    assert Site.parse(str(site[1].at(-1))) == site[1].at(-1)
    sweep = model.sweep({"input_ids": IDS}, [site[i].at(-1).zero() for i in range(model.n_layers)], ic.score.logit(5))
    alone = [model.run({"input_ids": IDS}, edits=edits).logits.plain[0, -1, 5] for edits in sweep.variants]
    torch.testing.assert_close(sweep.values[:, 0], torch.stack(alone).to(sweep.values))


@pytest.mark.usefixtures("family")
def test_a_pass_meets_it_where_it_was_said_to_be() -> None:
    names = list(SITES)
    assert names.index("kv_latent") == names.index("attn_in") + 1
    assert SITES["attn_in"].order < SITES["kv_latent"].order < SITES["q"].order


@pytest.mark.usefixtures("family")
def test_other_families_lack_it_by_name() -> None:
    model = ic.load(ic.testing.tiny("gpt2"))
    with pytest.raises(ic.CapabilityError, match="not known where gpt2 keeps kv_latent"):
        model.run({"input_ids": IDS}, read=Site("kv_latent"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "z", "axes": ("batch", "pos", "other")}, "a site is called 'z' already: batch pos head d_head"),
        ({"name": "two words"}, "'two words' cannot name a site"),
        ({"after": "atn_in"}, "no site is called 'atn_in'. Did you mean 'attn_in'"),
        ({"unit": "head"}, "its unit 'head' is none of its axes"),
    ],
)
def test_what_names_no_site_is_refused(wrong: dict[str, Any], message: str) -> None:
    known = dict(SITES)
    with pytest.raises(ic.SiteError, match=message):
        define(**({"name": "kv_latent", "axes": ("batch", "pos", "latent"), "doc": "a latent"} | wrong))
    assert known == SITES


def test_the_same_words_again_are_the_same_site() -> None:
    info = SITES["z"]
    assert define("z", info.axes, info.doc, info.unit) == S.z and list(SITES).count("z") == 1
