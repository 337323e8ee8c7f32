"""A sweep's folder gives back the numbers of the very same sweep, or says what differs; never another's."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from sweeping import tokens

import interp_core as ic
from interp_core import identity, score, testing
from interp_core import sites as S

ZERO = S.resid_post[0].at(2).zero()
LOGIT = score.logit(5)
IDS = torch.arange(3, 12)[None]
Sweep = tuple[Any, ic.Edit, score.Score]


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def defaulting(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def scaled(x: torch.Tensor, by: float = factor) -> torch.Tensor:
        return x * by

    return scaled


class Steering:
    """An own object that is called."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.vector


def along(direction: torch.Tensor) -> score.Score:
    return score.projection(S.resid_post[1].at(-1), direction)


def spanned(at: int) -> ic.Tokens:
    return ic.Tokens(IDS, torch.ones_like(IDS, dtype=torch.bool), spans={"word": ((ic.Span(at, at + 1),),)})


def applied(fn: Any) -> Sweep:
    return IDS, S.resid_post[1].apply(fn), LOGIT


def judged(fn: Any, **settings: Any) -> Sweep:
    return IDS, ZERO, score.Score("mine", fn, **settings)


PAIRS: dict[str, tuple[Sweep, Sweep, str]] = {
    "direction": ((IDS, ZERO, along(torch.ones(64))), (IDS, ZERO, along(torch.arange(64.0))), "scores"),
    "target": ((IDS, ZERO, score.logit(5)), (IDS, ZERO, score.logit(6)), "scores"),
    "place": ((IDS, ZERO, score.logit(5)), (IDS, ZERO, score.logit(5, at=5)), "scores"),
    "own score": (judged(lambda x: x[:, 5]), judged(lambda x: -x[:, 9]), "scores"),
    "own score's setting": (judged(lambda x: x[:, 5]), judged(lambda x: x[:, 5], at=4), "scores"),
    "named span": (
        (spanned(2), S.resid_post[0].at("word").zero(), LOGIT),
        (spanned(7), S.resid_post[0].at("word").zero(), LOGIT),
        "named spans",
    ),
    "ids": ((IDS, ZERO, LOGIT), (IDS + 1, ZERO, LOGIT), "text"),
    "closure": (applied(times(2.0)), applied(times(-3.0)), "variants"),
    "default": (applied(defaulting(2.0)), applied(defaulting(-3.0)), "variants"),
    "constant": (applied(lambda x: x * 2.0), applied(lambda x: x * 3.0), "variants"),
    "method": (applied(lambda x: x.sin()), applied(lambda x: x.cos()), "variants"),
    "object": (applied(Steering(torch.ones(64))), applied(Steering(torch.zeros(64))), "variants"),
    "module": (applied(torch.nn.LayerNorm(64)), applied(torch.nn.LayerNorm(64, eps=0.5)), "variants"),
    "key": (applied(ic.keyed(times(2.0), "twice")), applied(ic.keyed(times(3.0), "thrice")), "variants"),
    "tensor": (
        (IDS, S.resid_post[0].at(2).set(torch.ones(64)), LOGIT),
        (IDS, S.resid_post[0].at(2).set(torch.zeros(64)), LOGIT),
        "variants",
    ),
}


def swept(model: ic.Model, sweep: Sweep, out: Path | None = None) -> torch.Tensor:
    x, edit, judge = sweep
    return model.sweep(x, [edit], judge, out=out).values


@pytest.mark.parametrize("what", PAIRS)
def test_what_can_change_a_number_is_told(what: str, tmp_path: Path) -> None:
    first, second, part = PAIRS[what]
    model = tiny_model("llama")
    kept = swept(model, first, tmp_path)
    assert torch.equal(swept(model, first, tmp_path), kept)
    with pytest.raises(ic.PlanError, match=f"holds another sweep: other {part}; give another folder"):
        swept(model, second, tmp_path)
    assert not torch.equal(swept(model, second), kept)


def test_globals_that_a_function_reads_are_part_of_it() -> None:
    source = "factor = {}\ndef helper(x): return x * factor\ndef scaled(x): return helper(x)"

    def scaled_by(factor: float) -> Any:
        module = types.ModuleType("own")
        exec(source.format(factor), module.__dict__)
        return module.scaled  # type: ignore[attr-defined]

    assert identity.identity(scaled_by(2.0)) == identity.identity(scaled_by(2.0)) != identity.identity(scaled_by(3.0))


