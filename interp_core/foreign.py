"""What other libraries call the things of this one: the one table from which unknown names are answered.

It is asked when a name is not there: an attribute of a model, of a run or of the package, or a site. Another library's
name for something is answered with ours and how it is written; any other name with the nearest of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .errors import SiteError, nearest

SITES: dict[str, str] = {
    # TransformerLens, without `hook_` and `attn.`, except where that changes what is meant
    "attn_scores": "scores", "result": "head_out", "post": "mlp_act", "mlp_post": "mlp_act",
    "hook_attn_in": "resid_pre", "hook_mlp_in": "resid_mid", "ln1.normalized": "attn_in", "ln2.normalized": "mlp_in",
    "ln_final.normalized": "final_norm", "ln1": "attn_in", "ln2": "mlp_in", "ln_final": "final_norm",
    "unembed": "logits",
    # nnterp
    "layers_input": "resid_pre", "layers_output": "resid_post", "attentions_input": "attn_in",
    "attentions_output": "attn_out", "mlps_input": "mlp_in", "mlps_output": "mlp_out", "token_embeddings": "embed",
    "attention_probabilities": "pattern", "router_probabilities": "router_probs", "routers_output": "router_logits",
    # pyvene
    "block_input": "resid_pre", "block_output": "resid_post", "attention_input": "attn_in",
    "attention_output": "attn_out", "attention_value_output": "z", "head_attention_value_output": "z",
    "attention_weight": "pattern", "mlp_input": "mlp_in", "mlp_output": "mlp_out", "mlp_activation": "mlp_act",
    "query_output": "q", "head_query_output": "q", "key_output": "k", "head_key_output": "k",
    "value_output": "v", "head_value_output": "v", "query": "q", "key": "k", "value": "v", "queries": "q", "keys": "k",
    "values": "v", "residual": "resid_post",
    # modules and outputs of transformers, and so of nnsight
    "hidden_states": "resid_post", "last_hidden_state": "final_norm", "attentions": "pattern",
    "self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out", "mlp": "mlp_out", "q_proj": "q",
    "k_proj": "k", "v_proj": "v", "o_proj": "attn_out", "down_proj": "mlp_out", "embed_tokens": "embed",
    "wte": "embed", "lm_head": "logits", "ln_f": "final_norm", "input_layernorm": "attn_in",
    "post_attention_layernorm": "mlp_in",
}  # fmt: skip
"""What others call our sites."""

ABSENT: dict[str, str] = {
    **dict.fromkeys(("pre", "pre_linear"), "S.mlp_in is what the MLP reads, S.mlp_act what it has before its output"),
    "scale": "S.resid_pre and S.resid_mid go into a block's norms, S.attn_in and S.mlp_in come out",
    "pos_embed": "S.embed is the token embedding alone, S.resid_pre[0] has the positions' added",
}
"""What of TransformerLens' is no site, and which are near it."""

_RUN = "model.run(text, read=[S.resid_post, S.z[3]]), and run[S.z[3]] of what that returns"
_EDIT = "model.run(text, edits=[S.z[3, 5].zero()]); a function of yours is S.z[3].apply(fn), for this one run"
_SIZES = "model.n_layers, .d_model, .n_heads, .d_head, .d_mlp and .d_vocab; model.hf.config has the rest"
_MODULES = "model.module('mlp', 3), or model.hf for all of them; what they compute are sites, such as S.mlp_out[3]"
_HF = "model.hf, the transformers model; device and dtype are chosen by ic.load(…, device='cuda', dtype='bfloat16')"
_LOGITS = "model.run(text).logits"

