"""Methods: plugins that take a model and text, and return a `Result`."""

from __future__ import annotations

import functools
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from . import settings as _settings
from .errors import CapabilityError, PlanError, PluginError, nearest, wrong
from .plugins import API, name_fault, registry
from .settings import Config
from .views import Part, Shown, Table, View, part

if TYPE_CHECKING:
    from torch import Tensor

    from .model import Model
    from .result import Result
    from .runs import RunFolder
    from .session import Input
    from .text import Tokens

Call = TypeVar("Call", bound=Callable[..., Any])
R = TypeVar("R", bound="Result")
R_co = TypeVar("R_co", bound="Result", covariant=True)
CAPABILITIES = ("readout", "causal")
"""What a method may require of a model besides sites."""


class _Called:
    """How a method is called, for `inspect`, notebooks and completion: with its settings by name, and its result."""

    def __get__(self, method: Method | None, owner: type[Method]) -> inspect.Signature:
        if method is None:
            raise AttributeError("__signature__")  # classes are called as Python says
        base = inspect.signature(owner.__call__)
        _, *common, _ = base.parameters.values()
        known = {each.name for each in common}
        settings = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation)
            for name, field in owner.Config.model_fields.items()
            if name not in known
            for default in [
                inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
            ]
        ]
        gives = inspect.signature(owner.run).return_annotation
        return base.replace(parameters=[*common, *settings], return_annotation=gives)


@runtime_checkable  # where signatures are checked on every call
class _Runs(Protocol[R_co]):
    """A method as type checkers see it when it is called: the call gives what the method's own `run` says."""

    def run(self, model: Model, tokens: Tokens, config: Any) -> R_co: ...


def _settings_by_name(call: Call) -> Call:
    """A method's call that says how it is written to whoever gives more by position than it takes."""
    places = inspect.signature(call).parameters.values()
    if any(place.kind is place.VAR_POSITIONAL for place in places):
        return call
    count = sum(place.kind in (place.POSITIONAL_ONLY, place.POSITIONAL_OR_KEYWORD) for place in places)

    @functools.wraps(call)
    def checked(method: Method, *arguments: Any, **settings: Any) -> Any:
        if more := arguments[count - 1 :]:
            raise PlanError(_unnamed(method, more))
        return call(method, *arguments, **settings)

    named: Any = checked
    return named


def _unnamed(method: Method, more: Sequence[Any]) -> str:
    """The message for what a method was handed by position after model and text."""
    fields, common = method.Config.model_fields, inspect.signature(Method.__call__).parameters
    called = inspect.signature(type(method).__call__).parameters.values()
    own = [each.name for each in called if each.kind is each.KEYWORD_ONLY and each.name not in common]
    of_prompts = [
        name
        for name in (row["setting"] for row in _settings.rows(method.Config))
        if fields[name].is_required() or name in method.Config.PER_PROMPT
        if _settings.takes(fields[name].annotation, more[0])
    ]
    likely = [f"{name}=…" for name in (*own, *of_prompts)]
    write = f"Write {' or '.join(likely)}" if likely else nearest(None, fields).removesuffix(".")
    takes = "a model and text, then settings by name"
    return f"{wrong(f'method {method.name}', takes, more[0])}. {write}; several prompts are a list: [text, …]"


