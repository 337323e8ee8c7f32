"""Models whose linear layers are quantised: what needs activations works, what needs weights asks the layers for them, or
is refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from wrapping import FAMILIES, IDS, hold, output_projection

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.testing.state import State

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:torch.*quant:UserWarning", "ignore:MatMul8bitLt:UserWarning"
)


class Packed(nn.Module):
    """A linear layer as GPTQ and AWQ have them: integers and scales, and nothing that is called weight."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        weight = linear.weight.detach().mT if isinstance(linear, Conv1D) else linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        scales = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (weight / scales).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias)


class Rounding(Packed):
    """One that rounds what it is given, too, as int8 kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((x / size).round() * size)


def exchanged(hf: Any, make: Callable[[Any], nn.Module]) -> Any:
    """A model with other linear layers, its unembedding too."""
    for name, module in list(hf.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)):
            outer, _, own = name.rpartition(".")
            setattr(hf.get_submodule(outer), own, make(module))
    return hf


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_a_weight_show_it_by_what_they_compute(family: str) -> None:
    hf = exchanged(testing.tiny(family), Packed)
    before, model = State.of(hf), ic.load(hf)
    hold(model, hf, family)
    plain = ic.load(testing.tiny(family))
    assert (model.n_heads, model.n_kv_heads, model.d_head, model.d_vocab) == (
        plain.n_heads, plain.n_kv_heads, plain.d_head, plain.d_vocab,
    )  # fmt: skip
    projection = output_projection(hf, family, 1)
    dequantised = (projection.qweight * projection.scales).mT
    torch.testing.assert_close(model.weights(S.z[1]).flatten(0, 1), dequantised, atol=1e-6, rtol=1e-6)
    run = model.run(IDS, read=[S.final_norm, S.resid_post[-1]])
    torch.testing.assert_close(model.readout(run[S.resid_post[-1]].plain), run.logits.plain, atol=1e-5, rtol=1e-5)
    assert not any(before.changes(part, State.of(hf)) for part in ("hooks", "weights", "modes", "config"))
    assert model.run(IDS, read=S.z[1], grad=lambda logits: logits.pow(2).sum()).grad[S.z[1]].plain.any()
    silenced, score = S.z[1, 2].zero(), ic.score.logprob(3)
    swept = model.sweep(IDS[:1], [silenced], score=score).values.flatten()
    torch.testing.assert_close(swept, score(model.run(IDS[:1], edits=silenced)).to(swept), atol=1e-4, rtol=1e-4)
    first = model.fingerprint()
    projection.scales.mul_(2)
    assert model.fingerprint() != first


class Mute(Packed):
    """One that does not say how wide it is."""

    def __init__(self, linear: Any) -> None:
        super().__init__(linear)
        del self.in_features, self.out_features


def test_heads_of_layers_that_say_nothing_are_counted_by_the_config() -> None:
    hf = exchanged(testing.tiny("qwen3"), Mute)
    model = ic.load(hf)
    hold(model, hf, "qwen3")
    assert (model.n_heads, model.n_kv_heads, model.d_head, model.d_mlp, model.d_vocab) == (4, 2, 24, 96, 96)
    assert "Mute does not say how many numbers it takes and gives" in model.can(S.head_out, "read")
    with pytest.raises(ic.CapabilityError, match="z of this qwen3 in layer 1 does not come out of one linear map"):
        model.weights(S.z[1])


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_layers_that_round_what_they_are_given_have_no_heads(engine: str) -> None:
    hf = exchanged(testing.tiny("llama"), Rounding)
    model = ic.load(hf, engine=engine)
    hold(model, hf, "llama")
    why = r"weights of the output projection do not show: Rounding is no linear map to the rounding of torch.float32"
    with pytest.raises(ic.CapabilityError, match=f"head_out.*{why}"):
        model.run(IDS, read=S.head_out)
    with pytest.raises(ic.CapabilityError, match="z of this llama in layer 1 .* not linear to rounding"):
        model.weights(S.z[1])
    assert model.run(IDS, edits=S.z[1, 2].zero()).receipts[0].fired == 1


def test_one_layer_that_rounds_takes_heads_of_that_layer_alone() -> None:
    hf = testing.tiny("llama")
    hf.model.layers[1].self_attn.o_proj = Rounding(hf.model.layers[1].self_attn.o_proj)
    model = ic.load(hf)
    assert model.layers(S.head_out) == [0, 2]
    with pytest.raises(ic.SiteError, match=r"layer 1 has no head_out \(the weights of .* Rounding is no linear map"):
        model.run(IDS, read=S.head_out[1])


def dynamic(hf: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(hf, {nn.Linear}, dtype=torch.qint8)


def test_dynamic_quantisation() -> None:
    """It rounds by the largest number of a whole batch, which padding is part of."""
    hf = dynamic(testing.tiny("llama"))
    model = ic.load(hf)
    hold(model, hf, "llama")
    assert model.d_mlp == 96 and model.d_vocab == 96
    assert "DynamicQuantizedLinear is no linear map" in model.can(S.head_out, "read")
    assert "self-check" in model.atlas.lacking["left padding"]
    silenced, score = [S.z[1, head].zero() for head in range(4)], ic.score.logprob(3)
    swept = model.sweep(IDS[:1], silenced, score=score)
    assert swept.plan.strategy == "full" and "rows of a batch change each other's numbers" in swept.plan.why
    # of the last position alone, since the head rounds by what it is given with it
    alone = torch.stack([score(model.run(IDS[:1], edits=edit, logits=-1))[0] for edit in silenced])
    torch.testing.assert_close(swept.values.flatten(), alone.to(swept.values))
    with pytest.raises(
        ic.CapabilityError, match=r"q_proj \(DynamicQuantizedLinear\) is computed by a kernel that autograd"
    ):
        model.run(IDS, read=S.z[1], grad=lambda logits: logits.sum())
    other = testing.tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(2)  # the same integers, with another scale
    assert (
        ic.load(dynamic(other)).fingerprint()
        != model.fingerprint()
        == ic.load(dynamic(testing.tiny("llama"))).fingerprint()
    )


def test_what_is_packed_where_nothing_unpacks_it_is_refused() -> None:
    hf = testing.tiny("llama")
    table = hf.model.embed_tokens.weight
    hf.model.embed_tokens.weight = nn.Parameter((table * 10).to(torch.int8), requires_grad=False)
    with pytest.raises(ic.LoadError, match=r"embed_tokens \(Embedding\) is quantised, and has no forward of its own"):
        ic.load(hf)


def lacks(package: str) -> Any:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(
        absent, reason=f"{package} is not installed: pip install -c constraints.txt -e '.[wrapped]'"
    )


def in_bitsandbytes(kind: str) -> Callable[[Any], nn.Module]:
    import bitsandbytes

    def make(linear: Any) -> nn.Module:
        more = (
            {"has_fp16_weights": False}
            if kind == "Linear8bitLt"
            else {"quant_type": "nf4", "compute_dtype": torch.bfloat16}
        )
        layer = getattr(bitsandbytes.nn, kind)(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **more
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu").eval()

    return make


def of_four_bits(seed: int = 0) -> Any:
    """Its kernels take widths that 64 divides."""
    sizes = {"intermediate_size": 128, "head_dim": 32}
    return exchanged(testing.tiny("llama", seed, torch.bfloat16, **sizes), in_bitsandbytes("Linear4bit"))


@lacks("bitsandbytes")
def test_bitsandbytes_of_four_bits(tmp_path: Path) -> None:
    hf = of_four_bits()
    model = ic.load(hf)
    assert (model.n_heads, model.n_kv_heads, model.d_head, model.d_mlp, model.d_vocab) == (4, 2, 32, 128, 96)
    hold(model, hf, "llama", rounding=0.02)
    layer = hf.model.layers[1].self_attn.o_proj
    shown = (layer(torch.eye(128, dtype=torch.bfloat16)) - layer(torch.zeros(1, 128, dtype=torch.bfloat16))).detach()
    torch.testing.assert_close(model.weights(S.z[1]).flatten(0, 1), shown)
    assert ic.load(of_four_bits(seed=1)).fingerprint() != model.fingerprint() == ic.load(of_four_bits()).fingerprint()


@lacks("bitsandbytes")
def test_bitsandbytes_of_eight_bits() -> None:
    hf = testing.tiny("llama")
    for block in hf.model.layers:
        for outer in (block.self_attn, block.mlp):
            exchanged(outer, in_bitsandbytes("Linear8bitLt"))
    model = ic.load(hf)
    hold(model, hf, "llama")
    assert "Linear8bitLt on a Int8Params is no linear map" in model.can(S.head_out, "read")
    assert (model.n_heads, model.n_kv_heads, model.d_mlp) == (4, 2, 96)


@lacks("torchao")
@pytest.mark.parametrize(
    ("config", "heads"), [("Int8WeightOnlyConfig", True), ("Int8DynamicActivationInt8WeightConfig", False)]
)
def test_torchao(config: str, heads: bool) -> None:
    import torchao.quantization as ao

    def quantised(seed: int = 0) -> Any:
        hf = testing.tiny("qwen3", seed)
        ao.quantize_(hf, getattr(ao, config)())
        return hf

    hf = quantised()
    model = ic.load(hf)
    hold(model, hf, "qwen3")
    assert (model.can(S.head_out, "read") == "") is heads and model.d_mlp == 96
    if heads:
        shown = hf.model.layers[1].self_attn.o_proj.weight.dequantize().mT
        torch.testing.assert_close(model.weights(S.z[1]).flatten(0, 1), shown, atol=1e-5, rtol=1e-5)
        few = model.unembed(model.run(IDS, read=S.final_norm)[S.final_norm].plain, slice(3, 6))
        torch.testing.assert_close(few, model.run(IDS).logits.plain[..., 3:6], atol=1e-5, rtol=1e-5)
    assert ic.load(quantised(1)).fingerprint() != model.fingerprint() == ic.load(quantised()).fingerprint()
