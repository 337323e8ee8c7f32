"""What ridge probes cost: all layers, image modes and folds, with nested penalties and shuffled labels.

    python benchmarks/probe.py            24 layers, 4 modes, 25 folds, 500 samples, d = 2048
    python benchmarks/probe.py --layers 2 --modes 1

Beside it the loop that one writes by hand, which standardises, builds inner products and solves for every fit anew; it
is timed on a few folds of one layer, and multiplied (tests/test_probe_decoders.py holds both to the same numbers). CPU
time of the process, which other work on the machine lengthens.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from interp_plugins.probe.folds import Folds, make_folds
from interp_plugins.probe.study import RIDGE, decode


def by_hand(x: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of one ridge regression of one labeling, in its dual form."""
    mean, std = x[train].mean(0), x[train].std(0)
    z, other = (x[train] - mean) / std, (x[test] - mean) / std
    gram = z @ z.T
    system = gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
    return other @ z.T @ np.linalg.solve(system, target[train] - target[train].mean()) + target[train].mean()


def nested_by_hand(x: np.ndarray, target: np.ndarray, folds: Folds, split: int) -> np.ndarray:
    """Scores with the penalty of the least held-out error, every inner fold fitted anew."""
    train, test = folds.train[split], folds.test[split]
    inner = folds.inner[split]
    errors = []
    for penalty in RIDGE:
        held = np.zeros(len(x))
        for fold in range(inner.max() + 1):
            inside, outside = train & (inner != fold), train & (inner == fold)
            held[outside] = by_hand(x, target, inside, outside, penalty)
        errors.append(((held - target)[train] ** 2).mean())
    return by_hand(x, target, train, test, RIDGE[int(np.argmin(errors))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 24, "modes": 4, "samples": 500, "d": 2048, "shuffles": 100, "folds_by_hand": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, options.samples)
    folds = make_folds(labels, rng.integers(0, options.samples // 2, options.samples))
    states = [torch.randn(options.samples, options.layers, options.d, generator=random) for _ in range(options.modes)]
    for mode in states:
        mode[:, options.layers // 2 :] += 0.1 * torch.from_numpy(labels).float()[:, None, None]
    fits = options.layers * options.modes * len(folds)
    print(f"{options.layers} layers, {options.modes} modes, {len(folds)} folds, {options.samples} samples, "
          f"d = {options.d}: {fits} layers of folds; {torch.get_num_threads()} threads", flush=True)  # fmt: skip

    x, target = states[0][:, 0].double().numpy(), 2.0 * labels - 1
    hand = {"one penalty": 0.0, "nested": 0.0}
    for split in range(options.folds_by_hand):
        start = time.process_time()
        by_hand(x, target, folds.train[split], folds.test[split], RIDGE[-1])
        hand["one penalty"] += time.process_time() - start
        start = time.process_time()
        nested_by_hand(x, target, folds, split)
        hand["nested"] += time.process_time() - start
    per_fit = {name: seconds / options.folds_by_hand for name, seconds in hand.items()}

    rows = [
        ("one penalty, labels alone", {"penalties": RIDGE[-1:], "shuffles": 0}, per_fit["one penalty"]),
        ("4 penalties nested, labels alone", {"shuffles": 0}, per_fit["nested"]),
        (f"4 penalties nested, {options.shuffles} shuffles", {"shuffles": options.shuffles},
         per_fit["nested"] * (1 + options.shuffles)),
    ]  # fmt: skip
    for name, settings, naive in rows:
        wall, start = time.perf_counter(), time.process_time()
        for mode in states:
            decoding = decode(mode, labels, folds, **settings)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        print(f"{name:36} {seconds:7.1f} s of CPU, {wall:6.1f} s of time;  by hand {naive * fits:9.0f} s of CPU, "
              f"{naive * fits / seconds:6.1f} times as much", flush=True)  # fmt: skip
    print(f"accuracy {decoding.accuracy[0]:.3f} in the first layer, {decoding.accuracy[-1]:.3f} in the last; shuffled "
          f"labels up to {np.quantile(decoding.null, 0.975):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
