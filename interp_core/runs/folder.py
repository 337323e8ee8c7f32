"""The folder of a run: whose it is, who worked in it, what of it is done. Pages: docs/run_folders.md."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, PlanError
from ..files import create, sweep_drafts, write
from .identity import bound_record, difference, digest, model_difference, plain, safe_name
from .leases import Leases, holder
from .mapping import POLL
from .rows import Folder
from .session import RunSession, now, sessions
from .stages import json_text

if TYPE_CHECKING:
    from ..structure import Structure

FORMAT = "interp-run/1"
MANIFEST, DONE, RECORD = "manifest.json", "DONE", "record"
COMMAND, LEAD = "command.json", "lead.lease"
STATES = ("pending", "running", "completed", "failed", "stopped", "skipped", "dry_run")
"""What a part can be."""
OVER = ("completed", "skipped")
"""States of parts that a run need not come back to."""
PLANNING: ContextVar[Mapping[str, Any] | None] = ContextVar("planning", default=None)
"""The command that other processes will carry out on the next run folder that is opened, which this one only plans."""
WORKING: ContextVar[Path | None] = ContextVar("working", default=None)
"""The folder of the planned run that this process works at."""


class Planned(BaseException):
    """The run that was to be planned is: its folder. Not an error, and nothing but who plans may catch it."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.home = home


