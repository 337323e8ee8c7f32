"""Settings of methods and recipes: checked, described, as JSON schema, and from `key=value` on a command line."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from .columns import terminal_width, wrapped
from .cost import Cost, Work
from .errors import PlanError, PluginError, nearest

NEEDED = "(needed)"
"""In place of a default, where there is none."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as Checking
else:
    Checking = type(BaseModel)


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(Field,))  # said anew of each metaclass
class _Named(Checking):
    """What makes classes of settings: a setting without a type is named, with the line to write."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        try:
            return super().__new__(mcs, name, bases, namespace, **options)
        except PydanticUserError as error:
            if error.code != "model-field-missing-annotation":
                raise
            raise PluginError(_untyped(name, namespace)) from error


def _untyped(config: str, namespace: Mapping[str, Any]) -> str:
    """The message for settings without a type, from what stands in the body of their class."""
    annotations = {key: text for key, text in namespace.items() if key.startswith("__annotat")}
    typed = inspect.get_annotations(type(config, (), annotations))
    untyped = {
        key: default
        for key, default in namespace.items()
        if not (key in typed or key.startswith("_") or key in ("model_config", "PER_PROMPT"))
        and not (inspect.isroutine(default) or isinstance(default, (property, type)))
    }
    kinds = {
        key: "TYPE" if default is None or isinstance(default, FieldInfo) else type(default).__name__
        for key, default in untyped.items()
    }
    lines = [f"{key}: {kinds[key]} = {default!r:.40}" for key, default in untyped.items()]
    return f"{config}: a setting needs a type. Write `{'`, `'.join(lines)}` (or ClassVar[…], for what is no setting)"


class Config(BaseModel, metaclass=_Named):
    """Base of the settings of methods: unknown keys are refused, values are checked, nothing changes afterwards.

    An `Attributes:` section in a subclass's docstring describes its fields. `PER_PROMPT` names those of which a list
    has one item per prompt; any other value is for all prompts.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset()
    # `model_path` and the like are settings of ours: pydantic before 2.10 keeps every name in `model_` for itself
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    if not TYPE_CHECKING:  # type checkers and editors know a config's own settings by its fields

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise PlanError(_said(type(self).__name__, type(self), error)) from error

    def cost(self, work: Work) -> Cost | None:
        """What a method or a recipe runs with these settings, for `interp plan`; None: it does not say."""
        return None


def configured(owner: str, config: type[Config], settings: Mapping[str, Any]) -> Any:
    """A config from settings.

    Args:
        owner: whose settings they are, for messages.

    Raises:
        PlanError: naming the setting, and the nearest one that there is.
    """
    for key in settings:
        _known(owner, config, key)
    try:
        return config(**settings)
    except PlanError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise PlanError(_said(owner, config, error.__cause__)) from error.__cause__


def _said(owner: str, config: type[Config], error: ValidationError) -> str:
    """What is wrong with settings, by the first of them that is refused."""
    errors = error.errors()  # a misspelt name is often what is missing too
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{owner} has no setting {where!r}. {nearest(where, config.model_fields)}"
    if first["type"] == "missing":
        return f"{owner}: setting {where} is missing; it has no default"
    return f"{owner}: setting {where}: {first['msg']} (got {first['input']!r})"


def _known(owner: str, config: type[Config], key: str) -> FieldInfo:
    if key not in config.model_fields:
        raise PlanError(f"{owner} has no setting {key!r}. {nearest(key, config.model_fields)}")
    return config.model_fields[key]


def of_function(function: Callable[..., Any]) -> type[Config]:
    """The settings of a function: the config that is its only argument, or else its arguments as one.

    Arguments without annotation take anything.

    Raises:
        PluginError: an annotation that is no type.
    """
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise PluginError(f"{function.__qualname__}: an argument's annotation cannot be read: {error}") from error
    arguments = inspect.signature(function).parameters
    taken = hints.get(next(iter(arguments))) if len(arguments) == 1 else None
    if isinstance(taken, type) and issubclass(taken, Config):
        return taken
    fields: dict[str, Any] = {}
    for name, argument in arguments.items():
        if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            default = ... if argument.default is argument.empty else argument.default
            fields[name] = (hints.get(name, Any), default)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument may be called as something of pydantic's
        arguments_as_config: type[Config] = create_model(
            function.__name__, __base__=_Arguments, __doc__=function.__doc__, **fields
        )
    return arguments_as_config


class _Arguments(Config):
    """Arguments of a function that takes no config."""


def call(function: Callable[..., Any], config: Config) -> Any:
    """What a function returns for settings of `of_function(function)`: given as they are, or as its arguments."""
    if isinstance(config, _Arguments):
        return function(**{key: getattr(config, key) for key in type(config).model_fields})
    return function(config)


def joined(*configs: type[Config]) -> type[Config]:
    """The settings of several configs as one."""
    config: type[Config] = type(configs[-1].__name__, configs, {"__doc__": configs[-1].__doc__})
    return config


