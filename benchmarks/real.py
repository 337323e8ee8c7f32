"""What work on the real model costs: python benchmarks/real.py [threads], after `make real`.

Loading; every head of it set to zero at the last token, by a sweep the first time (with the trial of strategies) and
again, and by one run per head; activation patching and the logit lens. Seconds of the processor, which on one thread
are those of an idle machine's clock, and of the wall clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import interp_core as ic
from interp_core import score
from interp_core import sites as S

STORE = "When Mary and John went to the store, {} gave a drink to"


def main(threads: str = "1") -> None:
    """Print the table."""
    torch.set_num_threads(int(threads))
    print(f"{'processor':>10}  {'clock':>10}")
    model = timed("load, first time", lambda: ic.load("smollm2"))
    timed("load, again", lambda: ic.load("smollm2"))
    clean = STORE.format("John")
    mary, john = (model.tokenizer(name)["input_ids"][0] for name in (" Mary", " John"))
    variants = [S.z[layer, head].at(-1).zero() for layer, head in model.heads]
    judged = score.logit_diff(mary, john)
    timed("one run", lambda: model.run(clean))
    timed("one run, again", lambda: model.run(clean))
    swept = timed("sweep of 270 heads, first time", lambda: model.sweep(clean, variants, judged))
    timed("sweep of 270 heads, again", lambda: model.sweep(clean, variants, judged))
    one_by_one = timed("loop of 270 runs", lambda: [model.run(clean, edits=v).logits[0, -1] for v in variants])
    values = torch.stack([logits[mary] - logits[john] for logits in one_by_one])
    off = (swept.values[:, 0].flatten() - values).abs().max()
    print(f"largest difference of sweep and loop: {off:.1e} of values up to {values.abs().max():.1f}")
    patching, lens = ic.method("activation_patching"), ic.method("logit_lens")
    timed("activation patching, 270 heads", lambda: patching(model, clean, corrupted=STORE.format("Mary")))
    timed("logit lens, all 14 positions", lambda: lens(model, clean))


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Do it, and print how long it took."""
    start, worked = time.perf_counter(), time.process_time()
    result = work()
    print(f"{time.process_time() - worked:8.2f} s  {time.perf_counter() - start:8.2f} s  {name}", flush=True)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
