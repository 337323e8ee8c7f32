"""Jacobian and tuned lenses: fits against closed forms and autograd, files in all their forms, edits along directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, tiny_model
from interp_plugins.logit_lens.transports import (
    JacobianLens,
    TunedLens,
    ablation,
    direction,
    fit_jacobian,
    fit_tuned,
    load_jacobian,
    load_tuned,
    save_jacobian,
    save_tuned,
    steering,
    swap,
)
from interp_plugins.logit_lens.transports.fitting import JacobianFit, prompt_jacobians
from interp_plugins.logit_lens.transports.jacobian import apart, merged
from interp_plugins.logit_lens.transports.steering import swapped
from interp_plugins.logit_lens.transports.tuned import unembed_hash
from torch import nn

import interp_core as ic
from interp_core import sites as S

FAMILIES = ("gpt2", "llama", "gemma2", "qwen3_moe")
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 90, (4, 12), generator=GENERATOR)


class MeanOfThePast(nn.Module):
    """A block's attention in the closed form: A times the mean of all positions up to its own."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """`[batch pos d_model]`."""
        count = torch.arange(1, hidden_states.shape[1] + 1, dtype=hidden_states.dtype)
        return (hidden_states.cumsum(1) / count[:, None]) @ self.matrix.mT, None


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def linear_model(matrices: list[torch.Tensor]) -> ic.Model:
    """A model whose blocks are h + A mean(h), and whose first block is the identity."""
    model = ic.load(ic.testing.tiny("llama", dtype=torch.float64), check=False)
    layers = model.hf.model.layers
    for layer, matrix in zip(layers, [torch.zeros_like(matrices[0]), *matrices], strict=False):
        layer.input_layernorm = nn.Identity()
        layer.self_attn = MeanOfThePast(matrix)
        layer.mlp = Nothing()
    return ic.load(model.hf, check=False)


def test_closed_form_of_blocks_that_add_a_mean_of_the_past() -> None:
    """J = I + c A, and with two blocks I + c (A + B) + c₂ B A; the wrong conventions give other constants."""
    d = ic.testing.tiny("llama").config.hidden_size
    a, b = torch.randn(2, d, d, dtype=torch.float64, generator=GENERATOR)
    model = linear_model([a, b])
    assert model.n_layers == 3
    ids = torch.randint(3, 90, (20,), generator=GENERATOR).tolist()
    found = prompt_jacobians(model, ids, JacobianFit(skip_first=4, dim_batch=7), 2)
    c, eye = 0.609491646983907, torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(found[1], eye + c * b, atol=1e-12, rtol=1e-12)
    past = torch.tril(torch.ones(20, 20, dtype=torch.float64)) / torch.arange(1, 21)[:, None]
    valid = slice(4, 19)
    twice = (past @ past)[valid, valid].sum() / 15
    assert float(twice) == pytest.approx(0.300886578, abs=1e-8)
    torch.testing.assert_close(found[0], eye + c * (a + b) + twice * b @ a, atol=1e-11, rtol=1e-11)