class _Schema(GenerateJsonSchema):
    """Values that JSON has not (functions, tensors) are fields that say so, not errors."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 (pydantic's)

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {"$comment": f"Python only: {error_info}"}


def schema(config: type[Config]) -> dict[str, Any]:
    """JSON schema of a config, with the descriptions of its docstring."""
    json_schema = config.model_json_schema(schema_generator=_Schema)
    for name, text in _texts(config).items():
        if name in json_schema.get("properties", {}):
            json_schema["properties"][name].setdefault("description", text)
    return json_schema


def rows(config: type[Config]) -> list[dict[str, str]]:
    """Name, type, default and description of every field, those of its own before those that it inherits."""
    texts, fields = _texts(config), config.model_fields

    def from_how_far_up(name: str) -> int:
        return max(i for i, kind in enumerate(config.__mro__) if name in getattr(kind, "model_fields", ()))

    return [
        {
            "setting": name,
            "type": _type(field.annotation),
            "default": NEEDED if field.is_required() else _shown(field.get_default(call_default_factory=True)),
            "description": field.description or texts.get(name, ""),
        }
        for name, field in sorted(fields.items(), key=lambda item: from_how_far_up(item[0]))
    ]


def _texts(config: type[Config]) -> dict[str, str]:
    """What the docstrings of a config, and of those that it inherits from, say of each field."""
    kinds = [kind for kind in reversed(config.__mro__) if issubclass(kind, BaseModel)]
    return {name: text for kind in kinds for name, text in described(vars(kind).get("__doc__") or "").items()}


def _shown(default: Any) -> str:
    return repr(str(default) if isinstance(default, PurePath) else default)


def _type(annotation: Any) -> str:
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if plain else re.sub(r"\b(\w+\.)+(?=\w)", "", str(annotation))


WIDTH = 100


def page(config: type[Config]) -> str:
    """Every setting as help has it, the needed ones first: name, type and default, then what is said of it."""
    listed = sorted(rows(config), key=lambda row: row["default"] != NEEDED)
    return "\n".join(map(_entry, listed)) or "It has no settings."


def _entry(row: dict[str, str]) -> str:
    """One setting, with its description below it."""
    width = min(WIDTH, terminal_width() or WIDTH)
    description = textwrap.fill(row["description"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    head = wrapped(f"  --{row['setting']}  {row['type']} = {row['default']}", terminal_width(), "      ")
    return f"{head}\n{description}".rstrip()


# the section's heading at any indent, then all lines that stand deeper than it, or are empty
_SECTION = re.compile(r"^(?P<indent> *)(Attributes|Args):\n(?P<body>(?:(?P=indent) +\S.*\n?|\s*\n)+)", re.M)


def described(doc: str) -> dict[str, str]:
    """What the `Attributes:` or `Args:` section of a docstring says of each name."""
    section = _SECTION.search(doc + "\n")
    if section is None:
        return {}
    lines = [line for line in section["body"].splitlines() if line.strip()]
    depth = len(lines[0]) - len(lines[0].lstrip())
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines:  # one at the section's own depth names settings; a deeper one goes on with what is said of them
        start = re.match(rf" {{{depth}}}(?! )([\w, *]+?)(?: \([^)]*\))?: (.*)", line)
        if start:
            names = [name.strip(" *") for name in start[1].split(",")]
            texts |= dict.fromkeys(names, start[2].strip())
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def read(owner: str, config: type[Config], pairs: Iterable[str]) -> dict[str, Any]:
    """Settings from `key=value`: JSON where the setting takes it, else text.

    Raises:
        PlanError: no `=`, or no such setting.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise PlanError(f"{pair!r} is not a setting: write key=value")
        values[key] = _value(_known(owner, config, key).annotation, value)
    return values


def _value(annotation: Any, text: str) -> Any:
    """The value that a setting takes of a text: JSON, the text, or a list of that one."""
    value = _parsed(text)
    # JSON goes first, so that 3 is a number where the setting takes either; a text is kept where it takes no number
    for candidate in (value, text, [value], [text]):
        if takes(annotation, candidate):
            return candidate
    return text


def listed(annotation: Any, texts: list[str]) -> list[Any] | None:
    """Several texts as the list that a setting takes, of JSON or of the texts; None if it takes none."""
    candidates = [*map(_parsed, texts)], texts
    return next((candidate for candidate in candidates if takes(annotation, candidate)), None)


def _parsed(text: str) -> Any:
    """What a text is as JSON; itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def takes(annotation: Any, value: Any) -> bool:
    """Whether a setting of this type takes the value."""
    try:
        TypeAdapter(annotation, config={"arbitrary_types_allowed": True}).validate_python(value)
    except PydanticUserError:  # a type with a config of its own
        return True
    except ValidationError:
        return False
    return True
