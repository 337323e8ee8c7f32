#!/usr/bin/env python
"""Write what scikit-learn says of the samples in tests/probing.py into tests/data/probe.json.

python scripts/probe_reference.py            # with numpy and scikit-learn; nothing else of this project is needed
python scripts/probe_reference.py --check    # only say whether the file is still what scikit-learn says
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).parent.parent
FILE = ROOT / "tests/data/probe.json"
sys.path.insert(0, str(ROOT / "tests"))

import probing  # noqa: E402


def of_case(case: dict[str, Any]) -> dict[str, Any]:
    """Decision values of logistic and ridge regression, and of discriminant analysis with equal priors."""
    x, y, other = (np.array(case[name]) for name in ("x", "labels", "other"))
    scaler = StandardScaler().fit(x)
    z, z_other = scaler.transform(x), scaler.transform(other)
    fitted = LogisticRegression(C=case["c"], class_weight="balanced", tol=1e-12, max_iter=100000).fit(z, y)
    means = np.stack([z[y == k].mean(0) for k in (0, 1)])
    covariance, shrinkage = ledoit_wolf(z - means[y], assume_centered=True)
    along = np.linalg.solve(covariance, means[1] - means[0])
    return {
        "logistic": fitted.decision_function(z_other).tolist(),
        "ridge": Ridge(alpha=case["c"] * z.shape[1]).fit(z, 2 * y - 1).predict(z_other).tolist(),
        "lda": ((z_other - means.mean(0)) @ along).tolist(),
        "shrinkage": float(shrinkage),
    }


def main() -> None:
    cases = [of_case(probing.case(number)) for number in range(len(probing.CASES))]
    reference = {"scikit-learn": sklearn.__version__, "cases": cases}
    if "--check" not in sys.argv:
        FILE.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
        return
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    apart = max(
        float(np.abs(np.array(now[name]) - np.array(then[name])).max())
        for now, then in zip(cases, kept["cases"], strict=True)
        for name in now
    )
    print(f"{apart:.1e} apart at most; written by scikit-learn {kept['scikit-learn']}, this is {sklearn.__version__}")
    sys.exit(apart > 1e-6)


if __name__ == "__main__":
    main()