def directly(model: ic.Model, ids: list[int], skip: int) -> list[torch.Tensor]:
    """The definition, a position and a coordinate at a time, through transformers alone."""
    layers = model.hf.model.layers if hasattr(model.hf, "model") else model.hf.transformer.h
    valid, d = range(skip, len(ids) - 1), model.d_model
    sums = [torch.zeros(d, d, dtype=torch.float64) for _ in layers[:-1]]
    zeros = [torch.zeros(1, len(ids), d, dtype=torch.float64, requires_grad=True) for _ in layers[:-1]]
    last: list[torch.Tensor] = []

    def output(value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else value[0]

    def adding(zero: torch.Tensor) -> Any:
        return lambda _m, _a, out: out + zero if isinstance(out, torch.Tensor) else (out[0] + zero, *out[1:])

    hooks = [layer.register_forward_hook(adding(zero)) for layer, zero in zip(layers[:-1], zeros, strict=True)]
    hooks.append(layers[-1].register_forward_hook(lambda _m, _a, out: last.append(output(out))))
    try:
        model.hf(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for t in valid:
        for i in range(d):
            grads = torch.autograd.grad(last[0][0, t, i], zeros, retain_graph=True)
            for total, grad in zip(sums, grads, strict=True):
                total[i] += grad[0, list(valid)].sum(0)
    return [total / len(valid) for total in sums]


@pytest.mark.parametrize("family", [*FAMILIES[:2], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[2:])])
def test_fit_is_the_sum_of_autograds_jacobians(family: str) -> None:
    model = tiny_model(family, torch.float64)
    texts = [row[:9].tolist() for row in IDS[:2]]
    lens = fit_jacobian(model, texts, skip_first=3, dim_batch=5)
    wanted = [directly(model, text, 3) for text in texts]
    assert lens.layers == tuple(range(model.n_layers - 1)) and lens.n_prompts == 2
    for layer in lens.layers:
        mean = sum(matrices[layer] for matrices in wanted) / 2
        torch.testing.assert_close(lens.matrices[layer], mean, atol=1e-5, rtol=1e-5)  # norms are in float32
    half = apart(wanted[0][0], wanted[1][0])
    assert lens.agreement()[0] == pytest.approx(half, rel=1e-6)


def test_the_size_of_a_backward_pass_is_no_setting_of_the_result() -> None:
    model = tiny_model("llama", torch.float64)
    fits = [fit_jacobian(model, IDS[:1], skip_first=2, dim_batch=batch) for batch in (1, 7, 1000)]
    for layer in fits[0].layers:
        for other in fits[1:]:
            torch.testing.assert_close(other.matrices[layer], fits[0].matrices[layer], atol=1e-12, rtol=1e-10)


def test_a_fit_under_no_grad_is_the_same() -> None:
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        lens = fit_jacobian(model, IDS[:1], skip_first=2)
    assert torch.equal(lens.matrices[0], fit_jacobian(model, IDS[:1], skip_first=2).matrices[0])


def test_later_blocks_that_add_nothing_give_the_identity() -> None:
    d = ic.testing.tiny("llama").config.hidden_size
    model = linear_model([torch.zeros(d, d, dtype=torch.float64)] * 2)
    lens = fit_jacobian(model, IDS[:1], skip_first=2)
    for layer in lens.layers:
        assert torch.equal(lens.matrices[layer], torch.eye(d, dtype=torch.float64))


def test_a_stopped_fit_goes_on_and_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of convergence and the sums are one file, so neither can be ahead of the other."""
    model = tiny_model("llama")
    whole = fit_jacobian(model, IDS, skip_first=2)
    from interp_plugins.logit_lens.transports import fitting

    plain, calls = fitting.prompt_jacobians, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(fitting, "prompt_jacobians", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_jacobian(model, IDS, skip_first=2, out=tmp_path)
    lens = fit_jacobian(model, IDS, skip_first=2, out=tmp_path)
    assert len(calls) == 3 + 2
    for layer in lens.layers:
        assert torch.equal(lens.matrices[layer], whole.matrices[layer])
    assert (tmp_path / "convergence.csv").read_text().splitlines()[0].startswith("n_done,prompt_idx,seq_len")
    with pytest.raises(ic.PlanError, match="holds another fit"):
        fit_jacobian(model, IDS[:2], skip_first=2, out=tmp_path)
    with pytest.raises(ic.PlanError, match="holds another fit"):
        fit_jacobian(model, IDS, skip_first=3, out=tmp_path)


def test_the_published_rule_stops_a_fit() -> None:
    model = tiny_model("llama")
    same = [IDS[0]] * 9
    lens = fit_jacobian(model, same, skip_first=2, min_prompts=4, window=2, tolerance=1e-3)
    assert lens.n_prompts == 4  # the same text again changes nothing
    assert fit_jacobian(model, same, skip_first=2, max_prompts=3).n_prompts == 3
    assert fit_jacobian(model, same, skip_first=2).n_prompts == 9


def test_what_cannot_be_fitted() -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.PlanError, match="no text has more than 17 tokens.*the longest of 4 has 12"):
        fit_jacobian(model, IDS)
    with pytest.raises(ic.PlanError, match="no setting 'dimbatch'.*dim_batch"):
        fit_jacobian(model, IDS, dimbatch=3)
    with pytest.raises(ic.PlanError, match="have no position between"):
        fit_jacobian(model, IDS, max_seq_len=10)
    lens = fit_jacobian(model, [IDS[0], IDS[1, :3]], skip_first=2)
    assert lens.n_prompts == 1  # a text without a valid position does not count


def test_relp_is_another_rule() -> None:
    model = tiny_model("llama")
    gradient, relp = (fit_jacobian(model, IDS[:1], skip_first=2, rule=rule) for rule in ("gradient", "relp"))
    assert apart(gradient.matrices[0], relp.matrices[0])[0] > 1e-3
    d = ic.testing.tiny("llama").config.hidden_size
    linear = linear_model([torch.randn(d, d, dtype=torch.float64, generator=GENERATOR)] * 2)
    same = (fit_jacobian(linear, IDS[:1], skip_first=2, rule=rule) for rule in ("gradient", "relp"))
    torch.testing.assert_close(*(lens.matrices[0] for lens in same))


# Reading out


def test_lens_as_translator_and_what_it_lacks() -> None:
    model = tiny_model("llama")
    lens = fit_jacobian(model, IDS, skip_first=2)
    method = ic.method("logit_lens")
    plain, moved = method(model, IDS[:1]), method(model, IDS[:1], translator=lens)
    assert moved.layers == plain.layers[1:]  # the embedding is no row of such a lens
    assert torch.equal(moved.entropy[:, -1], plain.entropy[:, -1])
    resid = model.run(IDS[:1], read=S.resid_post[0])[S.resid_post[0]].plain
    logits = torch.log_softmax(model.readout(resid @ lens.matrices[0].mT), -1)
    torch.testing.assert_close(moved.top_logprob[:, 0], logits.topk(5).values, atol=1e-5, rtol=1e-5)
    part = JacobianLens({1: lens.matrices[1]}, 1)
    with pytest.raises(ic.PlanError, match="no matrix or translator for layer 0.*unfitted"):
        method(model, IDS[:1], translator=part)
    assert method(model, IDS[:1], translator=part, unfitted="leave_out").layers == ("1", "2")
    kept = method(model, IDS[:1], translator=part, unfitted="plain")
    assert torch.equal(kept.entropy[:, 1], plain.entropy[:, 1]) and kept.layers == plain.layers


# Directions and edits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direction_is_the_gradient_of_a_readout(family: str) -> None:
    model = tiny_model(family)
    lens = JacobianLens({0: torch.randn(model.d_model, model.d_model, generator=GENERATOR)}, 1)
    stream = torch.randn(model.d_model, generator=GENERATOR, requires_grad=True)
    (lens(0, stream[None])[0] @ model.weights(S.logits)[:, 7].float()).backward()
    torch.testing.assert_close(direction(model, lens, 0, 7), stream.grad, atol=1e-5, rtol=1e-5)
    folded = direction(model, lens, 0, 7, fold_gain=True)
    wanted = (model.weights(S.logits)[:, 7] * model.weights(S.final_norm)).float() @ lens.matrices[0]
    torch.testing.assert_close(folded, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ic.PlanError, match="no token id 12345678"):
        direction(model, lens, 0, 12345678)


def test_swap_of_coordinates_by_numbers() -> None:
    basis = torch.tensor([[1, 0.5, 0], [0, 2, 1]], dtype=torch.float64).mT
    h = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    wanted = torch.tensor([1.7142857142857144, 0.9285714285714286, 2.2857142857142856], dtype=torch.float64)
    torch.testing.assert_close(swapped(h, basis), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(swapped(swapped(h, basis), basis), h)  # α = 1 is an involution
    again = swapped(h, basis, 2.0)
    turned = torch.linalg.pinv(basis) @ (again - h)
    torch.testing.assert_close(turned, -turned.flip(0))  # what is common to both stays


def test_edits_along_directions() -> None:
    model = tiny_model("llama")
    lens = fit_jacobian(model, IDS, skip_first=2)
    tokens = ic.Tokens(IDS[:1], torch.ones_like(IDS[:1], dtype=torch.bool))
    clean = model.run(tokens, read=[S.resid_post[0], S.resid_post[1]])
    run = model.run(tokens, read=S.resid_post[0], edits=steering(model, lens, tokens, [0], 9, alpha=3.0))
    step = run[S.resid_post[0]].plain - clean[S.resid_post[0]].plain
    unit = nn.functional.normalize(direction(model, lens, 0, 9), dim=0)
    length = clean[S.resid_post[0]].plain.norm(dim=-1).median()
    torch.testing.assert_close(step, (3 * length * unit).expand_as(step), atol=1e-5, rtol=1e-4)

    gone = model.run(tokens, read=S.resid_post[1], edits=ablation(model, lens, [1], [9, 11]))[S.resid_post[1]].plain
    for token in (9, 11):
        left = gone @ nn.functional.normalize(direction(model, lens, 1, token), dim=0)
        torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-5, rtol=0)

    edits = swap(model, lens, tokens, [0, 1], (9, 11))
    run = model.run(tokens, read=[S.resid_post[0], S.resid_post[1]], edits=edits)
    for layer in (0, 1):
        basis = torch.stack([direction(model, lens, layer, token) for token in (9, 11)], 1)
        inverse = torch.linalg.pinv(basis).mT
        before = clean[S.resid_post[layer]].plain @ inverse
        torch.testing.assert_close(run[S.resid_post[layer]].plain @ inverse, before.flip(-1), atol=1e-4, rtol=1e-3)
    one = model.run(tokens, read=S.resid_post[1], edits=swap(model, lens, tokens, [1], (9, 11), alpha=2.0))
    wanted = swapped(clean[S.resid_post[1]].plain, basis, 2.0)
    torch.testing.assert_close(one[S.resid_post[1]].plain, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ic.PlanError, match="nearly one"):
        swap(model, lens, tokens, [0], (9, 9))


# Files


def test_files_of_jacobian_lenses_in_all_forms(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lens = fit_jacobian(model, IDS, skip_first=2)
    path = save_jacobian(lens, tmp_path / "lens.pt")
    again = load_jacobian(path, model)
    assert again.n_prompts == 4 and again.layers == lens.layers and again.metadata["skip_first"] == 2
    for layer in lens.layers:
        assert torch.equal(again.matrices[layer], lens.matrices[layer].half().float())
    data = torch.load(path, weights_only=True)
    assert set(data) == {"J", "n_prompts", "source_layers", "d_model", "metadata"}
    assert all(matrix.dtype == torch.float16 for matrix in data["J"].values())
    sums = {layer: matrix * 4 for layer, matrix in lens.matrices.items()}
    torch.save({"jacobian_sum": sums, "n_done": 4, "next_idx": 4, "source_layers": [0, 1]}, tmp_path / "stopped.pt")
    stopped = load_jacobian(tmp_path / "stopped.pt")
    torch.testing.assert_close(stopped.matrices[0], lens.matrices[0])
    with pytest.warns(UserWarning, match="of 4 prompts, it should be of 615"):
        load_jacobian(path, n_prompts=615)
    width = model.d_model
    torch.save(
        {"J": data["J"], "source_layers": [0, 1], "d_model": width, "provenance": {"n_prompts": 3}}, tmp_path / "v.pt"
    )
    assert load_jacobian(tmp_path / "v.pt").n_prompts == 3


REFUSED: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], "holds list"),
    "unknown": ({"matrices": {0: torch.eye(4)}}, "no Jacobian lens: it holds matrices"),
    "projected": ({"J": {0: torch.eye(4)}, "n_proj": 8, "model_id": "x"}, "estimate from random projections"),
    "heads": ({"J": {0: torch.zeros(4, 8)}, "d_model": 4}, r"layer 0 is \[4, 8\]"),
    "layers": ({"J": {0: torch.eye(4)}, "source_layers": [0, 1]}, r"says layers \[0, 1\] and holds \[0\]"),
    "empty": ({"J": {}}, "holds no matrices"),
    "unbegun": ({"jacobian_sum": {0: torch.eye(4)}, "n_done": 0}, "before its first prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_jacobian_lens(name: str, tmp_path: Path) -> None:
    data, message = REFUSED[name]
    torch.save(data, tmp_path / "lens.pt")
    with pytest.raises(ic.LoadError, match=message):
        load_jacobian(tmp_path / "lens.pt")


def test_lenses_of_other_models_and_broken_ones(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.LoadError, match="no file .*, which should hold a Jacobian lens"):
        load_jacobian(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no lens")
    with pytest.raises(ic.LoadError, match="cannot be read"):
        load_jacobian(tmp_path / "text.pt")
    eye = torch.eye(model.d_model)
    with pytest.raises(ic.PlanError, match=f"width 4, the model's stream of {model.d_model}"):
        JacobianLens({0: torch.eye(4)}, 1).check(model)
    with pytest.raises(ic.PlanError, match="has layer 2, this model's source layers are 0 to 1"):
        JacobianLens({2: eye}, 1).check(model)
    with pytest.raises(ic.PlanError, match="not finite, in layer 1"):
        JacobianLens({0: eye, 1: eye / 0}, 1).check(model)
    with pytest.raises(ic.PlanError, match="half precision"):
        save_jacobian(JacobianLens({0: eye * 1e6}, 1), tmp_path / "large.pt")


def test_fits_in_parts_are_merged_by_their_prompts() -> None:
    model = tiny_model("llama", torch.float64)
    whole = fit_jacobian(model, IDS, skip_first=2)
    parts = [fit_jacobian(model, part, skip_first=2) for part in (IDS[:1], IDS[1:])]
    both = merged(parts)
    assert both.n_prompts == 4
    torch.testing.assert_close(both.matrices[0], whole.matrices[0])
    with pytest.raises(ic.PlanError, match="differ in skip_first"):
        merged([parts[0], fit_jacobian(model, IDS[1:], skip_first=3)])


# Tuned lens


def test_tuned_lens_of_zeros_is_the_logit_lens_and_files_come_back(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    d, layers = model.d_model, range(-1, model.n_layers - 1)
    zeros = TunedLens({i: torch.zeros(d, d) for i in layers}, {i: torch.zeros(d) for i in layers})
    method = ic.method("logit_lens")
    assert torch.equal(method(model, IDS, translator=zeros).entropy, method(model, IDS).entropy)
    lens = TunedLens(
        {i: torch.randn(d, d, generator=GENERATOR) for i in layers}, {i: torch.randn(d, generator=GENERATOR) for i in layers},
        {"unembed_hash": unembed_hash(model), "base_model_name_or_path": "tiny"},
    )  # fmt: skip
    again = load_tuned(save_tuned(lens, tmp_path / "lens"), model)
    rows = torch.randn(5, d, generator=GENERATOR)
    state = torch.load(tmp_path / "lens" / "params.pt", weights_only=True)
    for i in layers:  # translator i + 1 of the file acts on the output of block i
        wanted = rows + rows @ state[f"{i + 1}.weight"].mT + state[f"{i + 1}.bias"]
        torch.testing.assert_close(again(i, rows), wanted, atol=1e-6, rtol=1e-6)
    with pytest.raises(ic.PlanError, match=f"no translator for layer {model.n_layers - 1}"):
        again(model.n_layers - 1, rows)
    with pytest.warns(UserWarning, match="another unembedding"):
        load_tuned(tmp_path / "lens", ic.load(ic.testing.tiny("gpt2", seed=1), check=False))


def test_folders_that_are_no_tuned_lens(tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match="config.json is not there"):
        load_tuned(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"lens_type": "other"}))
    torch.save({"0.weight": torch.eye(4)}, tmp_path / "params.pt")
    with pytest.raises(ic.LoadError, match="of no linear_tuned_lens"):
        load_tuned(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8}))
    with pytest.raises(ic.LoadError, match="says width 8"):
        load_tuned(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert load_tuned(tmp_path).bias[-1].shape == (4,)  # written without biases
    torch.save({"0.weight": torch.eye(4), "probe": torch.eye(4)}, tmp_path / "params.pt")
    with pytest.raises(ic.LoadError, match="holds 'probe'"):
        load_tuned(tmp_path)
    torch.save({"1.weight": torch.eye(4)}, tmp_path / "params.pt")
    with pytest.raises(ic.LoadError, match=r"translators \[1\]"):
        load_tuned(tmp_path)


@pytest.mark.parametrize("objective", ["kl", "regression"])
def test_a_fitted_tuned_lens_is_nearer_to_the_end(objective: Any) -> None:
    """And a second fit gives the same bits."""
    model = tiny_model("llama")
    settings: dict[str, Any] = {"objective": objective, "steps": 30, "rows": 64, "rate": 1e-2}
    lens = fit_tuned(model, IDS, **settings)
    method = ic.method("logit_lens")
    plain, tuned = method(model, IDS), method(model, IDS, translator=lens)
    assert bool((tuned.kl.mean((0, 2))[:-1] < plain.kl.mean((0, 2))[:-1]).all())
    assert not tuned.kl[:, -1].any()
    again = fit_tuned(model, IDS, **settings)
    assert all(torch.equal(again.weight[i], lens.weight[i]) for i in lens.layers)
    with pytest.raises(ic.PlanError, match="no positions|have none after"):
        fit_tuned(model, IDS, skip_first=40)


def test_equals_transformer_lens_own_fit() -> None:
    """In a float64 model, so that what is left is that theirs are kept in float32."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens as Theirs

    folder = str(DATA / "stories260K")
    model = ic.load(folder, engine="transformer_lens", engine_options={"fold": False}, dtype=torch.float64)
    bridge = model.engine.bridge  # type: ignore[attr-defined]
    bridge.tokenizer = model.tokenizer  # our engine reads texts itself
    bridge.tokenizer.pad_token = bridge.tokenizer.eos_token  # theirs wants to pad what is alone
    texts = [
        "Once upon a time, there was a girl named Lily who liked to play in the park with her red ball.",
        "Tom and Sue went to the big house. They saw a cat and a dog, and the dog was very sad that day.",
    ]
    settings = {"max_seq_len": 26, "dim_batch": 16}
    theirs = Theirs.fit(bridge, texts, corpus="two stories", show_progress=False, **settings)
    ours = fit_jacobian(ic.load(folder, dtype=torch.float64), texts, **settings)
    assert list(ours.layers) == theirs.source_layers and ours.n_prompts == theirs.n_prompts == 2
    for layer in ours.layers:
        torch.testing.assert_close(ours.matrices[layer].float(), theirs.jacobians[layer], atol=1e-6, rtol=0)
