"""How well a model predicts a text that two contexts share, layer by layer: NLL, logit lens, and how far they differ.

    interp run moe_nll --model_path M --pair_tokens_json pair_tokens.json --out_dir O --js_mode exact
        [--hidden_states_dir H] [--device cuda] [--dtype bfloat16] [--chunk_size 1024] [--max_tokens 100]

writes, as the published analysis does, into the tree O:

    figures/nll_core/nll_{all,last}_agentic_vs_assisted.png, delta_nll_{all,last}.png
    figures/nll_core/logitlens_{all,last}_agentic_vs_assisted.png, delta_logitlens_{all,last}.png   minus the NLL
    figures/nll_core/js_{all,last}.png                                      unless --js_mode none
    figures/nll_core/{rank,entropy,top1}_{all,last}.png, delta_nll_progress.png                     ours
    tables/nll_core_layer_metrics.csv, nll_core_matrices.npz, nll_core_summary.json
    tables/nll_core_samples/*.safetensors                                   ours: every sample's numbers
    nll_core.html                                                           ours: the page

The run's record lies beside the tree; the same command goes on where it was stopped. Without --hidden_states_dir the
lens is worked out in the models' own passes; with it, streams are read from files (ours or the published `.pt`).
Source: Geuan666/XAI4Agent, `analyze_nll_core.py`; where its numbers were wrong, docs/methods/logit_lens.md says how.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from interp_plugins.logit_lens.aligned import PairScores, States, pair_states, score_pairs
from interp_plugins.logit_lens.curves import scores_of, tensors_of
from interp_plugins.logit_lens.origin_states import read_origin
from interp_plugins.logit_lens.states import StateStore, state_file
from interp_plugins.logit_lens.tiles import ROWS
from interp_plugins.pairs import Pair, read_pairs
from safetensors.torch import load_file

import interp_core as ic
from interp_core import runs

from .moe_nll_report import Kind, Settings, files_of, write_all

SAMPLES = "tables/nll_core_samples"
Mode = Literal["none", "exact", "topk_rest", "topk_renorm", "topk"]
Dropped = list[dict[str, str]]


def moe_nll(
    model_path: str,
    pair_tokens_json: Path,
    hidden_states_dir: Path | None = None,
    out_dir: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    chunk_size: int = ROWS,
    js_mode: Mode = "exact",
    js_topk: int = 512,
    max_tokens: int | None = None,
    max_samples: int | None = None,
    layout: Literal["packed", "padded"] | None = None,
    save_hidden_states: Path | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Score the shared targets of pairs layer by layer; returns the page.

    Args:
        model_path: a folder, a hub id, or toy:text.
        pair_tokens_json: pairs with aligned targets.
        hidden_states_dir: streams that were written before: by --save_hidden_states, or `{sample}.pt` of the published
            pipeline.
        out_dir: the tree for figures and tables (None: a run folder below results/).
        device, dtype: of the model.
        chunk_size: rows of the stream that go through the unembedding together.
        js_mode: how far the two contexts' distributions are apart: exact; topk_rest (a lower bound, with its upper
            one); topk_renorm (as the published code's topk, a bound of nothing; topk is the same); none.
        js_topk: likeliest tokens of either side that the topk modes look at.
        max_tokens: the first so many targets of every sample.
        max_samples: the first so many samples.
        layout: of the assisted context: packed, padded, or as the file has it; the published `.pt` are padded.
        save_hidden_states: write the streams there, for --hidden_states_dir.
        strict: the first sample that cannot be used ends the run; else it is listed and left out.
        overwrite: replace files that another run wrote there.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
    """
    _check(hidden_states_dir, save_hidden_states, chunk_size, js_topk, max_tokens)
    mode: Kind = "topk_renorm" if js_mode == "topk" else js_mode
    kind = None if hidden_states_dir is None else _kind(hidden_states_dir)
    layout = "padded" if kind == "pt" and layout is None else layout
    dropped: Dropped = []
    pairs = read_pairs(
        pair_tokens_json, layout=layout, max_samples=max_samples, bad=None if strict else _noting(dropped)
    )
    if not pairs:
        raise ic.LoadError(f"{pair_tokens_json} holds no sample that can be used; {_first(dropped)}")
    model = ic.load(model_path, dtype=dtype, device=device)
    settings = Settings(mode, js_topk if mode.startswith("topk") else None, max_tokens, kind or "forward")
    with _opened(out_dir, settings, pairs, model, overwrite) as run:
        run.claim([*(_file(pair.name) for pair in pairs), *files_of(settings)])  # before any work
        if save_hidden_states is not None:
            StateStore(save_hidden_states, model).claim(pairs)
        _score(run, model, pairs, settings, hidden_states_dir, save_hidden_states, chunk_size, strict, dropped)
        kept = _kept(run, pairs, dropped)
        about = {"model_path": model_path, "pair_tokens_json": str(pair_tokens_json), "dtype": str(model.dtype)}
        return write_all(run, model, pairs, kept, settings, dropped, about)


