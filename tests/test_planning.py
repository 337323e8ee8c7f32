"""Plans of runs: what they must equal (torch's count of operations, bytes that are allocated, passes that really run)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, the_real_model, toy_model
from counting import count
from interp_recipes.attribution_eval import AttributionEvalConfig, attribution_eval
from interp_recipes.moe_mask_sweep import MoeMaskSweepConfig, moe_mask_sweep
from interp_recipes.visual_phase1 import VisualPhase1Config, visual_phase1
from placed import in_two
from plans import ATTRIBUTIONS, FAMILIES, SIZES, Measured, attributed, texts
from typer.testing import CliRunner

import interp_core as ic
from interp_core import cli, testing
from interp_core.bench.allocations import peak_bytes
from interp_core.cost import Cost, Passes
from interp_core.planning import Outline, Rate, named_rate, outline_of, plan
from interp_core.planning.formulas import activations, cache, flops
from interp_core.planning.plan import MOST

LLAMA_405B = {
    "model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
    "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256, "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}  # fmt: skip
QWEN_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "max_position_embeddings": 40960, "dtype": "bfloat16",
}  # fmt: skip
TARGET = 5


def written(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outline]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("dense", "moe")}
    configs = {"dense": LLAMA_405B, "moe": QWEN_30B_A3B}
    return {name: outline_of(written(folders[name], config)) for name, config in configs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """With kernels whose products torch counts: of attention by `eager`, of experts one by one."""
    hf = testing.tiny(family, **FAMILIES[family])
    hf.set_attn_implementation("eager")
    if family == "qwen3_moe":
        hf.set_experts_implementation("eager")
    ratios = Measured(ic.load(hf)).operations()
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=2e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_what_tensors_take(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        attention = "eager"  # capped scores: the only one that it has
    hf = testing.tiny(family, **FAMILIES[family])
    hf.set_attn_implementation(attention)
    ratios = Measured(ic.load(hf)).memory()
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.2)


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager")])
def test_memory_in_half_precision(family: str, attention: str) -> None:
    """Norms and the softmax are in float32 there, and count double; a narrow MLP leaves the rest to attention."""
    hf = testing.tiny(family, dtype=torch.bfloat16, **FAMILIES[family] | {"intermediate_size": 192})
    hf.set_attn_implementation(attention)
    ratios = Measured(ic.load(hf)).memory()
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.2)


@pytest.mark.real
def test_the_real_model() -> None:
    """SmolLM2: operations of `eager`, whose products torch counts, and the bytes of both."""
    model = the_real_model()
    model.hf.set_attn_implementation("eager")
    try:
        eager = Measured(ic.load(model.hf, tokenizer=model.tokenizer))
        ratios = eager.operations() | {f"{name}, eager": ratio for name, ratio in eager.memory().items()}
    finally:
        model.hf.set_attn_implementation("sdpa")
    ratios |= {f"{name}, sdpa": ratio for name, ratio in Measured(model).memory().items()}
    print(ratios)
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.2)
    assert Measured(model).outline.held == sum(p.numel() for p in (*model.hf.parameters(), *model.hf.buffers()))


@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_operations_of_an_attribution_are_counted_with_what_it_does_beside_its_pass(name: str) -> None:
    """For IFR's rows that is a third of the pass again: a plan of the passes alone does not hold."""
    hf = ic.load("toy:text").hf
    hf.set_attn_implementation("eager")
    model = ic.load(hf)
    for length in (20, 120):
        passes, beside, counted = attributed(model, name, length, TARGET)
        assert passes + beside == pytest.approx(counted, rel=0.2)
        assert (beside > 0) == name.startswith("IFR")
        assert name != "IFR, rows" or passes < 0.88 * counted