def counting() -> Any:
    count = 0

    def called(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return x * count

    return called


def drawing(iterator: Iterator[float]) -> Any:
    return lambda x: x * next(iterator)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (counting(), "it changes count, so that one call need not be as the next"),
        (drawing(iter([1.0, 2.0])), "a builtins.list_iterator, whose content cannot be compared"),
        (lambda x: x * pictures.SIZE, "it uses the module pictures, whose code may change"),
    ],
)
def test_a_function_that_cannot_be_told_needs_a_key(fn: Any, why: str, tmp_path: Path) -> None:
    """It is refused before anything runs; with a key, and without a folder, it is served."""
    model = tiny_model("llama")
    ran: list[int] = []
    handle = model.hf.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        for sweep, owner in ((applied(fn), "edit resid_post"), (judged(fn), "score mine")):
            with pytest.raises(ic.PlanError, match=rf"(?s){owner}.* cannot be told.*{why}.*ic\.keyed\(function, key\)"):
                swept(model, sweep, tmp_path)
    finally:
        handle.remove()
    assert not ran and not list(tmp_path.iterdir())
    swept(model, applied(ic.keyed(lambda x: x * 2, "twice")), tmp_path)


def test_images_are_told(tmp_path: Path) -> None:
    model = tiny_model("llava")
    values = pictures.inputs("llava", [[pictures.picture("llava")]])
    edit = S.resid_post[1].at(-1).scale(0.5)
    kept = swept(model, (values, edit, LOGIT), tmp_path)
    assert torch.equal(swept(model, (values, edit, LOGIT), tmp_path), kept)
    other = {**values, "pixel_values": values["pixel_values"].flip(-1)}
    with pytest.raises(ic.PlanError, match="other further inputs"):
        swept(model, (other, edit, LOGIT), tmp_path)


def _config(hf: Any) -> None:
    hf.config.rms_norm_eps = 0.5


def _setting(hf: Any) -> None:
    hf.model.layers[1].self_attn.scaling *= 2


def _hook(hf: Any) -> None:
    hf.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def _forward(hf: Any) -> None:
    hf.model.layers[1].mlp.forward = torch.nn.Identity().forward


def _last_number(hf: Any) -> None:
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight[-1, -1] += 1


def _past_the_version(hf: Any) -> None:
    hf.model.layers[2].mlp.down_proj.weight.data[-1, -1] += 1


def _heads_swapped(hf: Any) -> None:
    weight = hf.model.layers[2].self_attn.o_proj.weight.data
    weight.copy_(weight.roll(24, -1))


def _buffer(hf: Any) -> None:
    hf.model.rotary_emb.inv_freq *= 2


def _attention(hf: Any) -> None:
    hf.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_config, "config and modules"), (_setting, "config and modules"), (_hook, "config and modules"),
        (_forward, "config and modules"), (_last_number, "weights"), (_past_the_version, "weights"),
        (_heads_swapped, "weights"), (_buffer, "weights"), (_attention, "attention was sdpa, is eager"),
    ],
)  # fmt: skip
def test_what_a_model_computes_is_told(change: Callable[[Any], None], part: str, tmp_path: Path) -> None:
    hf = testing.tiny("llama")
    model, before = ic.load(hf), ic.load(hf).fingerprint()
    swept(model, (IDS, ZERO, LOGIT), tmp_path)
    assert model.fingerprint() == before  # a run changes nothing
    change(hf)
    with pytest.raises(ic.PlanError, match=f"holds another sweep: .*{part}"):
        swept(model, (IDS, ZERO, LOGIT), tmp_path)
    assert model.fingerprint() != before


def test_weights_are_hashed_once_while_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ic.load(testing.tiny("llama"))
    sizes: list[int] = []
    digest = identity.digest

    def counted(tensor: torch.Tensor) -> str:
        sizes.append(tensor.numel() * tensor.element_size())
        return digest(tensor)

    monkeypatch.setattr(identity, "digest", counted)
    whole = sum(weight.nbytes for weight in model.hf.parameters())
    first = model.fingerprint()
    assert sum(sizes) > whole
    sizes.clear()
    assert model.fingerprint() == first and sum(sizes) < whole / 20
    sizes.clear()
    with torch.no_grad():
        model.hf.lm_head.weight.mul_(2)
    assert model.fingerprint() != first and model.hf.lm_head.weight.nbytes < sum(sizes) < whole


