"""The layer at which answers become readable: plain lens, tuned lens, Jacobian lens.

    python benchmarks/transports.py toy                                 toy:text, lenses fitted on its own texts
    python benchmarks/transports.py fit TEXTS OUT [PROMPTS] [TOKENS]    a Jacobian lens of the real model (`make real`)
    python benchmarks/transports.py facts FACTS TEXTS OUT               factual prompts of it, by all three lenses

TEXTS is a text file such as WikiText's: blank lines and headings are left out, the rest is joined and cut into pieces
of 2,000 characters, as published lenses are fitted. FACTS is a JSON list of {prompt, attribute}. A fit that was stopped
goes on in OUT. Per layer: share of prompts whose answer's first token comes first, and its median rank; only prompts
that the model itself answers count.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from interp_plugins.logit_lens.transports import JacobianLens, TunedLens, fit_jacobian, fit_tuned

import interp_core as ic
from interp_core import sites as S
from interp_core.toys import text as tasks

PIECE = 2000
FIT = {"dim_batch": 16, "min_prompts": 10**6}
"""The number of prompts is what is asked for; the published rule would want 100 before it looks."""


def pieces(path: str) -> list[str]:
    """The corpus of published fits."""
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    joined = " ".join(line for line in lines if line and not line.startswith("="))
    return [joined[i : i + PIECE].strip() for i in range(0, len(joined), PIECE)]


def toy_texts(n: int, seed: str) -> list[tasks.Example]:
    """In-context relations and retrieval with an answer each."""
    rng = random.Random(seed)
    return [
        tasks.relation_example(rng, shots=4) if i % 2 else tasks.needle_example(rng, rng.randint(3, 5), i // 2 % 3)
        for i in range(n)
    ]


def toy() -> None:
    """Table of toy:text."""
    model = ic.load("toy:text")
    texts = [example.prompt + example.answer for example in toy_texts(100, "fit")]
    began = time.process_time()
    jacobian = fit_jacobian(model, texts, dim_batch=32, skip_first=4)
    print(f"Jacobian lens: {jacobian.n_prompts} prompts, {time.process_time() - began:.0f} s of processor time")
    agree(jacobian)
    tuned = fit_tuned(model, texts, objective="kl", steps=200)
    table(model, [(example.prompt, example.answer) for example in toy_texts(200, "read")], jacobian, tuned)


def agree(lens: JacobianLens) -> None:
    """Split-half agreement in a line per layer."""
    print("layer: relative distance of the halves' fits, cosine")
    for layer, (distance, cosine) in lens.agreement().items():
        print(f"  {layer:3} {distance:.3f} {cosine:.3f}")


def fit(texts: str, out: str, prompts: str = "100", tokens: str = "64") -> JacobianLens:
    """Fit or go on fitting."""
    model = real()
    lens = fit_jacobian(
        model, pieces(texts)[: int(prompts)], out=out, max_seq_len=int(tokens), progress=True, **FIT
    )  # fmt: skip
    print(f"{lens}; {lens.metadata['seconds']:.0f} s")
    agree(lens)
    return lens


def real() -> ic.Model:
    """In bfloat16, as published fits; attention of transformers' own, whose backward pass is twice as fast here."""
    return ic.load("smollm2", dtype="bfloat16", attn_implementation="eager")


def facts(path: str, texts: str, out: str, prompts: str = "100", tokens: str = "64") -> None:
    """Table of factual prompts."""
    model = real()
    lens = fit(texts, out, prompts, tokens)
    wide = ic.load("smollm2", dtype="float32")
    tuned = fit_tuned(wide, [wide.tokens(piece).ids[0, :128] for piece in pieces(texts)[:100]], objective="regression")
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    table(wide, [(row["prompt"], " " + row["attribute"]) for row in rows], lens, tuned)
    del model


def table(
    model: ic.Model, prompts: Sequence[tuple[str, str]], jacobian: JacobianLens, tuned: TunedLens
) -> None:  # fmt: skip
    """Print top-1 share and median rank per layer and lens, of prompts that the model answers."""
    lenses: dict[str, Any] = {"plain": None, "tuned": tuned, "Jacobian": jacobian}
    sites = [S.resid_post[layer].at(-1) for layer in range(model.n_layers)]
    ranks: dict[str, list[list[int]]] = {name: [] for name in lenses}
    for prompt, answer in prompts:
        target = int(model.tokens(answer).ids[0, 0])
        run = model.run(prompt, read=sites, logits=-1)
        if int(run.logits.plain.argmax()) != target:
            continue
        for name, lens in lenses.items():
            rank = []
            for layer, site in enumerate(sites):
                resid = run[site].plain.reshape(1, -1)
                moved = lens is not None and layer < model.n_layers - 1
                with torch.no_grad():
                    logits = model.readout(lens(layer, resid) if moved else resid)[0]
                rank.append(int((logits > logits[target]).sum()))
            ranks[name].append(rank)
    print(f"{len(ranks['plain'])} of {len(prompts)} prompts are answered")
    print("| layer | " + " | ".join(f"{name}: top-1 | rank" for name in lenses) + " |")
    print("|" + "---|" * (1 + 2 * len(lenses)))
    for layer in range(model.n_layers):
        cells = []
        for name in lenses:
            column = torch.tensor(ranks[name])[:, layer]
            cells += [f"{(column == 0).float().mean():.2f}", f"{column.median()}"]
        print(f"| {layer} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts: dict[str, Callable[..., Any]] = {"toy": toy, "fit": fit, "facts": facts}
    parts[sys.argv[1]](*sys.argv[2:])
