"""Methods: plugins that take a model and text, and return a `Result`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from . import settings as _settings
from .errors import CapabilityError, PlanError, PluginError, wrong
from .plugins import API, registry
from .settings import Config

if TYPE_CHECKING:
    from torch import Tensor

    from .model import Input, Model
    from .result import Result
    from .text import Tokens

CAPABILITIES = ("readout",)
"""What a method may require of a model besides sites."""


class Method(ABC):
    """Base of all methods. A subclass sets the attributes and writes `run`.

    Attributes:
        name: as registered.
        api: version of this interface that the method was written for.
        requires: sites and capabilities (`readout`) that the model must have.
        Config: settings, a subclass of `interp_core.Config`.
    """

    name: ClassVar[str] = ""
    api: ClassVar[int] = API
    requires: ClassVar[frozenset[str]] = frozenset()
    Config: ClassVar[type[Config]] = Config

    @abstractmethod
    def run(self, model: Model, tokens: Tokens, config: Any) -> Result:
        """Do the work: tokens are made and settings are checked."""

    def conserved(self, model: Model, tokens: Tokens, result: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What must add up: for each law, in words, the two sides that must be equal. The conformance kit holds the
        method to it, within a ten-thousandth of the larger side. None by default."""
        return {}

    def __call__(self, model: Model, x: Input, **settings: Any) -> Any:
        """Run the method on text; returns its `Result`.

        Raises:
            PlanError: settings that the method does not have, or of the wrong kind.
            CapabilityError: the model lacks what the method needs.
            PluginError: the method returned something else.
        """
        from .result import Result

        if not hasattr(model, "atlas"):
            raise PlanError(wrong(f"method {self.name}", "a model of ic.load first, then the text", model))
        config = self.configured(settings)
        for need in sorted(self.requires):
            if need in model.atlas.lacking:
                raise CapabilityError(f"{self.name} needs {need}: {model.atlas.lacking[need]}")
        result = self.run(model, model._input(x), config)
        if not isinstance(result, Result):
            kind = type(result).__name__
            raise PluginError(f"{type(self).__name__}.run returned a {kind}: methods return an interp_core.Result")
        return result

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """The method's config from settings.

        Raises:
            PlanError: naming the setting, and the nearest one that there is.
        """
        return _settings.configured(self.name, self.Config, settings)


def method(name: str) -> Method:
    """The method of that name, ready to be called: `ic.method("logit_lens")(model, text)`.

    Raises:
        PluginError: unknown, broken, of another interface version, or no method.
    """
    made: Method = registry("methods").get(name)()
    return made
