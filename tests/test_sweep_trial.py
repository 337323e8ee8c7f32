"""The trial of strategies before a model's first sweep: what it costs, what it finds, and that what passes it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from sweeping import JUDGED, tokens

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S
from interp_core.sweep import choose, clean


@pytest.mark.parametrize(("family", "layers", "calls"), [("llama", 2, 4), ("gemma3", 6, 14), ("gptj", 2, 4)])
def test_the_trial_costs_a_few_calls_of_a_few_layers(family: str, layers: int, calls: int) -> None:
    """However deep the model is; and what it says that it took is what its layers were called with."""
    deep = {"n_layer": 12} if family == "gptj" else {"num_hidden_layers": 12}
    if family == "gemma3":
        deep["layer_types"] = ["sliding_attention", "full_attention"] * 6  # type: ignore[assignment]
    model = ic.load(testing.tiny(family, **deep))
    ids = torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(0))
    edits = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    counted: list[int] = []
    blocks = [model.engine.modules[model.atlas.entries["resid_pre", at].read.module] for at in range(12)]  # type: ignore[union-attr]
    computing = [module for block in blocks for name, module in block.named_modules() if name in ("mlp", "mlp.fc_in")]
    handles = [
        module.register_forward_hook(lambda _m, _a, output: counted.append(output.shape[:-1].numel()))
        for module in computing
        if len(list(module.children())) > 1 or family != "gptj"
    ]
    try:
        cold = model.sweep(ids, edits, JUDGED).plan
        first = len(counted)
        warm = model.sweep(ids, edits, JUDGED).plan
    finally:
        for handle in handles:
            handle.remove()
    assert cold.trial is not None and warm.trial == cold.trial  # what is said does not depend on who was first
    assert (cold.trial.layers, cold.trial.calls) == (layers, calls)
    assert first - (len(counted) - first) == calls
    assert cold.trial.token_layers <= cold.token_layers / 3
    assert f"once per model: {calls} calls of {layers} layers" in cold.explain() == warm.explain()


def test_a_model_that_shapes_its_output_like_its_input_is_called_with_all_rows() -> None:
    """gpt_bigcode: one row of inputs for many variants of one text does not do there."""
    import transformers

    config = transformers.GPTBigCodeConfig(
        vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = ic.load(transformers.GPTBigCodeForCausalLM(config).double().eval())
    inner = score.projection(S.resid_post[1].at(-1), torch.linspace(-1, 1, 64, dtype=torch.float64))
    edits = [S.resid_pre[1].at(-1).scale(c) for c in (0.5, 2.0)] + [S.resid_pre[0].at(0).scale(3.0)]
    for text in (tokens(), tokens().row(0)):
        for judged in (score.logit_diff(3, 9), inner):
            swept, full = (model.sweep(text, edits, judged, strategy=name) for name in ("auto", "full"))
            assert swept.plan.strategy == "staircase"
            torch.testing.assert_close(swept.values, full.values, atol=1e-10, rtol=1e-9)


def test_a_window_that_attention_is_not_told_of_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens show no difference; a text longer than the window would."""

    model = tiny_model("mistral")
    edits = [S.z[1, 0].at(-1).zero()]
    assert model.sweep(tokens(), edits, JUDGED).plan.strategy == "staircase"
    told = choose.clean_pass

    def silent(*args: object, **kwargs: object) -> clean.CleanPass:
        return replace(told(*args, **kwargs), windows=[4, None, 4])  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "clean_pass", silent)
    assert model.sweep(tokens(), edits, JUDGED).plan.strategy == "staircase"  # remembered
    plan = ic.load(testing.tiny("mistral")).sweep(tokens(), edits, JUDGED).plan
    assert plan.strategy == "restart" and "layer 1 attends in a window of 4 and does not tell" in plan.why


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_no_strategy_fits_is_found(layer: int) -> None:
    """A layer of another kind than its neighbours, which makes rows depend on each other."""
    hf = testing.tiny("llama", num_hidden_layers=3)

    class Mixing(type(hf.model.layers[layer].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean((0, 1), keepdim=True)

    hf.model.layers[layer].mlp.__class__ = Mixing
    model = ic.load(hf)
    plan = model.sweep(tokens(), [S.resid_pre[0].at(-1).scale(2.0)], JUDGED).plan
    assert plan.strategy == "full" and "its numbers differ from full forward passes by" in plan.why


_SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, dict[str, object]] = {
    "GPTBigCode": _GPT, "Falcon": {**_SMALL, "alibi": True}, "Bloom": {**_GPT, "hidden_size": 64}, "CodeGen": {
        **_GPT, "rotary_dim": 8}, "Mpt": {"vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4},
    "StableLm": _SMALL, "Cohere": _SMALL, "Cohere2": {**_SMALL, "sliding_window": 4}, "Starcoder2": _SMALL,
    "Olmo": _SMALL, "Olmo3": {**_SMALL, "sliding_window": 4}, "Phi": _SMALL, "Nemotron": _SMALL, "Gemma": {
        **_SMALL, "head_dim": 24}, "Granite": _SMALL, "Glm4": {**_SMALL, "head_dim": 16}, "SmolLM3": _SMALL,
    "Persimmon": _SMALL, "Apertus": _SMALL, "BitNet": _SMALL,
}  # fmt: skip


@pytest.mark.parametrize("name", ["bart", "camembert", "gemma3n_text", "gemma4_text"])
def test_sweeps_of_odd_models_are_their_runs(name: str) -> None:
    """Positions that a model counts by itself, or from elsewhere than zero, in what it embeds; several streams, of which
    none can be a row among others; sizes that differ from layer to layer."""
    model, vector = tiny_model(name, torch.float64), torch.linspace(-2, 2, 64, dtype=torch.float64)
    edits = [site.at(pos).add(vector) for site in (S.embed, S.mlp_in[1]) for pos in (1, 3, -1)]
    judged = score.logit_diff(3, 9)
    swept = model.sweep(tokens(), edits, judged)
    runs = [torch.cat([judged(model.run(row, edits=edit)) for row in tokens()]) for edit in edits]
    torch.testing.assert_close(swept.values, torch.stack(runs).to(swept.values), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_trial_lets_pass_holds(name: str) -> None:
    """Families beside the tiny ones: one text and several, variants that join together and apart, and an inner score."""
    import transformers

    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**OTHERS[name]))
    for weight in hf.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.1 if weight.ndim == 1 else 0.2)
    model = ic.load(hf.double().eval())
    vector = torch.linspace(-2, 2, 64, dtype=torch.float64)
    same = [S.resid_pre[1].at(-1).scale(c) for c in (0.5, 2.0)]
    apart = [S.resid_pre[at].at(pos).add(vector) for at in range(3) for pos in (0, 2, -1)]
    inner = score.projection(S.resid_post[1].at(-1), vector)
    for text in (tokens(), tokens().row(0)):
        for edits, judged in ((same, score.logit_diff(3, 9)), (apart, score.logit_diff(3, 9)), (apart[:3], inner)):
            swept, full = (model.sweep(text, edits, judged, strategy=taken) for taken in ("auto", "full"))
            assert (swept.values - full.values).abs().max() <= 1e-6 * full.values.abs().max(), swept.plan.explain()