MODEL: dict[str, str] = {
    **dict.fromkeys(("run_with_cache", "get_caching_hooks", "cache", "cache_all", "cache_some"), _RUN),
    **dict.fromkeys(("trace", "session", "scan", "invoke"), f"{_RUN}; ic.load(…, engine='nnsight') runs it there"),
    **dict.fromkeys(
        ("run_with_hooks", "hooks", "add_hook", "add_perma_hook", "reset_hooks", "hook_points", "hook_dict", "mod_dict",
         "edit", "intervene", "intervention", "steering", "register_forward_hook"), _EDIT),
    **dict.fromkeys(("forward", "logits", "__call__"), _LOGITS),
    "loss": "ic.score.nll(tokens)(run), with tokens = model.tokens(prompt, target=answer)",
    "next_token_probs": f"{_LOGITS}.at(-1).softmax(-1)",
    "project_on_vocab": "model.readout(resid), or ic.method('logit_lens')(model, text)",
    "unembed_norm": "model.readout(resid), the final norm and the unembedding",
    "steer": "model.run(text, edits=S.resid_post[3].add(vector)), and model.generate the same way",
    **dict.fromkeys(("skip_layer", "skip_layers"), "edits=[S.attn_out[3].zero(), S.mlp_out[3].zero()]"),
    "to_tokens": "model.tokens(text), whose .ids are [batch pos]",
    "to_str_tokens": "model.tokens(text).labels",
    "to_string": "model.word(token), or model.tokenizer.decode(ids)",
    "to_single_str_token": "model.word(token)",
    "to_single_token": "the word itself, ic.score.logprob(' Paris'); its id is model.tokens(' Paris', bos=False).ids",
    "get_token_position": "model.tokens(text).find('Paris')",
    "input_ids": "model.tokens(text).ids",
    **dict.fromkeys(("cfg", "config"), _SIZES),
    **dict.fromkeys(("num_layers", "num_hidden_layers"), "model.n_layers"),
    "hidden_size": "model.d_model",
    **dict.fromkeys(("num_heads", "num_attention_heads"), "model.n_heads"),
    **dict.fromkeys(("vocab_size", "d_vocab_out"), "model.d_vocab"),
    "intermediate_size": "model.d_mlp",
    "W_E": "model.weights(S.embed), [d_vocab d_model]",
    "W_U": "model.weights(S.logits), [d_model d_vocab]",
    "b_U": "model.bias(S.logits)",
    "W_O": "model.weights(S.z), [layer head d_head d_model]; S.z[3, 5] for a head",
    "b_O": "model.bias(S.z)",
    "W_out": "model.weights(S.mlp_act), [layer d_mlp d_model]",
    "b_out": "model.bias(S.mlp_act)",
    **{f"W_{name.upper()}": f"model.weights(S.{name}), [layer head d_model d_head]" for name in "qkv"},
    **{f"b_{name.upper()}": f"model.bias(S.{name})" for name in "qkv"},
    **dict.fromkeys(("W_in", "W_gate", "b_in"), "model.module('mlp.in', 3) and ('mlp.gate', 3), and their weights"),
    "W_pos": "model.module('pos_embed')",
    **dict.fromkeys(("OV", "QK"), "model.weights(S.v[3]) @ model.weights(S.z[3]), and so on: plain tensors"),
    "accumulated_bias": "model.bias(S.z[3]) and model.bias(S.mlp_act[3]), added up",
    "lm_head": "model.unembed(normed), or S.logits",
    **dict.fromkeys(("blocks", "h", "model", "transformer", "gpt_neox", "modules", "named_modules", "ln_final", "norm",
                     "embed_tokens", "pos_embed"), _MODULES),
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "bfloat16", "eval", "train", "parameters", "state_dict",
                     "named_parameters", "requires_grad_", "save_pretrained", "push_to_hub", "compile_model"), _HF),
    **dict.fromkeys(("from_pretrained", "from_pretrained_no_processing", "boot_transformers"), "ic.load('gpt2')"),
}  # fmt: skip
RUN: dict[str, str] = {
    **dict.fromkeys(("cache", "cache_dict", "activations", "interventions"),
                    "run[S.z[3]]; run.to_cache() is TransformerLens' cache"),
    **dict.fromkeys(("accumulated_resid", "decompose_resid", "logit_attrs", "stack_activation", "stack_head_results",
                     "stack_neuron_results", "get_full_resid_decomposition", "apply_ln_to_stack"),
                    "run.to_cache(), a TransformerLens cache that has it"),
    "keys": "list(run), the sites that were read",
    **dict.fromkeys(("items", "values"), "{site: run[site] for site in run}"),
    **dict.fromkeys(("output", "prediction_logits", "predictions"), "run.logits"),
    "loss": "ic.score.nll(tokens)(run), or ic.score.logprob(' Paris')(run)",
    **dict.fromkeys(("gradients", "gradient", "backward"),
                    "run.grad[site], of a run with grad=lambda logits: a number"),
    "past_key_values": "run.model.generate(text), which keeps one; runs keep none",
    **dict.fromkeys(("text", "texts"), "run.tokens.texts"),
    **dict.fromkeys(("ids", "input_ids"), "run.tokens.ids"),
    "edits": "run.plan.edits",
    "reads": "run.plan.reads",
    "top": "run.logits.at(-1).topk(5)",
}  # fmt: skip
GENERATION: dict[str, str] = {
    **dict.fromkeys(("text", "decoded"), "generation.texts, one per row"),
    **dict.fromkeys(("sequences", "output", "input_ids"), "generation.tokens.ids; without the prompt .ids"),
    **dict.fromkeys(("logits", "scores", "hidden_states", "attentions", "cache", "past_key_values"),
                    "model.generate(text, read=[S.logits, …]), and step[site] for step in generation.steps"),
}  # fmt: skip
SITE: dict[str, str] = {
    **dict.fromkeys(("ablate", "zero_", "zero_ablate", "knock_out"), ".zero(), or .set(mean) for a mean ablation"),
    **dict.fromkeys(("patch", "replace", "interchange", "output", "value", "copy_", "fill_"), ".set(tensor)"),
    **dict.fromkeys(("steer", "inject", "add_", "subtract", "sub"), ".add(tensor)"),
    **dict.fromkeys(("mul", "multiply", "mul_"), ".scale(number)"),
    **dict.fromkeys(("hook", "map", "clamp", "register_forward_hook", "add_hook"), ".apply(fn)"),
    **dict.fromkeys(("read", "cache"), "model.run(text, read=site), and run[site]"),
    **dict.fromkeys(("block", "cut"), ".knockout(query=…, key=…) of S.pattern"),
}  # fmt: skip
RESULT: dict[str, tuple[str, ...]] = {
    # pandas, arrays and files, whatever the result
    **dict.fromkeys(("to_pandas", "to_df", "df", "dataframe", "effects_df", "frame"), ("to_dataframe()",)),
    **dict.fromkeys(("rows", "records", "to_dict", "as_dict", "asdict"), ("table()",)),
    **dict.fromkeys(("to_csv", "to_parquet", "to_excel"), ("to_dataframe(), a pandas.DataFrame that has it",)),
    **dict.fromkeys(("savefig", "to_png", "save_png", "write_image", "to_pdf", "to_svg"), ("png(path)",)),
    **dict.fromkeys(("imshow", "heatmap", "plot_heatmap", "visualize", "visualise", "draw", "fig", "figure"),
                    ("plot(), axes of matplotlib; png(path) writes a file",)),
    **dict.fromkeys(("display", "print", "summary", "describe"), ("show()",)),
    **dict.fromkeys(("save_html", "write_html", "to_page", "page"), ("to_html(path)",)),
    **dict.fromkeys(("to_disk", "save_pretrained", "dump", "to_json", "to_safetensors"), ("save(folder)",)),
    **dict.fromkeys(("from_disk", "from_pretrained"), ("load(folder)",)),
    **dict.fromkeys(("metadata", "meta", "info", "config", "settings"), ("provenance, a mapping",)),
    # lenses: tuned-lens, nnterp, TransformerLens
    **dict.fromkeys(("probs", "probabilities", "probability"), ("target_logprob.exp()", "per_text('prob')")),
    **dict.fromkeys(("logits", "log_probs", "logprobs", "logprob"), ("target_logprob",)),
    **dict.fromkeys(("rank", "ranks"), ("target_rank",)),
    **dict.fromkeys(("kl_divergence", "forward_kl"), ("kl",)),
    **dict.fromkeys(("predictions", "top_tokens", "top_words"), ("tops()", "answers()")),
    # patching, attribution and sweeps: TransformerLens, captum, inseq
    **dict.fromkeys(("effects", "results", "patching_result", "patched", "scores", "attributions"),
                    ("effects", "effect", "scores", "parts", "values", "loss")),
    **dict.fromkeys(("word_attributions", "target_attributions", "token_scores", "saliency"), ("scores",)),
    **dict.fromkeys(("head_effects", "per_head_results"), ("heads",)),
    **dict.fromkeys(("str_tokens", "token_strs", "words"), ("tokens", "labels")),
    **dict.fromkeys(("best", "argmax", "largest", "nlargest"), ("top()",)),
    **dict.fromkeys(("baseline", "clean_score", "base"), ("clean", "base")),
    **dict.fromkeys(("steering_vector", "direction"), ("vector(layer)", "function_vector")),
}  # fmt: skip
"""What others call what results have: ways that begin with names of ours. A result answers with those that it has."""
PACKAGE = dict.fromkeys(
    ("HookedTransformer", "HookedRootModule", "TransformerBridge", "LanguageModel", "NNsight", "VisionLanguageModel",
     "StandardizedTransformer", "IntervenableModel", "load_model", "from_pretrained"), "ic.load('gpt2')"
) | {
    "ActivationCache": "run.to_cache()", "IntervenableConfig": "edits of a run: S.z[3, 5].set(tensor)",
    "hook": "S.z[3].apply(fn), an edit", "generate": "model.generate(text)",
    "tokens": "model.tokens(text)",
    "S": "from interp_core import sites as S",
}  # fmt: skip

