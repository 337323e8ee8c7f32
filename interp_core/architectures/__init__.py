"""The atlas: where each site lives in each model family."""

from __future__ import annotations

from typing import Any

from ..plugins import registry
from .atlas import Atlas, build
from .family import Family


def atlas_of(model: Any) -> Atlas:
    """The atlas of a Hugging Face model: its family's file if there is one, module paths otherwise.

    Raises:
        LoadError: the model has no transformer blocks that could be found.
        PluginError: the family's file is there but broken.
    """
    families = registry("architectures")
    kind = str(model.config.model_type)
    text = str(model.config.get_text_config().model_type)
    for name in (kind, text.removesuffix("_text")):
        if name in families:
            return build(model, families.get(name, Family))
    return build(model, None)
