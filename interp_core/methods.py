"""Methods: plugins that take a model and text, and return a `Result`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import CapabilityError, PlanError, PluginError, nearest
from .plugins import registry

if TYPE_CHECKING:
    from .model import Input, Model
    from .result import Result
    from .text import Tokens

API = 1


class Config(BaseModel):
    """Base of the settings of methods: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


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

    def __call__(self, model: Model, x: Input, **settings: Any) -> Result:
        """Run the method on text.

        Raises:
            PlanError: settings that the method does not have, or of the wrong kind.
            CapabilityError: the model lacks what the method needs.
        """
        config = self.configured(settings)
        for need in sorted(self.requires):
            if need in model.atlas.lacking:
                raise CapabilityError(f"{self.name} needs {need}: {model.atlas.lacking[need]}")
        return self.run(model, model._input(x), config)

    def configured(self, settings: dict[str, Any]) -> Any:
        """The method's config from settings.

        Raises:
            PlanError: naming the setting, and the nearest one that there is.
        """
        known = self.Config.model_fields
        for key in settings:
            if key not in known:
                raise PlanError(f"{self.name} has no setting {key!r}. {nearest(key, known)}")
        try:
            return self.Config(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{self.name}: setting {where}: {first['msg']} (got {first['input']!r})") from error


def method(name: str) -> Method:
    """The method of that name, ready to be called: `ic.method("logit_lens")(model, text)`.

    Raises:
        PluginError: unknown, broken, of another interface version, or no method.
    """
    found = registry("methods").get(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise PluginError(f"method {name!r} is {found!r:.60}, not a subclass of interp_core.Method")
    if found.api != API:
        raise PluginError(f"method {name!r} was written for interface {found.api}, this is {API}: update the plugin")
    return found()
