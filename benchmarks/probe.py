"""What ridge probes cost: all layers, image modes and folds, with nested penalties and shuffled labels.

    python benchmarks/probe.py            24 layers, 4 modes, 25 folds, 500 samples, d = 2048; all of it is run
    python benchmarks/probe.py --layers 2 --modes 1 --cores 1

Modes run side by side on `--cores` cores, a thread each. Beside it, timed on a few folds of one layer and multiplied:

    by hand   the loop that one writes: it standardises, builds inner products and solves for every fit anew
              (tests/test_probe_decoders.py holds both to the same numbers)
    RidgeCV   of scikit-learn, where that is installed: StandardScaler, then all labelings in one fit, the penalty of
              each by leave-one-out, with a sample's own image in the fit; nested folds of images are not offered

CPU time of the process, which other work on the machine lengthens, and time by the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


def ridge_cv(x: np.ndarray, targets: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of scikit-learn's ridge regression, of all labelings."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[train])
    fitted = RidgeCV(np.array(RIDGE) * x.shape[1], alpha_per_target=True).fit(
        scaler.transform(x[train]), targets[train]
    )
    return np.asarray(fitted.predict(scaler.transform(x[test])))


def per_fold(fit: Callable[[int], object], folds: int) -> float:
    """CPU seconds of one fold of one layer."""
    start = time.process_time()
    for split in range(folds):
        fit(split)
    return (time.process_time() - start) / folds


def plain(x: np.ndarray, labels: np.ndarray, folds: Folds, shuffles: int, count: int) -> dict[str, list[float]]:
    """CPU seconds of plain alternatives per layer and fold: labels alone with one penalty, nested, with shuffles."""
    target = 2.0 * labels - 1
    single = per_fold(lambda k: by_hand(x, target, folds.train[k], folds.test[k], RIDGE[-1]), count)
    nested = per_fold(lambda k: nested_by_hand(x, target, folds, k), count)
    out = {"by hand": [single, nested, nested * (1 + shuffles)]}
    rng = np.random.default_rng(1)
    several = np.stack([target, *(rng.permutation(target) for _ in range(shuffles))], 1)
    try:
        ridge_cv(x[:, :2], several[:, :1], folds.train[0], folds.test[0])  # imported before it is timed
        alone, every = (
            per_fold(lambda k, t=t: ridge_cv(x, t, folds.train[k], folds.test[k]), count)
            for t in (several[:, :1], several)
        )
        out["RidgeCV"] = [float("nan"), alone, every]
    except ImportError:
        print("scikit-learn is not installed: RidgeCV is left out", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 24, "modes": 4, "samples": 500, "d": 2048, "shuffles": 100, "plain_folds": 2, "cores": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)  # modes are what runs side by side
    random = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, options.samples)
    folds = make_folds(labels, rng.integers(0, options.samples // 2, options.samples))
    states = [torch.randn(options.samples, options.layers, options.d, generator=random) for _ in range(options.modes)]
    for mode in states:
        mode[:, options.layers // 2 :] += 0.1 * torch.from_numpy(labels).float()[:, None, None]
    fits = options.layers * options.modes * len(folds)
    print(f"{options.layers} layers, {options.modes} modes, {len(folds)} folds, {options.samples} samples, "
          f"d = {options.d}: {fits} layers of folds; {options.cores} cores", flush=True)  # fmt: skip
    beside = plain(states[0][:, 0].double().numpy(), labels, folds, options.shuffles, options.plain_folds)

    rows = [
        ("one penalty, labels alone", {"penalties": RIDGE[-1:], "shuffles": 0}),
        ("4 penalties nested, labels alone", {"shuffles": 0}),
        (f"4 penalties nested, {options.shuffles} shuffles", {"shuffles": options.shuffles}),
    ]
    for number, (name, settings) in enumerate(rows):
        wall, start = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(options.cores) as cores:
            decoded = list(cores.map(lambda mode, how=settings: decode(mode, labels, folds, **how), states))
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        against = "".join(f"; {how} {per[number] * fits:.0f} s, {per[number] * fits / seconds:.1f} times as much"
                          for how, per in beside.items() if per[number] == per[number])  # fmt: skip
        print(f"{name:34} {seconds:6.1f} s of CPU, {wall:6.1f} s by the clock{against}", flush=True)
    last = decoded[-1]
    print(f"accuracy {last.accuracy[0]:.3f} in the first layer, {last.accuracy[-1]:.3f} in the last; shuffled "
          f"labels up to {np.quantile(last.null, 0.975):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