def _kept(run: runs.RunFolder, pairs: Sequence[Pair], dropped: Dropped) -> list[PairScores]:
    """The scores of all samples that were not left out.

    Raises:
        LoadError: there are none.
    """
    left_out = {row["sample"] for row in dropped}
    names = [pair.name for pair in pairs if pair.name not in left_out]
    if not names:
        raise ic.LoadError(f"no sample could be scored; {_first(dropped)}")
    return [scores_of(name, load_file(run.path / _file(name))) for name in names]


def _score(
    run: runs.RunFolder, model: ic.Model, pairs: Sequence[Pair], settings: Settings, states: Path | None,
    save: Path | None, rows: int, strict: bool, dropped: Dropped,
) -> None:  # fmt: skip
    """Score the samples that are not scored yet, and keep each as it comes."""
    todo = [pair for pair in pairs if save is not None or not run.kept(_file(pair.name))]
    drawn = _told(_drawn(model, todo, states, save, settings.max_tokens, strict, dropped), len(todo))
    for scores in score_pairs(model, drawn, settings.js_mode, top=settings.js_topk or 0, rows=rows):
        run.put({_file(scores.sample): runs.safetensors_bytes(tensors_of(scores))})


def _drawn(
    model: ic.Model, pairs: Sequence[Pair], states: Path | None, save: Path | None, max_tokens: int | None,
    strict: bool, dropped: Dropped,
) -> Iterator[tuple[States, States]]:  # fmt: skip
    """Both contexts of each pair, by a forward pass or from files; one that cannot be used is noted and left out."""
    store = None if states is None else StateStore(states, model)
    kept = None if save is None else StateStore(save, model)
    for pair in pairs:
        try:
            if store is None:
                found = pair_states(model, pair, max_tokens if kept is None else None)
            elif state_file(store.folder, pair.name, "agentic").is_file():
                found = store.pair(pair)
            else:
                found = read_origin(store.folder / f"{runs.safe_name(pair.name)}.pt", model, pair)
            if kept is not None:
                kept.write(found)
        except ic.InterpError as error:
            if strict:
                raise
            _noting(dropped)(pair.name, error)
            continue
        yield found[0].take(max_tokens), found[1].take(max_tokens)


def _told(drawn: Iterator[tuple[States, States]], count: int) -> Iterator[tuple[States, States]]:
    """The same, each said as it comes."""
    for number, (agentic, assisted) in enumerate(drawn, 1):
        print(f"  {agentic.sample}: {len(agentic.ids)} targets ({number} of {count})", file=sys.stderr, flush=True)
        yield agentic, assisted


def _file(sample: str) -> str:
    return f"{SAMPLES}/{runs.safe_name(sample)}.safetensors"


@contextlib.contextmanager
def _opened(
    out: Path | None, settings: Settings, pairs: Sequence[Pair], model: ic.Model, overwrite: bool
) -> Iterator[runs.RunFolder]:
    """The run's folder: a tree that other recipes write into too, or one of its own."""
    record = {**vars(settings), "pairs": runs.digest([pair.record() for pair in pairs])}
    if out is None:
        run = runs.open(None, record, recipe="moe_nll", model=model, dataset="pairs", say=_quiet)
    else:
        run = runs.publish(out, record, recipe="moe_nll", model=model, dataset="pairs", overwrite=overwrite, say=_quiet)
    with run:
        yield run


def _quiet(line: str) -> None:
    """Samples are told by themselves."""


def _noting(dropped: Dropped) -> Any:
    """What notes and says that a sample is left out."""

    def bad(name: str, error: ic.InterpError) -> None:
        print(f"  dropped {name}: {error}", file=sys.stderr)
        dropped.append({"sample": name, "reason": str(error)})

    return bad


def _first(dropped: Dropped) -> str:
    return f"the first: {dropped[0]['sample']}: {dropped[0]['reason']}" if dropped else "it is empty"


def _kind(folder: Path) -> Literal["store", "pt"]:
    """Whose files a folder of hidden states holds.

    Raises:
        LoadError: none, or of both.
    """
    if not folder.is_dir():
        raise ic.LoadError(f"hidden_states_dir: there is no folder {folder}; leave it out to work the states out")
    kinds = [kind for kind, ending in (("store", "*.safetensors"), ("pt", "*.pt")) if any(folder.glob(ending))]
    if len(kinds) != 1:
        what = "both .safetensors and .pt files" if kinds else "neither .safetensors nor .pt files"
        raise ic.LoadError(f"hidden_states_dir: {folder} holds {what}; give a folder with one kind, or leave it out")
    return "store" if kinds[0] == "store" else "pt"


def _check(states: Path | None, save: Path | None, chunk_size: int, js_topk: int, max_tokens: int | None) -> None:
    if states is not None and save is not None:
        raise ic.PlanError("hidden states are read or written: give --hidden_states_dir or --save_hidden_states")
    for name, value in (("chunk_size", chunk_size), ("js_topk", js_topk), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ic.PlanError(f"{name} is {value}: give at least 1")