def test_a_model_from_disk_and_one_that_is_partly_offloaded_go_on_with_each_other(tmp_path: Path) -> None:
    """The same weights, wherever they are, are the same model; a folder that is moved too."""
    hf = testing.tiny("llama")
    hf.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    import transformers

    spread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(weight.is_meta for weight in spread.parameters())
    kept = swept(ic.load(spread), (IDS, ZERO, LOGIT), tmp_path / "out")
    (tmp_path / "model").rename(tmp_path / "moved")
    whole = ic.load(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moved"))
    assert torch.equal(swept(whole, (IDS, ZERO, LOGIT), tmp_path / "out"), kept)


def test_frequencies_that_a_pass_stretched_are_not_another_model(tmp_path: Path) -> None:
    hf = testing.tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model = ic.load(hf)
    before = model.fingerprint()
    hf.model.rotary_emb.inv_freq = hf.model.rotary_emb.inv_freq * 0.9
    hf.model.rotary_emb.max_seq_len_cached = 300
    assert model.fingerprint() == before


def test_older_folders_are_refused_and_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "sweep.json").write_text('{"format": "interp-sweep/2", "key": "abc"}')
    save_file({"values": torch.ones(1, 1, 1)}, tmp_path / "sweep.safetensors")
    before = (tmp_path / "sweep.safetensors").read_bytes()
    with pytest.raises(ic.PlanError, match="holds a sweep of an older format"):
        swept(model, (IDS, ZERO, LOGIT), tmp_path)
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(ic.PlanError, match="holds a sweep of format None"):
        swept(model, (IDS, ZERO, LOGIT), tmp_path)
    assert (tmp_path / "sweep.safetensors").read_bytes() == before
    save_file({"values": torch.ones(1, 1, 1)}, tmp_path / "sweep.safetensors", {"format": "interp-sweep/4"})
    with pytest.raises(ic.PlanError, match=r"holds a sweep of format interp-sweep/4, not interp-sweep/5; give another"):
        swept(model, (IDS, ZERO, LOGIT), tmp_path)


@pytest.mark.parametrize("side", ["left", "right", "one row", "no padding"])
def test_values_laid_over_a_batch_are_taken_apart_as_a_run_does(side: str) -> None:
    """Whole sites, units and positions, and positions of which rows have different numbers."""
    model = tiny_model("llama", torch.float64)
    spans = {"word": ((ic.Span(1, 4),), (ic.Span(2, 3),)), "some": ((ic.Span(1, 4),), ())}
    text = replace(tokens(), spans=spans)
    if side == "right":
        text = ic.Tokens(*(torch.stack([x[0], x[1].roll(-3)]) for x in (text.ids, text.mask)), spans=spans)
    elif side == "one row":
        text = ic.Tokens(text.ids[1:], text.mask[1:], spans={"word": (spans["word"][1],)})
    elif side == "no padding":
        text = ic.Tokens(text.ids[:1], text.mask[:1], spans={"word": (spans["word"][0],)})
    n, generator = len(text), torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    chosen = sum(len(span) for row in text.spans["word"] for span in row)
    edits = [
        S.resid_post[1].add(some(n, 8, 64)), S.resid_post[1].add(some(8, 64)), S.resid_post[1].add(some(64)),
        S.z[1].set(some(n, 8, 4, 24)), S.z[1, [2, 3]].at([1, -1]).set(some(n, 2, 2, 24)), S.embed.set(some(n, 8, 64)),
        S.scores[1].add(some(n, 4, 8, 8)), S.scores[1, 2].at(query=-1).add(some(n, 8)), S.logits.add(some(n, 8, 96)),
        S.scores[1].at(key=1).add(some(n, 4, 8)), S.resid_post[1].at([1, -1]).set(some(n, 2, 64)),
    ]  # fmt: skip
    if n > 1:
        edits += [
            S.resid_post[1].at("word").set(some(chosen, 64)), S.resid_post[0].at("all").add(some(13, 64)),
            S.z[1].at("word").set(some(chosen, 4, 24)), S.scores[1].at(query="word", key=0).add(some(chosen, 4)),
            S.scores[1].at(query="word", key=[0, 1]).add(some(2 * chosen, 4)), S.resid_post[1].at("some").scale(3.0),
            S.scores[1].at(query="word").add(some(8 * chosen, 4)), S.z[1].at("word").add(some(24)),
        ]  # fmt: skip
    judge = score.logit_diff(3, 9)
    wanted = torch.stack([judge(model.run(text, edits=edit, logits=-1)).as_subclass(torch.Tensor) for edit in edits])
    for strategy in ("auto", "batched", "full"):
        torch.testing.assert_close(
            model.sweep(text, edits, judge, strategy=strategy).values, wanted, atol=1e-9, rtol=1e-9
        )


def test_a_value_behind_the_scored_token_is_cut_to_what_runs() -> None:
    model = tiny_model("llama", torch.float64)
    edit = S.resid_pre[1].add(torch.randn(9, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    judge = score.logit(5, at=4)
    sweep = model.sweep(IDS, [edit], judge)
    assert sweep.plan.lengths == [5]
    torch.testing.assert_close(sweep.values[0], judge(model.run(IDS, edits=edit)).as_subclass(torch.Tensor))