_NAME = re.compile(r"\w+")
_LAYER = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:blocks|layers|h)\.(-?\d+)(?:\.(.+))?")


def ours(name: str, known: Iterable[str]) -> str:
    """How a site is written here that another library calls so, such as `S.z[2]`; "" for a name that none has.

    Args:
        known: names of our sites.
    """
    within = _LAYER.fullmatch(name)
    layer, rest = (f"[{within[1]}]", within[2] or "block_output") if within else ("", name)
    parts = [part for part in rest.split(".") if part]
    bare = [part.removeprefix("hook_") for part in parts]
    sites = {site: site for site in known if site != name} | SITES
    for short in (*parts[-1:], ".".join(bare), *bare[-1:]):
        if short in sites:
            return f"S.{sites[short]}{layer}"
    return ""


def no_site(name: object, known: Iterable[str]) -> str:
    """The message for a site that there is not."""
    ordered = sorted(known, key=lambda site: site.startswith("vision_"))
    if isinstance(name, str) and (site := ours(name, ordered)):
        return f"no site is called {name!r}, here it is {site}"
    if isinstance(name, str) and name in MODEL:
        return f"no site is called {name!r}, write {MODEL[name]}"
    if isinstance(name, str) and (near := ABSENT.get(name.rpartition(".")[2].removeprefix("hook_"))):
        return f"no site is called {name!r}, nor is there one for it: {near}"
    return f"no site is called {name!r}. {nearest(name, ordered)}"


