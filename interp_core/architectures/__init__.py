"""The atlas: where each site lives in each model family."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..errors import InterpError, LoadError, first_line
from ..plugins import registry
from .atlas import Atlas
from .family import Family
from .locate import build


def atlas_of(model: Any) -> Atlas:
    """The atlas of a Hugging Face model: its family's file if there is one, module paths otherwise.

    Raises:
        LoadError: the model has no transformer blocks that could be found, or cannot be served.
        PluginError: the family's file is there but broken.
    """
    families = registry("architectures")
    kind = str(model.config.model_type)
    text = str(model.config.get_text_config().model_type).removesuffix("_text")
    described = [families.get(name, Family) for name in dict.fromkeys((kind, text)) if name in families]
    if len(described) == 2:  # a vision tower around another family's language model
        outer, inner = described
        described = [replace(inner, **{f.name: value for f in fields(outer) if (value := getattr(outer, f.name))})]
    try:
        return build(model, described[0] if described else None)
    except InterpError:
        raise
    except Exception as error:  # configs and modules of others, which may be anything
        raise LoadError(
            f"{type(model).__name__} cannot be served: its config or its modules are not as those of models known here "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
