"""Vision towers around the language models of other families: LLaVA, LLaVA-OneVision, InternVL, SmolVLM, Gemma 3.

What is not said here is the language model's own family's. Images in Gemma 3 attend within themselves in both
directions, which takes `token_type_ids`.
"""

from . import towers
from .family import Family
from .grids import by_any_resolution, by_patch, by_pooled_crop, by_separated_tile, by_shuffled_tile

LLAVA = Family("llava", grid=by_patch, pixels="image", tower=towers.LLAVA)
LLAVA_ONEVISION = Family("llava_onevision", grid=by_any_resolution, pixels="image", tower=towers.LLAVA)
INTERNVL = Family("internvl", grid=by_shuffled_tile, pixels="tile", tower=towers.INTERNVL)
SMOLVLM = Family("smolvlm", grid=by_separated_tile, pixels="row", tower=towers.SMOLVLM)
GEMMA3 = Family(
    "gemma3", grid=by_pooled_crop, pixels="image", needs=("token_type_ids",), whole_images=True, tower=towers.GEMMA3
)
