"""Files of a run, stage by stage: what a stage made is kept while it is whole and of the same inputs.

Before a stage's files are written, its note is: inputs, and the digest of every file. So a stage is kept if, and only
if, its note has these inputs and every file the noted digest, whatever was killed in between; and a file is known to be
the run's own from before it is there.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from ..errors import InterpError, PlanError, nearest
from ..files import create, file_sha256, pt_bytes, read_pt, safetensors_bytes, sha256, without_folders, write
from .identity import difference, digest, plain
from .leases import Leases
from .session import RunSession, now

if TYPE_CHECKING:
    from ..report import Answer
    from ..structure import Structure

Files = Mapping[str, str | bytes]
"""What files are to hold, by their names below a folder."""
T = TypeVar("T")


def json_text(value: Any) -> str:
    """A value as the text of a JSON file, in the order of its keys."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def json_lines(rows: Iterable[Any]) -> str:
    """A file of JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A CSV file; floats are read back to the bit.

    Args:
        columns: which, in this order (default: those of the first row; other rows have no others).
    """
    rows = list(rows)
    text = io.StringIO()
    names = list(rows[0]) if columns is None and rows else list(columns or ())
    writer = csv.DictWriter(text, names, extrasaction="raise" if columns is None else "ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@runtime_checkable
class Root(Protocol):
    """What stages ask of the run that they are part of; see `RunFolder`."""

    record: Path
    identity: dict[str, Any]
    session: RunSession
    shared: bool
    overwrite: bool
    shards: int | None
    leases: Leases
    say: Callable[[str], None]

    def begin_change(self) -> None:
        """See `RunFolder`."""

    def owner(self, path: Path) -> str:
        """See `RunFolder`."""

    def read(self, path: Path) -> dict[str, Any] | None:
        """See `RunFolder`."""

    def leads(self, is_there: Callable[[], bool]) -> bool:
        """See `RunFolder`."""

    def may_lead(self) -> bool:
        """See `RunFolder`."""

    def leader(self) -> str:
        """See `RunFolder`."""

    def item(self) -> AbstractContextManager[None]:
        """See `RunFolder`."""

    def depends(self) -> dict[str, Any]:
        """See `RunFolder`."""


class Stages:
    """A folder of a run and the stages in it: the run's own, or that of a part.

    Attributes:
        path: where files go.
        prefix: of the names of stages in the run's record; "" for the run itself.
        doing: what is being done, in the words of whoever does it, for messages about failures; the last stage's name
            where nobody says.
    """

    root: Root

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.doing = self.last = ""
        self._begun: dict[str, tuple[float, str]] = {}

    # Keeping and making

    def stage(
        self,
        name: str,
        make: Callable[[], T],
        *,
        inputs: Mapping[str, Any] | None = None,
        after: Sequence[str] = (),
        read: Callable[[Path], T] | None = None,
        data: Callable[[T], str | bytes] | None = None,
        shared: bool = False,
    ) -> T:
        """The value of a stage that is one file: read if the file is whole and of these inputs, else made and written.

        Args:
            name: of the file; `.json`, `.safetensors` (tensors by name) and `.pt` need no `read` and `data`.
            make: works the value out.
            inputs: what it depends on beside the run's settings and model: plain data, digests.
            after: stages whose files it is made of; it is made again when they change.
            read: gives the value of the file; a LoadError or ValueError means that it is made again.
            data: what the file holds for a value.
            shared: `make` takes rows of `map`, so that every process at work on the run calls it; one writes the file.

        Raises:
            PlanError: a file of this name that the run did not write.
        """
        if read is None or data is None:
            read, data = _codec(name)
        self.last = name
        if self.kept(name, inputs=inputs, after=after, shared=shared):
            try:
                return read(self.path / name)
            except (InterpError, ValueError) as error:
                self._again(name, str(error))
        value = make()
        content = data(value)
        self.put({name: content}, stage=name, inputs=inputs, after=after)
        self.root.say(f"  made {name}")
        # What a later run reads is what this one goes on with: JSON has no tuples and no keys but text.
        return read(self.path / name) if shared or name.endswith(".json") else value

    def kept(
        self, stage: str, *, inputs: Mapping[str, Any] | None = None, after: Sequence[str] = (), shared: bool = False
    ) -> bool:
        """Whether a stage's files are all there, whole and of these inputs. If they were made and are not, why is said
        and noted. Of several processes at work on the run one gets False; the others wait until it has made them,
        unless all of them make it: `shared`."""

        def is_whole() -> bool:
            note = self._note(stage)
            return note is not None and not self._stale(note, self._inputs(inputs, after))

        if not is_whole() and (shared or self.root.leads(is_whole)):
            note = self._note(stage)
            self._begun[stage] = time.perf_counter(), ""
            if note is not None:
                self._again(stage, self._stale(note, self._inputs(inputs, after)))
            return False
        self._begun[stage] = time.perf_counter(), ""
        self.root.say(f"  kept {stage}")
        return True

    def put(
        self,
        files: Files,
        *,
        stage: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        after: Sequence[str] = (),
        binds: bool = True,
    ) -> list[str]:
        """Write a stage's files, each whole; those that are the same already are left alone. Says what became of each.

        Args:
            files: by name below this folder.
            stage: what they are called together (default: the first file's name).
            inputs, after: as `stage`.
            binds: false for files that come before any number: a folder with no others may become another run's.

        Raises:
            PlanError: one that the run did not write is in the way; nothing is written then.
        """
        if not files:
            return []
        stage = stage or next(iter(files))
        self.claim(files, stage=stage)
        digests = {name: sha256(content) for name, content in files.items()}

        def is_put() -> bool:  # by who leads; what that one writes may differ in seconds that it took
            note = self._note(stage)
            if note is None or set(note["files"]) != set(digests) or not self.has_made(stage):
                return False
            return bool(note["files"] == digests or note["session"] == self.root.leader())

        if not self.root.leads(is_put):
            return []
        note, before = self._note(stage), {name: file_sha256(self.path / name) for name in files}
        began, why = self._begun.pop(stage, (None, ""))
        self.root.begin_change()
        entry = {
            "folder": self.prefix, "inputs": self._inputs(inputs, after), "files": digests, "before": before,
            "made": now(), "why": why, "seconds": None if began is None else round(time.perf_counter() - began, 3),
            "session": self.root.session.id,
        }  # fmt: skip
        if note is None or any(note[key] != entry[key] for key in ("inputs", "files")) or before != digests:
            write(self._note_file(stage, "stages" if binds else "drafts"), json_text(entry))
        said = []
        for name, content in files.items():
            path = self.path / name
            if before[name] == digests[name]:
                said.append(f"{path}  same as before")
            elif before[name] is None and self.root.shared:
                if not create(path, content):
                    raise self._clash(name)
                said.append(f"{path}  written")
            else:
                write(path, content)
                said.append(f"{path}  {'written' if before[name] is None else 'replaced'}")
        return said

    def claim(self, files: Iterable[str], *, stage: str | None = None) -> None:
        """Refuse now what could not be written later.

        Args:
            files: names below this folder, or what they will hold by name: the same content is no clash.
            stage: as in `put`, of which one call writes them all (default: each is a stage of its own).

        Raises:
            PlanError: a file that this run did not write.
        """
        contents = files if isinstance(files, Mapping) else {}
        for name in files:
            note = self._note(stage or name)
            there = file_sha256(self._inside(name))
            if there is None or self.root.overwrite:
                continue
            owned = note is not None and name in note["files"]
            if owned and self.root.shared:  # another run, or a person, may have put another in its place
                owned = there in (note["files"][name], note["before"].get(name))  # type: ignore[index]
            if not owned and not (name in contents and sha256(contents[name]) == there):
                raise self._clash(name)

    # Kinds of files

    def json(self, name: str, value: Any) -> None:
        """Write a value as a JSON file."""
        self.put({name: json_text(value)})

    def table(self, name: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
        """Write rows as a CSV file; see `csv_text`."""
        self.put({name: csv_text(rows, columns)})

    def tensors(self, name: str, tensors: Mapping[str, Any], axes: Mapping[str, str] | None = None) -> None:
        """Write tensors by name as a safetensors file, with the names of their axes ("layer head d_head")."""
        self.put({name: safetensors_bytes(tensors, axes)})

    def figure(self, name: str, draw: Callable[[Path], Any]) -> None:
        """Write a picture: `draw` is given the path of a draft."""
        with TemporaryDirectory() as folder:
            draft = Path(folder) / Path(name).name
            draw(draft)
            self.put({name: draft.read_bytes()})

    def result(self, name: str, result: Any) -> None:
        """Write a method's `Result` into a folder, as `result.save` does."""
        self.put({f"{name}/{file}": content for file, content in result.files().items()}, stage=name)

    def page(self, name: str, answer: Answer, model: Structure | None = None, *, binds: bool = True) -> None:
        """Write the page that an answer makes, with what the run cost, its settings, and how it was made, folded away.

        One that says the same is kept, with its cost, date and command: those of the run that made it.

        Args:
            model: None where it was not loaded, since all was done before.
            binds: as `put`.
        """
        from ..provenance import run_provenance

        bound = self.root.read(self.root.record / "model.json")
        record = answer.provenance or run_provenance(self.root.identity, answer.question, model, bound)
        details = {title: without_folders(text) for title, text in answer.details.items()}
        answer = answer._replace(further=[without_folders(sentence) for sentence in answer.further])
        told = answer._replace(details=details, provenance={**record, "date": "", "command": ""})
        inputs = {"content": digest(self._page(told))}
        if not self.kept(name, inputs=inputs):
            details |= {"What it cost": self.root.session.cost()}
            text = self._page(answer._replace(provenance=record, details=details))
            self.put({name: text}, inputs=inputs, binds=binds)

    def _page(self, answer: Answer) -> str:
        """A page without the folders that a picture or a reason may name."""
        from ..report.answer import answer_page

        text = answer_page(answer)
        for folder in (self.path.absolute(), Path.cwd(), Path.home()):
            text = text.replace(f"{folder}/", "") if len(folder.parts) > 1 else text
        return text

    # Notes

    def _again(self, stage: str, why: str) -> None:
        self._begun[stage] = time.perf_counter(), why
        self.root.say(f"  {stage} is made again: {why}")

    def _stale(self, note: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
        """Why the files of a note cannot be kept; "" if they can."""
        if differs := difference(note["inputs"], inputs):
            return differs
        for name, noted in note["files"].items():
            there = file_sha256(self.path / name)
            if there != noted:
                return f"{name} is missing" if there is None else f"{name} is not as it was written"
        return ""

    def _inputs(self, inputs: Mapping[str, Any] | None, after: Sequence[str]) -> dict[str, Any]:
        named = dict(plain(dict(inputs or {}), "inputs"))
        for stage in after:
            note = self._note(stage)
            if note is None:
                raise PlanError(f"there is no stage {stage!r} to come after. {nearest(stage, self.stages())}")
            named[f"what {stage} made"] = digest(note["files"])
        return named

    def stages(self) -> list[str]:
        """Names of the stages that have begun to be written."""
        folder = self._notes
        return sorted(str(path.relative_to(folder).as_posix())[:-5] for path in folder.rglob("*.json"))

    def has_made(self, stage: str) -> bool:
        """Whether a stage's files are all as they were written, of whatever inputs."""
        note = self._note(stage)
        return note is not None and not self._stale(note, note["inputs"])

    def damaged(self) -> list[str]:
        """What is missing or not as it was written, of all files of all stages; reads them."""
        notes = [(self._note(stage) or {"files": {}})["files"] for stage in self.stages()]
        return [name for files in notes for name, noted in files.items() if file_sha256(self.path / name) != noted]

    @property
    def _notes(self) -> Path:
        return self.root.record / "stages" / self.prefix

    def _note_file(self, stage: str, kind: str = "stages") -> Path:
        self._inside(stage)
        return self.root.record / kind / self.prefix / f"{stage}.json"

    def _note(self, stage: str) -> dict[str, Any] | None:
        note = self.root.read(self._note_file(stage))
        return self.root.read(self._note_file(stage, "drafts")) if note is None else note

    def _inside(self, name: str) -> Path:
        """Where a file goes, if that is below the folder."""
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise PlanError(f"{name!r} does not name a file below {self.path}; names from data go through safe_name")
        return self.path / name

    def _clash(self, name: str) -> PlanError:
        path = self.path / name
        if not self.root.shared:
            ways = "move it away, give another folder, or --overwrite"
            return PlanError(f"{path} is there, and this run did not write it; {ways}")
        return PlanError(f"{path} is there{self.root.owner(path)}; give --overwrite to replace it, or another folder")


def _codec(name: str) -> tuple[Callable[[Path], Any], Callable[[Any], str | bytes]]:
    """How files of a kind are read and written."""
    kind = Path(name).suffix
    if kind == ".json":
        return lambda path: json.loads(path.read_text(encoding="utf-8")), json_text
    if kind == ".safetensors":
        from safetensors.torch import load_file

        return load_file, safetensors_bytes
    if kind == ".pt":
        return lambda path: read_pt(path, "a stage's values"), pt_bytes
    raise PlanError(f"a stage in {name} needs read= and data=; .json, .safetensors and .pt do not")
