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

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interp_plugins.logit_lens.aligned import PairScores, States, pair_states, score_pairs
from interp_plugins.logit_lens.curves import scores_of, tensors_of
from interp_plugins.logit_lens.origin_states import read_origin
from interp_plugins.logit_lens.states import StateStore, state_file
from interp_plugins.pairs import Pair
from safetensors.torch import load_file

import interp_core as ic
from interp_core import runs

from .config import MoeNllConfig, Settings
from .report import files_of, write_all

SAMPLES = "tables/nll_core_samples"
Dropped = list[dict[str, str]]


def moe_nll(config: MoeNllConfig) -> Path:
    """Score the shared targets of pairs layer by layer; returns the page.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
    """
    settings = config.settings()
    layout = "padded" if settings.states == "pt" and config.layout is None else config.layout
    pairs, dropped = config.read(config.pair_tokens_json, layout)
    model = config.load()
    about: dict[str, Any] = {"recipe": "moe_nll", "model": model, "dataset": "pairs", "say": lambda line: None}
    with config.open(vars(settings), pairs, **about) as run:
        run.claim([*(_file(pair.name) for pair in pairs), *files_of(settings)])  # before any work
        if config.save_hidden_states is not None:
            StateStore(config.save_hidden_states, model).claim(pairs)
        _score(run, model, pairs, settings, config, dropped)
        kept = _kept(run, pairs, dropped)
        inputs = {"model_path": config.model_path, "pair_tokens_json": str(config.pair_tokens_json)}
        return write_all(run, model, pairs, kept, settings, dropped, inputs | {"dtype": str(model.dtype)})


def _kept(run: runs.RunFolder, pairs: Sequence[Pair], dropped: Dropped) -> list[PairScores]:
    """The scores of all samples that were not left out.

    Raises:
        LoadError: there are none.
    """
    left_out = {row["sample"] for row in dropped}
    names = [pair.name for pair in pairs if pair.name not in left_out]
    if not names:
        raise ic.LoadError(f"no sample could be scored; the first: {dropped[0]['sample']}: {dropped[0]['reason']}")
    return [scores_of(name, load_file(run.path / _file(name))) for name in names]


def _score(
    run: runs.RunFolder, model: ic.Model, pairs: Sequence[Pair], settings: Settings, config: MoeNllConfig,
    dropped: Dropped,
) -> None:  # fmt: skip
    """Score the samples that are not scored yet, and keep each as it comes."""
    # streams that are to be written are worked out anew: scores that are kept do not tell whether the files are there
    again = config.save_hidden_states is not None
    todo = [pair for pair in pairs if again or not run.kept(_file(pair.name))]
    drawn = _told(_drawn(model, todo, config, dropped), len(todo))
    for scores in score_pairs(model, drawn, settings.js_mode, top=settings.js_topk or 0, rows=config.chunk_size):
        run.put({_file(scores.sample): runs.safetensors_bytes(tensors_of(scores))})


def _drawn(
    model: ic.Model, pairs: Sequence[Pair], config: MoeNllConfig, dropped: Dropped
) -> Iterator[tuple[States, States]]:
    """Both contexts of each pair, by a forward pass or from files; one that cannot be used is noted and left out."""
    states, save, most = config.hidden_states_dir, config.save_hidden_states, config.max_tokens
    source = None if states is None else StateStore(states, model)
    target = None if save is None else StateStore(save, model)
    for pair in pairs:
        try:
            if source is None:
                # what is written serves other runs too, and so holds all targets
                both = pair_states(model, pair, most if target is None else None)
            elif state_file(source.folder, pair.name, "agentic").is_file():
                both = source.pair(pair)
            else:
                both = read_origin(source.folder / f"{runs.safe_name(pair.name)}.pt", model, pair)
            if target is not None:
                target.write(both)
        except ic.InterpError as error:
            config.leave_out(dropped, pair.name, error)
            continue
        yield both[0].take(most), both[1].take(most)


def _told(drawn: Iterator[tuple[States, States]], count: int) -> Iterator[tuple[States, States]]:
    """The same, each said as it comes."""
    for number, (agentic, assisted) in enumerate(drawn, 1):
        print(f"  {agentic.sample}: {len(agentic.ids)} targets ({number} of {count})", file=sys.stderr, flush=True)
        yield agentic, assisted


def _file(sample: str) -> str:
    return f"{SAMPLES}/{runs.safe_name(sample)}.safetensors"
