"""The torch engine: hooks come and go, nothing is copied, nothing costs more than by hand."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.bench import count_calls

NARROW = {
    "num_hidden_layers": 12, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 8,
    "intermediate_size": 256,
}  # fmt: skip


def hooks(model: ic.Model) -> int:
    """Hooks and taps that are on the model now."""
    modules = list(model.hf.modules())
    tables = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in modules
    )
    return tables + sum("interp_hook" in vars(m) for m in modules)


EVERYTHING = [S.embed, S.resid_pre, S.resid_mid, S.z, S.head_out, S.rot_k, S.pattern, S.mlp_act, S.final_norm, S.logits]


def test_hooks_exist_only_during_the_run(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3")
    seen = []
    model.run(ids, read=EVERYTHING, edits=S.resid_post[1].apply(lambda x: (seen.append(hooks(model)), x + 1)[1]))
    assert seen[0] > 20
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_hooks_go_after_exceptions(ids: torch.Tensor, error: type[BaseException]) -> None:
    model = tiny_model("qwen3")

    def fail(_x: torch.Tensor) -> torch.Tensor:
        raise error("stop here")

    for call in (model.run, model.generate):
        with pytest.raises(error, match="stop here"):
            call(ids, read=EVERYTHING, edits=[S.pattern[1].apply(fail), S.resid_mid[0].scale(2.0)])
        assert hooks(model) == 0
        with torch.no_grad():
            assert torch.equal(model.run(ids).logits, model.hf(input_ids=ids).logits)


def test_a_run_inside_a_run_is_refused(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.PlanError, match="the model is running"):
        model.run(ids, edits=S.resid_post[0].apply(lambda x: (model.run(ids), x)[1]))
    assert hooks(model) == 0
    model.run(ids)


def test_threads_take_turns(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    alone = [model.run(ids, edits=S.resid_post[1].scale(float(s))).logits for s in range(2, 6)]
    found: dict[int, torch.Tensor] = {}

    def slowly(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x

    def work(scale: int) -> None:
        edits = [S.resid_post[0].apply(slowly), S.resid_post[1].scale(float(scale))]
        found[scale] = model.run(ids, edits=edits, allow_noop=True).logits

    threads = [threading.Thread(target=work, args=(s,)) for s in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, wanted in zip(range(2, 6), alone, strict=True):
        assert torch.equal(found[scale], wanted)


def test_nothing_of_the_model_changes(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3_moe")
    model.hf.get_submodule("model.layers.0").requires_grad_(False)
    weights = {name: (p.data_ptr(), p.requires_grad, p.clone()) for name, p in model.hf.named_parameters()}
    config, random_state = model.hf.config.to_dict(), torch.get_rng_state()
    model.run(ids, read=EVERYTHING, edits=S.router_logits[0].mask(1), grad=False)
    model.run(ids, read=S.resid_post, grad=lambda logits: logits.sum())
    model.generate(ids, edits=S.z[0].zero(), max_new_tokens=3)
    model.generate(ids, max_new_tokens=3, do_sample=True, seed=1)
    assert model.hf.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.hf.training
    for name, p in model.hf.named_parameters():
        pointer, needs, value = weights[name]
        assert p.data_ptr() == pointer and p.requires_grad == needs and torch.equal(p, value) and p.grad is None


class _Executed(TorchDispatchMode):
    """Counts matrix multiplications and allocated bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = 0
        self.attentions = 0
        self.fresh = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.matmuls += name in ("mm", "addmm", "bmm")
        self.attentions += "scaled_dot_product" in name
        if isinstance(out, torch.Tensor) and not out._is_view():
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in known:
                self.fresh += out.untyped_storage().nbytes()
        return out


def executed(call) -> _Executed:  # type: ignore[no-untyped-def]
    call()
    with _Executed() as mode:
        call()
    return mode


def test_early_stop_executes_only_what_is_needed(ids: torch.Tensor) -> None:
    model = tiny_model("llama", **NARROW)
    full = executed(lambda: model.run(ids)).matmuls
    first = executed(lambda: model.run(ids, read=S.resid_post[0], logits=False)).matmuls
    sixth = executed(lambda: model.run(ids, read=S.resid_post[5], logits=False)).matmuls
    head = executed(lambda: model.run(ids, read=S.z[5], logits=False)).matmuls
    per_layer = (full - 1) / 12
    assert first <= per_layer + 1
    assert sixth <= 6 * per_layer + 1
    assert head < sixth
    for layer in (0, 5):
        pattern = executed(lambda layer=layer: model.run(ids, read=S.pattern[layer], logits=False)).matmuls
        assert pattern <= (layer + 1) * per_layer + 1


def test_whole_reads_copy_nothing(ids: torch.Tensor) -> None:
    model = tiny_model("llama", **NARROW)
    plain = executed(lambda: model.run(ids)).fresh
    reads = executed(
        lambda: model.run(ids, read=[S.embed, S.resid_pre, S.resid_mid, S.resid_post, S.q, S.k, S.v, S.z, S.mlp_act])
    ).fresh
    assert reads == plain


def test_parts_hold_only_themselves(ids: torch.Tensor) -> None:
    model = tiny_model("llama", **NARROW)
    run = model.run(ids, read=[S.resid_post.at(-1), S.z[3, 5]])
    assert run[S.z[3, 5]].untyped_storage().nbytes() == run[S.z[3, 5]].nbytes
    assert run[S.resid_post[4].at(-1)].untyped_storage().nbytes() == 2 * 96 * 4
    plain = executed(lambda: model.run(ids)).fresh
    parts = executed(lambda: model.run(ids, read=S.resid_post.at(-1))).fresh
    assert parts - plain == 12 * 2 * 96 * 4


def test_python_calls_added_stay_near_hand_written_hooks() -> None:
    model = tiny_model("llama", **NARROW)
    tokens = ic.Tokens(torch.randint(3, 90, (1, 8)), torch.ones(1, 8, dtype=torch.bool))
    layers = model.hf.model.layers

    def plain() -> None:
        with torch.no_grad():
            model.hf(input_ids=tokens.ids, use_cache=False)

    def by_hand() -> None:
        kept, handles = {}, []

        def keep(layer: int):  # type: ignore[no-untyped-def]
            def hook(_m: object, _a: object, output: torch.Tensor) -> None:
                kept[layer] = output

            return hook

        try:
            for i, layer in enumerate(layers):
                handles.append(layer.register_forward_hook(keep(i)))
            plain()
        finally:
            for handle in handles:
                handle.remove()

    base = count_calls(plain)
    hand = count_calls(by_hand) - base
    ours = count_calls(lambda: model.run(tokens, read=S.resid_post)) - base
    patterns = count_calls(lambda: model.run(tokens, read=S.pattern)) - base
    ablation = count_calls(lambda: model.run(tokens, edits=S.z[3, 5].zero())) - base
    nothing = count_calls(lambda: model.run(tokens)) - base
    assert ours < 1.5 * hand
    assert nothing < 50 and patterns < 200 and ablation < 120


def test_compiling_many_reads_is_cheap() -> None:
    model = many_heads()
    sites = [S.z[layer, head] for layer in range(32) for head in range(32)][:1000]
    calls = count_calls(lambda: model.engine.compile(ic.Plan.of(sites), model.atlas))
    assert calls < 12 * len(sites)


def many_heads() -> ic.Model:
    config = {**NARROW, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 4}
    return ic.load(testing.tiny("llama", **config), check=False)