class Abroad(NamedTuple):
    """What is said of names that a thing does not have.

    Attributes:
        what: the thing, with its article.
        names: others' names for what it has.
        read: how a site of it is read, with `{}` for the site.
        sites: all sites.
        own: others' names for what only some such things have: ways that begin with the name that they must have.
    """

    what: str
    names: Mapping[str, str] = MappingProxyType({})
    read: str = ""
    sites: Mapping[str, object] = MappingProxyType({})
    own: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def lacks(self, name: str, public: Iterable[str]) -> str:
        """The message for an attribute that there is not; `public` are those that there are."""
        site = f"S.{name}" if name in self.sites else ours(name, self.sites) if self.read else ""
        known = list(public)
        ways = [f"result.{way}" for way in self.own.get(name, ()) if _NAME.match(way)[0] in known]  # type: ignore[index]
        written = self.names.get(name) or (site and self.read.format(site)) or " or ".join(ways)
        if written:
            return f"{self.what} has no {name!r}, write {written}"
        return f"{self.what} has no {name!r}. {nearest(name, known)}"


class Answering:
    """A thing that says of another library's name for something what it is called here, and lists public names only."""

    __slots__ = ()
    _abroad: ClassVar[Abroad]
    _inner: ClassVar[frozenset[str]] = frozenset()

    if not TYPE_CHECKING:  # type checkers go on to refuse names that there are not

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if hasattr(type(self), name):  # a property that raised one of its own
                return object.__getattribute__(self, name)
            raise AttributeError(self._abroad.lacks(name, self._public()))

    def _public(self) -> list[str]:
        """Its names, those first that are the likeliest to be meant."""
        return dir(self)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_") and name not in self._inner]


class UnknownSiteError(SiteError, AttributeError):
    """`S.reisd_post`: a SiteError, as which it is shown and sent to other processes, and what `hasattr` expects."""

    __module__, __qualname__ = SiteError.__module__, SiteError.__qualname__

    def __reduce__(self) -> tuple[type[SiteError], tuple[object, ...]]:
        return SiteError, self.args
