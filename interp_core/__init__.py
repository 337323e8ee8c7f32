"""interp_core: name any site of a transformer, read it, change it, see that it acted.

    import interp_core as ic
    from interp_core import sites as S

    model = ic.load("toy:text")
    run = model.run("Q: big\\nA: small\\n\\nQ: hot\\nA:", read=[S.resid_post, S.pattern[3, 1]])

The names below are the public ones. They load what they need when they are first used, so that importing this package
(and `interp --help`) stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import positions as positions
    from . import prompts as prompts
    from . import report as report
    from . import runs as runs
    from . import score as score
    from . import sites as sites
    from . import stats as stats
    from . import testing as testing
    from . import text as text
    from . import toys as toys
    from . import vision as vision
    from . import visual as visual
    from .activations import Activations as Activations
    from .batteries.images import VisualCheck as VisualCheck
    from .batteries.images import visual_check as visual_check
    from .engines.attention_rows import AttentionRows as AttentionRows
    from .errors import CapabilityError as CapabilityError
    from .errors import EffectError as EffectError
    from .errors import InterpError as InterpError
    from .errors import ItemError as ItemError
    from .errors import LoadError as LoadError
    from .errors import PlanError as PlanError
    from .errors import PluginError as PluginError
    from .errors import PositionError as PositionError
    from .errors import ReadError as ReadError
    from .errors import SiteError as SiteError
    from .errors import TextError as TextError
    from .generation import Generation as Generation
    from .identity import keyed as keyed
    from .loading import open_tokenizer as open_tokenizer
    from .methods import Method as Method
    from .methods import method as method
    from .model import Model as Model
    from .model import load as load
    from .plan import Plan as Plan
    from .plugins import registry as registry
    from .positions import PerRow as PerRow
    from .positions import Span as Span
    from .progress import Progress as Progress
    from .readings import LayerReadings as LayerReadings
    from .readings import Reading as Reading
    from .receipts import Receipt as Receipt
    from .receipts import Routing as Routing
    from .result import Difference as Difference
    from .result import Result as Result
    from .run import Run as Run
    from .saved import SavedRun as SavedRun
    from .saved import open_run as open_run
    from .settings import Config as Config
    from .sites import Edit as Edit
    from .sites import Site as Site
    from .sweep import Sweep as Sweep
    from .text import Tokens as Tokens
    from .vision.places import VisualToken as VisualToken

_NAMES = {
    "activations": "Activations",
    "batteries.images": "VisualCheck visual_check",
    "engines.attention_rows": "AttentionRows",
    "errors": "CapabilityError EffectError InterpError ItemError LoadError PlanError PluginError PositionError "
    "ReadError SiteError TextError",
    "generation": "Generation",
    "identity": "keyed",
    "loading": "open_tokenizer",
    "methods": "Method method",
    "model": "Model load",
    "plan": "Plan",
    "plugins": "registry",
    "positions": "PerRow Span",
    "progress": "Progress",
    "readings": "LayerReadings Reading",
    "receipts": "Receipt Routing",
    "result": "Difference Result",
    "run": "Run",
    "saved": "SavedRun open_run",
    "settings": "Config",
    "sites": "Edit Site",
    "sweep": "Sweep",
    "text": "Tokens",
    "vision.places": "VisualToken",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = (
    "errors", "positions", "prompts", "report", "runs", "score", "sites", "stats", "testing", "text", "toys", "vision",
    "visual",
)  # fmt: skip

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    from .foreign import PACKAGE, Abroad

    raise AttributeError(Abroad("interp_core", PACKAGE).lacks(name, __all__))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
