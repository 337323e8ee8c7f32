"""The atlas: where each site lives in each model family."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..plugins import registry
from .atlas import Atlas
from .family import Family
from .locate import build


def atlas_of(model: Any) -> Atlas:
    """The atlas of a Hugging Face model: its family's file if there is one, module paths otherwise.

    Raises:
        LoadError: the model has no transformer blocks that could be found.
        PluginError: the family's file is there but broken.
    """
    families = registry("architectures")
    kind = str(model.config.model_type)
    text = str(model.config.get_text_config().model_type).removesuffix("_text")
    described = [families.get(name, Family) for name in dict.fromkeys((kind, text)) if name in families]
    if len(described) == 2:  # a vision tower around another family's language model
        outer, inner = described
        described = [replace(inner, **{f.name: value for f in fields(outer) if (value := getattr(outer, f.name))})]
    return build(model, described[0] if described else None)
