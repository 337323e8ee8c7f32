"""GPT-J, and CodeGen, whose one projection lies in four parts, each with queries, values and keys of a quarter of the heads."""

from .family import Family

FAMILY = Family("gptj", parallel=lambda config: True)
_IN_PARTS = "they lie in four parts of one projection, so heads are no view of it"
CODEGEN = Family(
    "codegen",
    parallel=lambda config: True,
    inside=("v",),
    refuse={"q": f"{_IN_PARTS}; rot_q has them rotated", "k": f"{_IN_PARTS}; rot_k has them rotated"},
)
