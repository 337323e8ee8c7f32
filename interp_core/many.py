"""Methods on many prompts: in batches of about one length, with progress, in a folder that a stopped run goes on in.

A batch is a few of the prompts with their part of the settings: of those that a config names in `PER_PROMPT` a list has
one item per prompt, and positions per row (`ic.PerRow`) and scores with a target per row are split wherever they occur.
Results of batches are joined as `joining` says. In a folder, each batch's result is a stage, noted with its prompts, so
that a run goes on whatever the size of its batches is then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import runs
from .batches import batch_size_of, bucketed, numbering, sides, some_rows
from .errors import InterpError, PlanError, PluginError, wrong
from .files import sha256
from .identity import NoIdentityError, identity
from .joining import Part, demand_alike, demand_joinable, joined, result_kind
from .positions import Mask, PerRow
from .progress import Progress
from .result import Result
from .runs.identity import plain_fields
from .score import Score
from .settings import Config
from .text import Tokens

if TYPE_CHECKING:
    from .structure import Structure

PARTS, INDEX = "parts", "parts.jsonl"


def run_many(
    method: Any,
    model: Structure,
    tokens: Tokens,
    config: Config,
    batch_size: int,
    progress: bool,
    out: str | Path | runs.RunFolder | None,
    record: Mapping[str, Any] | None,
) -> Any:
    """See `Method.__call__`, which calls this with its method, and what the result is to say of where it comes from."""
    size, name = batch_size_of(batch_size), method.name
    kind = result_kind(type(method).run)
    if kind is not None:
        demand_joinable(name, kind)
    part_of(name, config, range(len(tokens)), len(tokens))
    if isinstance(out, runs.RunFolder) and out.shards is not None:
        return _shared(method, model, tokens, config, size, out, kind).with_provenance(record)
    with _shelf(method, model, tokens, config, out, kind) as shelf:
        parts = shelf.parts(name, tokens)
        done = {number for part in parts for number in part.numbers}
        todo = [number for number in range(len(tokens)) if number not in done]
        groups = bucketed([tokens.lengths[number] for number in todo], size, mixed=bool(sides(model.atlas)))
        batches = [sorted(todo[place] for place in group) for group in groups]
        with Progress(name, len(tokens), shown=progress) as told:
            told.add(len(done))
            for part in _results(method, model, tokens, config, batches, kind or Result):
                # A method whose `run` does not say what it returns shows it with its first result.
                if not parts:
                    demand_joinable(name, type(part.result))
                else:
                    demand_alike(name, parts[0], part)
                parts.append(part)
                shelf.keep(part)
                told.add(len(part.numbers))
        result = joined(parts, tokens).with_provenance(record)
        shelf.finish(result)
    return result


def _shared(
    method: Any, model: Structure, tokens: Tokens, config: Config, size: int, run: runs.RunFolder,
    kind: type[Result] | None,
) -> Result:  # fmt: skip
    """The same in a run of several processes, of which each takes batches."""
    kind = _demand_kind(method, kind)
    groups = bucketed(tokens.lengths, size, mixed=bool(sides(model.atlas)))
    batches = list(enumerate(sorted(group) for group in groups))

    def made(batch: tuple[int, list[int]]) -> dict[str, Any]:
        (part,) = _results(method, model, tokens, config, [batch[1]], kind)
        run.result(_folder(batch[0]), part.result)
        return {"part": f"{batch[0]:05}", "prompts": batch[1]}

    prompts = {"prompts": _digest("the prompts", numbering(tokens))}
    run.map(INDEX, made, batches, by=lambda b: b[0], inputs=prompts, beside=lambda b, _: [_folder(b[0])], strict=True)
    parts = [
        Part(numbers, some_rows(tokens, numbers), kind.load(run.path / _folder(number))) for number, numbers in batches
    ]
    return joined(parts, tokens)


def _folder(number: int) -> str:
    return f"{PARTS}/{number:05}"


def _demand_kind(method: Any, kind: type[Result] | None) -> type[Result]:
    if kind is None:
        raise PlanError(
            f"{method.name} with out=: results of earlier batches are read back, so the method's `run` must say which "
            "class it returns: def run(self, model, tokens, config) -> MyResult"
        )
    return kind


def _results(
    method: Any, model: Structure, tokens: Tokens, config: Config, batches: Sequence[Sequence[int]], kind: type[Result]
) -> Iterator[Part]:
    """The results of batches, one by one; errors name the prompts."""
    texts = [some_rows(tokens, numbers) for numbers in batches]
    stream = ((text, part_of(method.name, config, numbers, len(tokens)))
              for text, numbers in zip(texts, batches, strict=True))  # fmt: skip
    results = iter(method.run_batches(model, stream, config))
    for text, numbers in zip(texts, batches, strict=True):
        try:
            result = next(results, None)
        except InterpError as error:
            listed = ", ".join(map(str, numbers))
            raise type(error)(f"{error} (in the batch of prompts {listed}; rows count among these)") from error
        if not isinstance(result, kind):
            said = "methods return a Result" if kind is Result else f"its `run` says that it returns a {kind.__name__}"
            raise PluginError(f"{method.name} returned a {type(result).__name__} for a batch: {said}")
        yield Part(numbers, text, result)


# Settings


def part_of(owner: str, config: Config, numbers: Sequence[int], count: int) -> Config:
    """The settings of some of so many prompts.

    Raises:
        PlanError: a setting with another number of items than there are prompts, or one that cannot be split.
    """
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        part = _part(f"{owner}: {name}", value, numbers, count, name in config.PER_PROMPT)
        if part is not value:
            changed[name] = part
    return config.model_copy(update=changed) if changed else config


def _part(what: str, value: Any, numbers: Sequence[int], count: int, per_prompt: bool) -> Any:
    if isinstance(value, Mask) or (isinstance(value, Tensor) and value.ndim == 2 and value.dtype == torch.bool):
        raise PlanError(f"{what} is a mask of the padded batch, which batches cannot share; give positions per row")
    if isinstance(value, Score):
        return value.of_rows(numbers, count)
    if isinstance(value, PerRow):
        return PerRow(tuple(_chosen(what, value.rows, numbers, count)))
    if per_prompt and isinstance(value, Tokens):
        return value if len(value) == 1 else some_rows(_counted(what, value, count), numbers)
    if per_prompt and isinstance(value, (list, tuple)):
        return type(value)(_chosen(what, value, numbers, count))
    if per_prompt and isinstance(value, Tensor) and value.ndim:
        return _counted(what, value, count)[list(numbers)]
    if isinstance(value, (list, tuple)) and any(isinstance(item, (PerRow, Mask, Score)) for item in value):
        return type(value)(_part(what, item, numbers, count, False) for item in value)
    return value


def _chosen(what: str, items: Sequence[Any], numbers: Sequence[int], count: int) -> list[Any]:
    items = _counted(what, items, count)
    return [items[number] for number in numbers]


def _counted(what: str, items: Any, count: int) -> Any:
    if len(items) != count:
        raise PlanError(f"{what} has {len(items)} items for {count} prompts; give one per prompt, or one for all")
    return items


# Folders


class Shelf:
    """Where results of batches are kept: nowhere."""

    def parts(self, owner: str, tokens: Tokens) -> list[Part]:
        """Those that are there."""
        return []

    def keep(self, part: Part) -> None:
        """Keep the result of one batch."""

    def finish(self, result: Result) -> None:
        """Keep the result of all prompts."""


class FolderShelf(Shelf):
    """Where results of batches are kept: in a run folder, `parts/00000` and so on, noted in `parts.jsonl`."""

    def __init__(self, run: runs.RunFolder, rows: runs.Rows, kind: type[Result]) -> None:
        self.run, self.rows, self.kind = run, rows, kind

    def parts(self, owner: str, tokens: Tokens) -> list[Part]:
        """Those that are there, whole, and not done again later."""
        last = {number: row["part"] for row in self.rows for number in row["prompts"]}
        parts: list[Part] = []
        for row in list(self.rows):
            numbers, name = row["prompts"], row["part"]
            if all(last[number] == name for number in numbers) and self.run.kept(f"{PARTS}/{name}"):
                result = self.kind.load(self.run.path / PARTS / name)
                parts.append(Part(numbers, some_rows(tokens, numbers), result))
        return parts

    def keep(self, part: Part) -> None:
        """Write one, then note it."""
        name = f"{len(self.rows):05}"
        self.run.result(f"{PARTS}/{name}", part.result)
        self.rows.add({"part": name, "prompts": list(part.numbers)})

    def finish(self, result: Result) -> None:
        """Write the whole beside them."""
        self.run.put(result.files(), stage="result")


@contextmanager
def _shelf(
    method: Any,
    model: Structure,
    tokens: Tokens,
    config: Config,
    out: str | Path | runs.RunFolder | None,
    kind: type[Result] | None,
) -> Iterator[Shelf]:
    if out is None:
        yield Shelf()
        return
    if not isinstance(out, (str, Path, runs.RunFolder)):
        raise PlanError(wrong("out=", "a folder", out))
    kind = _demand_kind(method, kind)
    if isinstance(out, runs.RunFolder):
        with out.rows(INDEX, key="part", inputs={"prompts": _digest("the prompts", numbering(tokens))}) as rows:
            yield FolderShelf(out, rows, kind)
        return
    settings = {**identified(method.name, config), "code": _code(method)}
    settings["prompts"] = _digest("the prompts", numbering(tokens))
    run = runs.open(
        out, settings, recipe=method.name, model=model, free=("progress",), say=lambda line: None, kind="result"
    )
    run.claim(["result.json", "result.safetensors"], stage="result")
    with run, run.rows(INDEX, key="part") as rows:
        yield FolderShelf(run, rows, kind)


def identified(owner: str, config: Config) -> Mapping[str, Any]:
    """Settings as a run's record has them; what JSON cannot hold by its digest.

    Raises:
        PlanError: something that cannot be told from another one the next time.
    """
    return plain_fields(config, lambda name, setting: _digest(f"{owner}: {name}", setting))


def _digest(what: str, value: Any) -> str:
    try:
        return identity(value)
    except NoIdentityError as error:
        raise PlanError(
            f"{what} cannot be told from another one the next time that this folder is used: {error}. Give a function "
            "as ic.keyed(function, key), with another key whenever it changes, or run without out="
        ) from error


def _code(method: Any) -> str:
    """Digest of the file that a method is written in; "" where there is none."""
    module = inspect.getmodule(type(method))
    try:
        return sha256(inspect.getsource(module)) if module is not None else ""
    except (OSError, TypeError):
        return ""