class Method(Shown, ABC):
    """Base of all methods. A subclass sets the attributes and writes `run`.

    Attributes:
        name: as registered.
        api: version of this interface that the method was written for.
        requires: sites and capabilities that the model must have: `readout`, or `causal` (positions see no later ones).
        Config: settings, a subclass of `interp_core.Config`.
    """

    name: ClassVar[str] = ""
    api: ClassVar[int] = API
    requires: ClassVar[frozenset[str]] = frozenset()
    Config: ClassVar[type[Config]] = Config
    __signature__ = _Called()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if inspect.isfunction(own := vars(cls).get("__call__")):
            cls.__call__ = _settings_by_name(own)  # type: ignore[method-assign]

    def _view(self) -> View:
        about = (inspect.getdoc(type(self)) or "").partition("\n\n")[0]
        needs = [f"{', '.join(sorted(self.requires))} of the model"] if self.requires else []
        parts = [
            Part("does", textwrap.wrap(" ".join(about.split()), 84)),
            Part("needs", needs),
            part("settings", self._settings),
        ]
        return View(f"Method {self.name}: call it with a model, text and settings", parts)

    def _settings(self) -> Part:
        """What can be set, with defaults; what each means is in the table."""
        rows = [tuple(row.values()) for row in _settings.rows(self.Config)]
        lines = textwrap.wrap(", ".join(f"{name}={default}" for name, _, default, _ in rows), 84)
        return Part("settings", lines, Table(["setting", "type", "default", "meaning"], rows) if rows else None)

    @abstractmethod
    def run(self, model: Model, tokens: Tokens, config: Any) -> Any:
        """Do the work: tokens are made and settings are checked. Returns a `Result`.

        A subclass says of which class (`-> MyResult`): that is what calls of the method give, for type checkers too.
        """

    def conserved(self, model: Model, tokens: Tokens, result: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What must add up: for each law, in words, the two sides that must be equal. The conformance kit holds the
        method to it, within a ten-thousandth of the larger side. None by default."""
        return {}

    def check(self, model: Model, tokens: Tokens, config: Any) -> None:  # nothing by default
        """Refuse what cannot be done, before anything runs; called once, with all prompts."""

    def run_batches(self, model: Model, batches: Iterable[tuple[Tokens, Any]], config: Any) -> Iterator[Result]:
        """One result per batch, in order: `run` on each. A method with work that all prompts share does it first.

        Args:
            batches: some prompts each, and their part of the settings.
            config: the settings of all prompts.
        """
        return (self.run(model, tokens, part) for tokens, part in batches)

    @_settings_by_name
    def __call__(
        self: _Runs[R],
        model: Model,
        x: Input,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        out: str | Path | RunFolder | None = None,
        **settings: Any,
    ) -> R:
        """Run the method on text; returns its `Result`, of the class that `run` says.

        Args:
            batch_size: how many prompts run together, those of about one length (None: all; with `out=` 16).
            progress: show from the beginning how much is done, on standard error; else from three seconds on.
            out: a folder for the results of batches as they come, and then the whole; a run that was stopped goes on
                there, and what is done is read.

        Raises:
            PlanError: settings that the method does not have, or of the wrong kind; a result that cannot be joined from
                batches; a folder of another run, naming what differs.
            CapabilityError: the model lacks what the method needs.
            PluginError: the method returned something else.
        """
        from .provenance import provenance, sentence, shared_settings, within
        from .result import Result

        assert isinstance(self, Method)  # `_Runs` is for the type alone
        if not hasattr(model, "atlas"):
            raise PlanError(wrong(f"method {self.name}", "a model of ic.load first, then the text", model))
        split = batch_size is not None or out is not None
        # With batches, how far the whole is; else what the method itself shows, if it has such a setting.
        if "progress" in self.Config.model_fields and not split:
            settings = {"progress": progress, **settings}
        config = self.configured(settings)
        for need in sorted(self.requires):
            if need in model.atlas.lacking:
                raise CapabilityError(f"{self.name} needs {need} of {model.source}: {model.atlas.lacking[need]}")
        tokens = model.input(x)
        self.check(model, tokens, config)
        record = provenance(self.name, sentence(type(self)), model, tokens, shared_settings(config))
        if split:
            from .batches import BATCH
            from .many import run_many

            size = BATCH if batch_size is None else batch_size
            with within():
                return run_many(self, model, tokens, config, size, progress, out, record)
        with within():
            result: R = self.run(model, tokens, config)
        if not isinstance(result, Result):
            kind = type(result).__name__
            raise PluginError(
                f"{type(self).__name__}.run returned a {kind}: methods return an interp_core.Result, a frozen "
                "dataclass whose fields are what was computed and whose AXES name the axes of its tensors"
            )
        return result.with_provenance(record)

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """The method's config from settings.

        Raises:
            PlanError: naming the setting, and the nearest one that there is.
        """
        return _settings.configured(self.name, self.Config, settings)


class Batching(Config):
    """Settings that every method has beside its own.

    Attributes:
        batch_size: how many prompts run together (None: all).
        progress: show from the beginning how much is done, on standard error; else from three seconds on.
    """

    batch_size: int | None = None
    progress: bool = False


def fault(name: str, value: Any) -> str:
    """What is wrong with an imported value as a method of this name."""
    if not (isinstance(value, type) and issubclass(value, Method)):
        return f"is {value!r:.60}, not a subclass of interp_core.Method"
    if inspect.isabstract(value):
        return f"leaves {', '.join(sorted(value.__abstractmethods__))} to be written"
    if not (isinstance(value.Config, type) and issubclass(value.Config, Config)):
        return f"has the Config {value.Config!r:.60}, not a subclass of interp_core.Config"
    if isinstance(value.requires, str):
        return f"has requires = {value.requires!r}, not a set of names: write frozenset({{{value.requires!r}}})"
    return name_fault(name, value)


def method(name: str) -> Method:
    """The method of that name, ready to be called: `ic.method("logit_lens")(model, text)`.

    Raises:
        PluginError: unknown, broken, of another interface version, or no method.
    """
    instance: Method = registry("methods").get(name)()
    return instance