def _held_by_one(folder: Path, _: int) -> list[int]:
    """Numbers that a process holds, the bytes of a pass's widest moment, and those of its keys and values."""
    model, tokens = ic.load(str(folder / "model"), tp_plan="auto"), texts(2, 96, 400)
    held = [getattr(x, "to_local", lambda x=x: x)().numel() for x in (*model.hf.parameters(), *model.hf.buffers())]
    model.run(tokens)
    # what one process sends another may be freed a little later or earlier
    widest = min(peak_bytes(lambda: model.run(tokens)) for _ in range(5))
    with torch.no_grad():
        cached = model.hf(tokens.ids, use_cache=True).past_key_values.layers
    return [sum(held), widest, sum(layer.keys.nbytes + layer.values.nbytes for layer in cached)]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_a_process_has_of_a_shared_model(family: str, tmp_path: Path) -> None:
    """Weights and caches to the byte, as two processes hold them."""
    testing.tiny(family, **FAMILIES[family]).save_pretrained(tmp_path / "model")
    outline = outline_of(tmp_path / "model", tp=2)
    assert outline.part is not None
    once = outline.work(2, 96, batch=2).forward(read_out=96).passes[0]
    for held, widest, cached in in_two(_held_by_one, tmp_path):
        assert (outline.part.held, cache(outline.part, once)) == (held, cached)
        assert activations(outline.part, once) == pytest.approx(widest, rel=0.1)
    assert cache(outline, once) == 2 * cached and 1.9 * held < outline.held < 2 * held


def test_processes_share_memory_and_work_together(large: dict[str, Outline], tmp_path: Path) -> None:
    shared = outline_of(written(tmp_path, LLAMA_405B), tp=8)
    whole, told = (
        planned(outline, memory=141e9, gpus=16, rate=named_rate("H200")) for outline in (large["dense"], shared)
    )
    assert (told.per_copy, told.copies, told.fits, told.forward) == (8, 2, True, whole.forward)
    assert told.memory.weights == pytest.approx(2 * large["dense"].held / 8, rel=1e-3)
    assert told.seconds == pytest.approx(whole.seconds * whole.copies / 16)
    narrow = planned(shared, memory=80e9, gpus=8)
    assert not narrow.fits and narrow.needed is None


def test_sizes_come_from_a_config_alone(large: dict[str, Outline], tmp_path: Path) -> None:
    assert large["dense"].held == pytest.approx(405.85e9, rel=1e-4)
    assert large["moe"].held == pytest.approx(30.53e9, rel=1e-3)
    layer = large["moe"].layers[0]
    assert (layer.experts, layer.top_k, layer.heads, layer.kv_heads, layer.d_key) == (128, 8, 32, 4, 128)
    # of every token, 3.3 billion numbers are at work, embeddings among them
    active = sum(x.matrices + x.expert_matrices * x.top_k // x.experts for x in large["moe"].layers)
    assert active + 2 * large["moe"].unembedding == pytest.approx(3.35e9, rel=0.01)
    for family in FAMILIES:
        hf = testing.tiny(family, **FAMILIES[family])
        hf.config.save_pretrained(tmp_path / family)
        told, there = outline_of(tmp_path / family), outline_of(hf)
        assert told.layers == there.layers and (told.held, told.first, told.last) == (
            there.held,
            there.first,
            there.last,
        )


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lens": ("logit_lens", {}),
    "lens of the last": ("logit_lens", {"at": -1, "targets": "next"}),
    **{f"ifr {name}": ("ifr", {"variant": name}) for name in ("span", "all_positions", "multi_hop_both")},
    **{f"attnlrp {name}": ("attnlrp", {"variant": name}) for name in ("span", "per_token", "hop0")},
    "attnlrp hops": ("attnlrp", {"variant": "multi_hop", "n_hops": 3}),
    "gradient": ("input_x_gradient", {}),
    "gradient rows": ("input_x_gradient", {"per_token": True}),
    "integrated": ("integrated_gradients", {"steps": 5}),
    "integrated rows": ("integrated_gradients", {"steps": 5, "per_token": True}),
    "heads": ("activation_patching", {"corrupted": True}),
    "heads zeroed": ("activation_patching", {}),
    "each": ("activation_patching", {"corrupted": True, "site": "resid_pre", "by": "layer", "at": "each"}),
    "after blocks": ("activation_patching", {"site": "resid_post", "by": "layer"}),
    "some": ("activation_patching", {"corrupted": True, "layers": [2, 3], "at": [-1, -3]}),
    "both": ("activation_patching", {"site": ["attn_out", "mlp_out"], "by": "layer", "at": "all"}),
    "values": ("activation_patching", {"site": "v", "strategy": "full", "layers": [0, 3]}),
}


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_those_that_run(name: str) -> None:
    method, settings = METHODS[name]
    model, outline = toy_model(), outline_of("toy:text")
    both, rows = texts(2, 20, 900), 2 if method == "logit_lens" else 1
    tokens = both if rows == 2 else both.row(0)
    work = outline.work(rows, 20, batch=rows)
    if method not in ("logit_lens", "activation_patching"):
        tokens = tokens.name(prompt=ic.Span(0, 20 - TARGET), target=ic.Span(20 - TARGET, 20))
        work = replace(work, target=TARGET)
    if settings.get("corrupted"):
        settings = settings | {"corrupted": both.row(1)}
    ready = ic.method(method)
    cost = ready.configured(settings).cost(work)
    counted = count(model, lambda: ready(model, tokens, **settings))
    assert cost is not None
    assert (cost.forward, cost.backward, cost.calls) == (counted.forward, counted.backward, counted.calls)