class RunFolder(Folder):
    """A run and its files; made by `runs.open` and `runs.publish`, and used in a `with` block.

    Attributes:
        home: where `manifest.json`, `DONE` and the record are; `path`, where files go, but for a published tree.
        identity: recipe, settings, model: what makes it this run.
        shared: whether other runs write below `path` too.
        overwrite: whether files that this run did not write may be replaced.
        session: this process at work on it.
        leases: what this process has of it.
        shards: in how many its items are divided, for several processes at once; None: one process does it all.
        say: gets a line about every stage.
    """

    session: RunSession
    leases: Leases

    def __init__(
        self,
        path: Path,
        home: Path,
        identity: Mapping[str, Any],
        *,
        shared: bool = False,
        overwrite: bool = False,
        say: Callable[[str], None] = print,
        kind: str = "run",
    ) -> None:
        super().__init__(path)
        self.root, self.home, self.identity = self, home, dict(identity)
        self.shared, self.overwrite, self.say, self.kind = shared, overwrite, say, kind
        self.record = home / RECORD
        self.is_open = self._began = self._in_item = False
        self.check()
        command = self.read(self.record / COMMAND)
        self.shards: int | None = None if command is None else int(command["shards"])

    # Whose it is

    def check(self) -> None:
        """Whether the folder is of this run, or of none; changes nothing.

        Raises:
            PlanError: it is another's, naming what differs.
        """
        if self._is_bound():
            self._compare()

    def _compare(self) -> None:
        """Hold what is asked for against what the record says."""
        before = self.read(self.record / "run.json")
        if before is None:
            return
        if before["format"] != FORMAT:
            raise PlanError(f"{self.home} holds a run of format {before['format']}, not {FORMAT}; give another folder")
        if before["recipe"] != self.identity["recipe"]:  # whose settings are other ones in any case
            differs = [f"of {before['recipe']!r}, not of {self.identity['recipe']!r}"]
        else:
            differs = [difference(before["settings"], self.identity["settings"], self.identity["free"])]
        model = self.read(self.record / "model.json")
        if model is not None and self.identity["model"] is not None:
            differs.append(model_difference(model, self.identity["model"]))
        if text := "; ".join(part for part in differs if part):
            clear = ", or --overwrite" if self.kind == "run" else ""
            raise PlanError(f"{self.home} holds another {self.kind}: {text}; give another folder{clear}")

    def bind(self, model: Structure) -> None:
        """The model, where it was not there when the folder was opened; what is made from here on is its.

        Raises:
            PlanError: the folder's numbers are another model's.
        """
        self.identity["model"] = bound_record(model)
        self.check()
        self._bind()

    def _bind(self) -> None:
        record = json_text(self.identity["model"])
        if not self._is_bound():
            write(self.record / "model.json", record)
        elif not create(self.record / "model.json", record):
            self.check()  # another process may have been first

    def _is_bound(self) -> bool:
        """Whether something was made: a folder in which nothing was may become any run's."""
        return any(any((self.record / name).rglob("*.*")) for name in ("stages", "rows"))

    # Being at work

    def __enter__(self) -> RunFolder:
        self._demand_planned()
        self._sweep()
        kept = {name: self.identity[name] for name in ("recipe", "settings", "passed", "free", "dataset", "hash")}
        text = json_text({"format": FORMAT, **kept, "created": now()})
        if not self._is_bound():
            write(self.record / "run.json", text)
            (self.record / "model.json").unlink(missing_ok=True)
        elif not create(self.record / "run.json", text):
            self.check()
        if self.identity["model"] is not None:
            self._bind()
        if (planning := PLANNING.get()) is not None:
            write(self.record / COMMAND, json_text(planning))
            raise Planned(self.home)
        self.session = RunSession(self.record / "sessions")
        self.leases = Leases(self.session.id, file=self.session.file)
        self.is_open = True
        self._write_manifest()
        return self

    def _demand_planned(self) -> None:
        """Refuse another run than the one that was planned.

        Raises:
            PlanError: its settings, data or model have changed since.
        """
        home = WORKING.get()
        if home is None:
            return
        if home == self.home.resolve():
            self._compare()
            return
        planned = self.read(home / RECORD / "run.json") or {}
        if planned.get("recipe") == self.identity["recipe"]:
            differs = difference(planned["settings"], self.identity["settings"], self.identity["free"])
            raise PlanError(f"{home} was planned for another run: {differs or 'another model'}; plan it anew")

    def _sweep(self) -> None:
        """Delete drafts that killed processes left; in a tree only beside the files of this run."""
        sweep_drafts(self.home)
        if self.shared:
            notes = [self.read(path) for kind in ("stages", "drafts") for path in (self.record / kind).rglob("*.json")]
            written = (self.path / note["folder"] / name for note in notes if note for name in note["files"])
            for folder in {path.parent for path in written}:
                sweep_drafts(folder, deep=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open = False
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        state = "finished" if error is None else "stopped" if stopped else "failed"
        reason = "" if error is None else f"{type(error).__name__}: {error}"
        if stopped and error is not None:
            kept = f"what is done is kept in {self.home}, and the same command goes on there"
            error.add_note(kept if self._is_bound() else f"nothing was done yet in {self.home}")
        # What went wrong may be that the disk is full: then its error is told, not that of the record.
        with suppress(*[OSError] * (error is not None)):
            self.session.end(state, reason)
            if error is None and self.may_lead() and all(part["state"] in OVER for part in self.parts()):
                counts = Counter(part["state"] for part in self.parts())
                done = {"at": now(), "session": self.session.id, "stages": len(self.stages()), "parts": dict(counts)}
                write(self.home / DONE, json_text(done))
            self._write_manifest()
        self.leases.close()

    def begin_change(self) -> None:
        """Called before anything is made: a run that is at work is not done.

        Raises:
            PlanError: outside of the `with` block.
        """
        if not self.is_open:
            raise PlanError(f"the run in {self.home} is not open: write in the block of `with runs.open(…) as run`")
        if not self._began:
            self._compare()  # until something is made, a process with other settings may have taken the folder
            (self.home / DONE).unlink(missing_ok=True)
            self._began = True

    @property
    def done(self) -> bool:
        """Whether all of it was done when it was last left."""
        return (self.home / DONE).is_file()

    def _write_manifest(self) -> None:
        """Put the manifest together from the record, whose files are written by one process each."""
        write(self.home / MANIFEST, json_text(manifest(self.home)))

    # Several processes

    def leads(self, is_there: Callable[[], bool]) -> bool:
        """Whether this process is to write what is not a row: always, where it is alone or within an item; else one of
        those at work is, and this one waits until it leads or `is_there` says that the other has written it."""
        if self.shards is None or self._in_item or self.leases.has(self._lead):
            return True
        while not is_there():
            if self.may_lead():
                return not is_there()  # it may have been written between the two
            time.sleep(POLL)
        return False

    def may_lead(self) -> bool:
        """Whether this process leads, or does from here on."""
        return self.shards is None or self.leases.take(self._lead)

    def leader(self) -> str:
        """The session that leads; "" if none does."""
        return str((holder(self._lead) or {}).get("session", ""))

    @property
    def _lead(self) -> Path:
        return self.record / LEAD

    @contextmanager
    def item(self) -> Iterator[None]:
        """An item's work: what it writes is its own."""
        self._in_item = True
        try:
            yield
        finally:
            self._in_item = False

    def depends(self) -> dict[str, Any]:
        """What all rows of this run depend on, by which plans of shards are told apart."""
        model = self.identity["model"]
        return {"run": self.identity["hash"], "model": model and model["fingerprint"]}

    # Parts

    def part(
        self,
        name: str,
        inputs: Mapping[str, Any] | None = None,
        folder: str | None = None,
        watch: Callable[[Part], None] | None = None,
    ) -> Part:
        """A part of the run with files of its own: a task, a question, a data set.

        Args:
            name: as users know it; may be any text.
            inputs: what it depends on beside the run's settings and model.
            folder: where its files go, below the run's (default: a safe form of its name).
            watch: called after every change of its state.

        Raises:
            PlanError: the part's files are of other inputs, naming what differs.
        """
        return Part(self, name, plain(dict(inputs or {}), "inputs"), folder, watch)

    def parts(self) -> list[dict[str, Any]]:
        """State of every part on record, in the order in which they first came."""
        return parts(self.home)

    def owner(self, path: Path) -> str:
        """For messages, which other run of a published tree wrote a file."""
        for home in sorted(self.home.parent.glob("*/")):
            other = self.read(home / RECORD / "run.json")
            if other is None or home == self.home:
                continue
            for note in (home / RECORD / "stages").rglob("*.json"):
                data = self.read(note)
                if data and any(self.path / data["folder"] / name == path for name in data["files"]):
                    differs = difference(other["settings"], self.identity["settings"], self.identity["free"])
                    return f", written by {home.name} ({differs or 'another model'})"
        return ", and no run of this tree wrote it"

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        """A file of the record; None where there is none.

        Raises:
            LoadError: it is damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise LoadError(f"{path} is damaged ({error}); delete it, and what it is about is made again") from error
        return dict(data)


class Part(Folder):
    """A part of a run: a folder with its own inputs and stages, and a state.

    Attributes:
        name: as users know it.
        data: its record: state, reason, times, inputs, and the error it failed with.
    """

    def __init__(
        self,
        root: RunFolder,
        name: str,
        inputs: Mapping[str, Any],
        folder: str | None,
        watch: Callable[[Part], None] | None,
    ) -> None:
        place = folder or safe_name(name)
        super().__init__(root._inside(place), place)
        self.root, self.name, self.watch = root, name, watch
        self.file = root.record / "parts" / f"{place}.json"
        before = root.read(self.file)
        if before is not None and self.has_files and (differs := difference(before["inputs"], inputs)):
            raise PlanError(
                f"{self.path} holds {name!r} of other inputs: {differs}; give another folder, or delete it with "
                f"{self.file}, {self._notes} and {root.record / 'rows' / place}"
            )
        fresh = {"name": name, "folder": place, "state": "pending", "reason": "", "created": now(), "updated": None}
        self.data: dict[str, Any] = {**(before or fresh), "inputs": dict(inputs)}

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return str(self.data["state"])

    @property
    def has_files(self) -> bool:
        """Whether something of it was made."""
        rows = self.root.record / "rows" / self.prefix
        return any(self._notes.rglob("*.json")) or any(any(rows.rglob(kind)) for kind in ("*.journal", "*.jsonl"))

    def set(self, state: str, reason: str = "", **more: Any) -> None:
        """Change its state, and note it; `more` goes on record too."""
        self.root.begin_change()
        kept = {key: value for key, value in self.data.items() if key != "error"}
        self.data = kept | {"state": state, "reason": reason, "updated": now(), "session": self.root.session.id} | more
        if self.root.may_lead():
            write(self.file, json_text(self.data))
        if self.watch is not None:
            self.watch(self)

    @contextmanager
    def attempt(
        self, *, strict: bool = False, details: Callable[[Exception], Mapping[str, Any]] = lambda error: {}, **more: Any
    ) -> Iterator[Part]:
        """Work on it. An error is noted with the stage and goes no further, so that other parts have their turn.

        Args:
            strict: errors are raised too.
            details: what is noted of an error beside stage, class, message and traceback.
            more: what goes on record beside the state.
        """
        self.set("running", **more)
        try:
            yield self
        except (KeyboardInterrupt, SystemExit):
            with suppress(OSError):
                self.set("stopped", f"stopped at {self.doing or self.last}")
            raise
        except Exception as error:
            self.fail(error, **details(error))
            if strict:
                raise
        else:
            if self.state == "running":
                self.set("completed")

    def fail(self, error: Exception, **more: Any) -> None:
        """Note an error with the stage that it came from."""
        import traceback

        stage, message = self.doing or self.last, str(error) or repr(error)
        noted = {"stage": stage, "error_class": type(error).__name__, "message": message}
        noted["traceback"] = "".join(traceback.format_exception(error))
        self.set("failed", f"{stage}: {message}", error=noted | more)


def parts(home: str | Path) -> list[dict[str, Any]]:
    """State of every part of a run, from its files, in the order in which they first came."""
    folder = Path(home) / RECORD / "parts"
    listed = [data for path in folder.rglob("*.json") if (data := RunFolder.read(path))]
    return sorted(listed, key=lambda part: (part["created"], part["name"]))


def manifest(home: str | Path) -> dict[str, Any]:
    """What a run is and how it went, from the files of its record: recipe, settings as passed and as resolved, seeds,
    model and tokenizer, sessions with machine, versions, times and memory, parts, and whether it is done.

    Raises:
        LoadError: the folder holds no run.
    """
    home = Path(home)
    run = RunFolder.read(home / RECORD / "run.json")
    if run is None:
        raise LoadError(f"{home} holds no run: there is no {RECORD}/run.json in it; give the folder of a manifest.json")
    listed = sessions(home / RECORD / "sessions")
    model = RunFolder.read(home / RECORD / "model.json")
    states = Counter(part["state"] for part in parts(home))
    last = listed[-1]["state"] if listed else "pending"
    return run | {
        "state": "done" if (home / DONE).is_file() else last,
        "seeds": {name: value for name, value in run["settings"].items() if name == "seed" or name.endswith("_seed")},
        "model": model,
        "dtype": model and model["parts"]["dtype"],
        "attention_implementation": model and model["parts"]["attention"],
        "parts": dict(states),
        "sessions": listed,
    }


def identity_of(
    recipe: str,
    settings: Mapping[str, Any] | Any,
    model: Structure | Mapping[str, Any] | None,
    dataset: str,
    free: Iterable[str],
    passed: Mapping[str, str] | None,
) -> dict[str, Any]:
    """What makes a run this run."""
    resolved, free = plain(settings), sorted(free)
    record = model if model is None or isinstance(model, Mapping) else bound_record(model)
    bound = {name: value for name, value in resolved.items() if name not in free}
    parts = record and (record["parts"], record["tokenizer"])
    return {
        "recipe": recipe, "settings": resolved, "passed": None if passed is None else dict(passed), "free": free,
        "dataset": dataset, "model": record, "hash": digest([recipe, bound, parts])[:8],
    }  # fmt: skip
