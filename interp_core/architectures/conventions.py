"""Module paths of models that neither TransformerLens nor a family file describes, by what modules are usually called.

Names propose, and the self-check at load disposes: what is found by them must hold its equations as any site must.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

NAMES = {
    "attn": "self_attn self_attention attention attn multi_head_attention",
    "linear_attn": "linear_attn",
    "attn.q": "q_proj query Wq",
    "attn.k": "k_proj key Wk",
    "attn.v": "v_proj value Wv",
    "attn.qkv": "qkv_proj query_key_value Wqkv qkv c_attn",
    "attn.q_norm": "q_norm q_layernorm",
    "attn.k_norm": "k_norm k_layernorm",
    "attn.o": "o_proj.linear o_proj out_proj dense c_proj",
    "mlp": "mlp feed_forward ffn mlp_block",
    "mlp.in": "up_proj fc1 dense_h_to_4h w3 fc_in c_fc",
    "mlp.gate": "gate_proj w1",
    "mlp.out": "down_proj fc2 dense_4h_to_h w2 fc_out c_proj",
    "ln1": "input_layernorm attention_layernorm ln_1 layer_norm1 norm1 norm_1 operator_norm temporal_pre_norm",
}
"""Components of a block, and what their modules are called, the commonest name first."""
BEFORE_MLP = (
    "pre_feedforward_layernorm pre_mlp_layernorm pre_ff_layernorm feedforward_layernorm ln_2 ln2 layer_norm2 norm2 "
    "norm_2 ffn_norm channel_pre_norm"
)
"""Norms that the MLP reads and nothing else can be."""
BEHIND_ATTENTION = "post_self_attn_layernorm post_operator_norm"
BEHIND_MLP = "post_feedforward_layernorm post_mlp_layernorm post_ffn_norm"
"""Norms of what attention and MLP give."""
BETWEEN = "post_attention_layernorm"
"""Norms what attention gives where other norms show that blocks have such, else what the MLP reads."""


def discover(
    modules: Mapping[str, nn.Module], embedding: nn.Module | None = None, *, described: bool = False
) -> dict[str, str]:
    """Paths of a model's components, as a family file would have them: its blocks are the longest list with attention,
    of those beside the token embedding if there are such (a vision tower has blocks too).

    Args:
        described: a family file says whether blocks are parallel.
    """
    lists = [(path, m) for path, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    home = next((path.rpartition(".")[0] for path, m in modules.items() if m is embedding), "")
    for path, blocks in sorted(lists, key=lambda item: (item[0].rpartition(".")[0] != home, -len(item[1]))):
        inside = [f"{path}.{i}." for i in range(len(blocks))]
        names = {name.removeprefix(block) for block in inside for name in modules if name.startswith(block)}
        parts = _parts(names)
        if "attn" in parts:
            norms = {"ln2", "ln2_post"} & parts.keys()
            parallel = {} if described or norms or "mlp" not in parts else {"parallel": ""}
            return {"blocks": path, **{f"blocks.{k}": v for k, v in parts.items()}, **parallel, **_ends(modules, path)}
    return {}


def _parts(names: set[str]) -> dict[str, str]:
    """Components of blocks, of the names of all modules in them; those of attention and MLP lie in these."""
    parts: dict[str, str] = {}
    for component, called in NAMES.items():
        outer = parts.get(component.rpartition(".")[0])
        if outer or "." not in component:
            prefix = f"{outer}." if outer else ""
            if name := _first(called, (n.removeprefix(prefix) for n in names if n.startswith(prefix))):
                parts[component] = name
    return parts | _norms(names)


def _norms(names: set[str]) -> dict[str, str]:
    before, behind = _first(BEFORE_MLP, names), _first(BEHIND_ATTENTION, names)
    last = _first(BEHIND_MLP, names)
    if BETWEEN in names and behind is None and (before or last):
        behind = BETWEEN
    elif BETWEEN in names and before is None:
        before = BETWEEN
    norms = {"ln1_post": behind, "ln2": before, "ln2_post": last}
    return {component: name for component, name in norms.items() if name}


def _first(called: str, names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in called.split() if name in there), None)


def _ends(modules: Mapping[str, nn.Module], blocks: str) -> dict[str, str]:
    parent = blocks.rpartition(".")[0]
    ends: dict[str, str] = {}
    last: list[str] = []
    for path, module in modules.items():
        outer, _, name = path.rpartition(".")
        if outer == parent and isinstance(module, nn.Embedding) and "pos" not in name:
            ends.setdefault("embed", path)
        if outer == parent and ("norm" in name.lower() or name in ("ln_f", "ln_out")):
            last.append(path)
    if last:
        plain = f"{parent}.norm".removeprefix(".")
        ends["ln_final"] = plain if plain in last else last[-1]
    return ends