def test_passes_of_function_vectors() -> None:
    model, ready = toy_model(), ic.method("function_vectors")
    pairs = "big small hot cold old young fast slow rich poor hard soft dark light strong weak long short high low"
    words = pairs.split()
    settings = {"task": list(zip(words[::2], words[1::2], strict=True)), "trials": 3, "shots": 2, "questions": 2}
    tokens = texts(1, 17, 900)  # as long as the trials, of which each word is a token
    work = outline_of("toy:text").work(1, 17)
    for by in ("sweep", "replay"):
        cost = ready.configured(settings | {"by": by}).cost(work)
        counted = count(model, lambda by=by: ready(model, tokens, **settings, by=by))
        assert (cost.forward, cost.backward, cost.calls) == (counted.forward, 0, counted.calls)


def test_passes_of_router_statistics() -> None:
    model, ready = ic.load(testing.tiny("qwen3_moe", mlp_only_layers=[1, 2], num_hidden_layers=3)), ic.method("router")
    cost = ready.configured({}).cost(outline_of(model.hf).work(2, 9, batch=2))
    counted = count(model, lambda: ready(model, texts(2, 9, 90)))
    assert (cost.forward, cost.calls, cost.read_out) == (counted.forward, counted.calls, 0) == (18, 1, 0)


def recipe_counts(model: ic.Model, run: Callable[[int], object], patch: pytest.MonkeyPatch) -> Any:
    """What a recipe that loads its model runs on one that is looked at, each time in a folder of its own."""
    numbers = iter(range(9))
    patch.setattr(ic, "load", lambda *_, **__: model)
    return count(model, lambda: run(next(numbers)))


@pytest.mark.parametrize("mode", ["recovery_ruler", "faithfulness_gen"])
def test_passes_of_the_attribution_evaluation(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods with rows of their own need three orders of deletion for faithfulness, the others one."""
    from interp_plugins.attribution.data.cache import load_examples
    from interp_plugins.attribution.data.tokens import example_tokens

    here = DATA / "attribution"
    model = ic.load(str(here / "models/llama"))
    settings: dict[str, Any] = {
        "datasets": "tiny_gen_ruler", "data_root": here / "traces", "model_path": str(here / "models/llama"),
        "mode": mode, "n_hops": 1, "attr_funcs": "ifr_all_positions,ft_attnlrp,attnlrp_per_token",
    }  # fmt: skip
    (example, *_), *_ = [load_examples(here / "traces/tiny_gen_ruler.jsonl")]
    tokens = example_tokens(model, example, "sound", eos=True)
    target = len(tokens.columns("target")[0])
    work = outline_of(model.hf).work(1, tokens.lengths[0], target=target)
    cost = AttributionEvalConfig(**settings).cost(work)
    counted = recipe_counts(
        model,
        lambda n: attribution_eval(AttributionEvalConfig(**settings, output_root=tmp_path / str(n))),
        monkeypatch,
    )
    assert cost is not None
    assert (cost.forward, cost.backward, cost.calls) == (counted.forward, counted.backward, counted.calls)


def test_passes_of_the_mask_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks differ: none is run once for several."""
    from interp_plugins.pairs import read_pairs

    here = DATA / "moe"
    cells = [(layer, expert) for expert in (1, 4, 6) for layer in (0, 1, 2, 3)]
    points = tmp_path / "points.json"
    points.write_text(json.dumps([{"layer": at, "router": e, "diff": 1 - i / 99} for i, (at, e) in enumerate(cells)]))
    settings: dict[str, Any] = {
        "model_path": str(here / "model"), "points": points, "pair_tokens_json": here / "pairs.json",
        "sizes": "1,5", "order": "descending,reversed", "mode": "replace,keep", "resamples": 100,
    }  # fmt: skip
    model = ic.load(str(here / "model"))
    pairs = read_pairs(here / "pairs.json", layout=None, max_samples=None, bad=None)
    lengths = {pair.tokens(side).lengths[0] for pair in pairs for side in ("agentic", "assisted")}
    masks = 1 + 2 * 2 * 2
    outline = outline_of(model.hf)
    cost = MoeMaskSweepConfig(**settings).cost(outline.work(len(pairs), max(lengths), target=2))
    counted = recipe_counts(
        model, lambda n: moe_mask_sweep(MoeMaskSweepConfig(**settings, out_dir=tmp_path / str(n))), monkeypatch
    )
    assert cost is not None and cost.calls == counted.calls == 2 * len(pairs) * masks
    whole = sum(pair.tokens(side).lengths[0] for pair in pairs for side in ("agentic", "assisted"))
    assert counted.forward == masks * model.n_layers * whole <= cost.forward
    usage = MoeMaskSweepConfig(**settings | {"order": "usage_random"}).cost(outline.work(2, 10))
    assert usage is not None and usage.calls == 2 * 2 * (1 + 2 * 5 * 2) + 2 * 2


@pytest.mark.usefixtures("rough_figures")
def test_passes_of_the_visual_study_are_no_more_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A given cliff leaves the answers' lengths and the places of tokens; what is said to be assumed costs more."""
    model = ic.load("toy:vision")
    settings: dict[str, Any] = {
        "profile": "smoke", "pilots": 2, "samples": 4, "horizon_samples": 1, "horizon_tokens": 2, "max_new_tokens": 2,
        "keep_fractions": [0.5], "truncation_layers": [0], "resamples": 100, "cliff_boundary": 3,
        "interventions": ["knockout:text", "band"],
    }  # fmt: skip
    config = VisualPhase1Config(**settings)
    # a question of the toy has 15 or 16 tokens with its answer, behind 16 of the image and one at the beginning
    unknown, work = settings | {"cliff_boundary": None}, outline_of("toy:vision").work(1, 33, target=1, visual=16)
    cost, most = config.cost(work), config.cost(replace(work, visual=0))
    more = VisualPhase1Config(**unknown).cost(work)
    counted = recipe_counts(
        model, lambda n: visual_phase1(VisualPhase1Config(**settings, out=tmp_path / str(n))), monkeypatch
    )
    assert counted.forward <= cost.forward <= 1.15 * counted.forward
    assert cost.forward < more.forward <= 1.25 * counted.forward and most.forward <= 1.6 * counted.forward
    assert "the cliff is layer 3" in cost.assumes[0] and "a cliff is found, at a layer" in more.assumes[0]
    assert "changes reach every token" in most.assumes[1]


def test_what_says_nothing_is_one_pass_per_prompt(large: dict[str, Outline]) -> None:
    assert ic.Config().cost(large["moe"].work(1, 2)) is None
    told = plan("probe", large["moe"], large["moe"].work(10, 50, batch=4), ic.Config().cost)
    assert not told.declared and (told.cost.forward, told.cost.calls) == (10 * 50 * 48, 3)


def test_costs_add_up() -> None:
    work = outline_of("toy:text").work(3, 10, batch=2, new_tokens=5)
    cost = work.forward() + work.forward(backward=2) + ic.Cost(kept=7)
    assert (cost.forward, cost.backward, cost.calls, cost.read_out, cost.kept) == (360, 360, 4, 6, 7)
    assert (work.generate().generated, work.generate().calls) == (12, 2 + 8)
    assert work.forward(0) == Cost()


def planned(
    outline: Outline, *, rate: Rate | None = None, memory: float | None = None, gpus: int = 1, **more: int
) -> Any:
    more = {"prompts": 64, "tokens": 512, "batch": 4} | more
    work = outline.work(more.pop("prompts"), more.pop("tokens"), **more)
    return plan("x", outline, work, lambda w: w.generate(), gpus=gpus, gpu_memory=memory, rate=rate)


def test_the_largest_batch_and_text_are_the_last_that_fit(large: dict[str, Outline]) -> None:
    """One more of either takes more than there is."""
    settings: dict[str, int] = {"new_tokens": 64, "batch": 16, "prompts": 10_000}
    told = planned(large["moe"], memory=80e9, **settings)
    assert told.fits and told.per_copy == 1 and told.largest_batch > 16 and told.longest_context > 512
    alone = replace(told, cost=ic.Cost(), again=lambda work: work.forward(batch=1))
    assert alone.largest_batch == MOST
    for most, name in ((told.largest_batch, "batch"), (told.longest_context, "tokens")):
        fitting, over = (
            planned(large["moe"], memory=80e9, **settings | {name: most + more}).memory.total for more in (0, 1)
        )
        assert fitting <= 80e9 < over, name
    assert planned(large["moe"], memory=10e12).longest_context == large["moe"].n_ctx
    assert planned(large["moe"]).largest_batch is None


def test_a_copy_takes_the_fewest_devices_that_hold_it(large: dict[str, Outline]) -> None:
    told = planned(large["dense"], memory=80e9, gpus=32, rate=named_rate("H100"))
    assert told.per_copy == 11 and told.copies == 2 and told.fits
    assert told.memory.total <= 80e9 and not replace(told, gpus=10).fits and replace(told, gpus=10).needed == 11
    held = 2 * large["dense"].held / 11
    assert held <= told.memory.weights <= 1.15 * held
    one = planned(large["dense"], memory=80e9, gpus=11, rate=named_rate("H100"))
    assert one.seconds == pytest.approx(2 * told.seconds)
    slow = replace(told, rate=Rate("slow", 1e12))
    assert told.shards == told.copies and slow.seconds > 3600 and slow.shards == 2 * -(-slow.seconds // 3600)
    assert replace(told, rate=Rate("slower", 1e9)).shards == told.work.prompts


def test_generation_waits_for_memory_and_prefill_for_operations(large: dict[str, Outline]) -> None:
    """A token of one text reads every weight once; of a mixture a few experts of each layer."""
    rate = named_rate("H100", 0.4)
    told = planned(large["dense"], rate=rate, prompts=1, batch=1, new_tokens=101)
    decode = told.cost.passes[1]
    assert told.weights_read > 101 * 2 * 400e9 and decode.generated
    assert told.seconds == pytest.approx((told.weights_read + told.cache_read) / rate.bandwidth)
    assert planned(large["dense"], rate=rate).seconds == pytest.approx(
        planned(large["dense"], rate=rate).forward / rate.flops
    )
    token = replace(
        planned(large["moe"], new_tokens=2, prompts=1, batch=1),
        cost=Cost((replace(decode, stop=48, columns=1, calls=1),)),
    )
    assert 6e9 < token.weights_read < 7e9  # 3.3 billion numbers at work, without embeddings


def test_windows_shorten_caches_and_generation_alone() -> None:
    hf = testing.tiny("gemma2", **SIZES, sliding_window=32)
    outline = outline_of(hf)
    assert [layer.window for layer in outline.layers] == [32, None, 32]
    once = Passes(1, 200, 0, 3)
    per_token = 2 * 2 * 16 * outline.itemsize
    assert cache(outline, once) == per_token * (200 + 2 * 32)
    full = replace(outline, layers=tuple(replace(layer, window=None) for layer in outline.layers), _kinds={})
    assert flops(outline, once) == flops(full, once)
    later = Passes(1, 8, 0, 3, calls=8, past=200, generated=True)
    assert flops(outline, later).forward < flops(full, later).forward


def invoke(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *words])


def test_the_command(tmp_path: Path) -> None:
    config = written(tmp_path, QWEN_30B_A3B)
    line = ["logit_lens", "--model", config, "--prompts", "100", "--tokens", "300", "--batch", "8", "--top_k", "3"]
    out = invoke(*line, "--gpus", "4", "--device", "A100")
    assert out.exit_code == 0, out.output
    lines = out.stdout.splitlines()
    assert len(lines) <= 25 and "30.5 B parameters" in out.stdout
    assert [line[:13].strip() for line in lines if not line.startswith(" ")] == [
        "run", "model", "prompts", "token-layers", "logits", "operations", "bytes read", "bytes kept", "a device",
        "devices", "largest batch", "longest text", "shards", "time",
    ]  # fmt: skip
    data = json.loads(invoke(*line, "--gpus", "4", "--device", "A100", "--json").stdout)
    assert data["declares_its_cost"] and data["token_layers"] == {"forward": 100 * 300 * 48, "backward": 0}
    assert data["devices"]["fits"] and data["read_out"] == 50 * 300 * 100 and data["seconds"] > 0
    said = invoke("probe", "--model", config, "--flops-per-second", "1e12", "--gpu-memory", "16GB")
    assert "probe does not say what it runs: priced as one forward pass per prompt" in said.stdout
    assert "DOES NOT FIT on 1 of 16 GB; 4 of them would do" in said.stdout
    visual = ["visual_phase1", "--model", "toy:vision", "--tokens", "33", "--target", "1", "--visual", "16"]
    assumed = " ".join(invoke(*visual, "--gpu-memory", "1GB").stdout.split())
    assert "assumes 20 pilots and 100 samples" in assumed and "assumes answers have 16 tokens" in assumed
    measured = invoke("logit_lens", "--measured", "toy:text", "--tokens", "64")
    assert measured.exit_code == 0 and "measured with toy:text on this machine" in measured.stdout


def test_mistakes_are_answered_before_anything_is_built(tmp_path: Path) -> None:
    config, other = written(tmp_path, LLAMA_405B), tmp_path / "other.json"
    other.write_text(json.dumps({"model_type": "no_such_family"}))
    gpt2 = str(tmp_path / "gpt2")
    testing.tiny("gpt2").config.save_pretrained(gpt2)
    seq = tmp_path / "seq.json"
    seq.write_text(json.dumps({"model_type": "clip_vision_model"}))
    for words, said in {
        ("logit_lenz",): "Did you mean 'logit_lens'",
        ("logit_lens", "--topk", "3"): "has no setting 'topk'. Did you mean 'top_k'",
        ("logit_lens", "--model", str(tmp_path / "none.json")): "there is no file",
        ("logit_lens", "--model", str(tmp_path / "none")): "there is no folder",
        ("logit_lens", "--model", str(other)): "no_such_family",
        ("logit_lens", "--model", str(seq)): "give the config of a causal language model",
        ("logit_lens", "--model", config, "--gpu-memory", "4GB"): "does not hold the weights of layer 0",
        ("logit_lens", "--gpu-memory", "much"): "a number of bytes, as 80GB or 40GiB",
        ("logit_lens", "--tokens", "0"): "tokens of a plan takes a number from 1",
        ("logit_lens", "--tokens", "257"): "which takes 256; give fewer --tokens",
        ("ifr", "--tokens", "8", "--target", "8"): "a prompt of a token at least comes before it",
        ("logit_lens", "--gpus", "0"): "gpus is 0: give 1 at least",
        ("logit_lens", "--tp", "0"): "tp is 0: give 1 at least",
        ("logit_lens", "--tp", "2"): "2 processes share the model, each on a device, and gpus is 1: give 2",
        ("logit_lens", "--model", config, "--tp", "3", "--gpus", "3"): "3 processes cannot share 128 heads",
        ("logit_lens", "--model", gpt2, "--tp", "2"): "transformers has no plan to share",
        ("visual_phase1", "--tokens", "9", "--visual", "9"): "the image has 9 tokens of 9",
        ("logit_lens", "--device", "H1000"): "no device 'H1000' is in the table. Did you mean 'H100'",
        ("logit_lens", "--device", "H100", "--utilisation", "40"): "give a share of the peak",
        ("logit_lens", "--utilisation", ".4"): "it goes with --device",
        ("logit_lens", "--device", "H100", "--measured", "toy:text"): "both say how fast a device is",
        ("logit_lens", "--flops-per-second", "0"): "give a finite number above 0",
        ("logit_lens", "--dtype", "bfloat"): "Did you mean 'bfloat16'",
        ("logit_lens", "--attention", "flash"): "a plan knows no attention 'flash'",
        ("moe_mask_sweep",): "setting points is missing",
    }.items():
        out = invoke(*words)
        assert isinstance(out.exception, ic.InterpError), (words, out.output, out.exception)
        assert said in str(out.exception), (words, str(out.exception))
