"""A plan: what to read and what to change in one forward pass, as plain data.

Plans print, compare, hash and pickle, and have a JSON form in which tensors stand apart, by their hash. Whether a plan
fits a model is checked when it is compiled for it, before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import LoadError, PlanError, several, wrong
from .files import folder_of
from .sites import TENSOR_OPS, Edit, Site
from .tensors import digest

FORMAT = "interp-plan/1"


@dataclass(frozen=True)
class Plan:
    """Reads and edits.

    Attributes:
        reads: sites whose values the run keeps.
        edits: changes, applied in this order where they meet at one site.
    """

    reads: tuple[Site, ...] = ()
    edits: tuple[Edit, ...] = ()

    @staticmethod
    def of(reads: Iterable[Site | str] | Site | str = (), edits: Iterable[Edit] | Edit = ()) -> Plan:
        """A plan from sites (or their text form) and edits, single or several.

        Raises:
            PlanError: something that is neither.
            SiteError: a text that names no site.
        """
        changes = several_edits(edits)
        sites = tuple(Site.parse(item) if isinstance(item, str) else item for item in several_sites(reads))
        for item in sites:
            if not isinstance(item, Site):
                raise _no_sites(item)
        for change in changes:
            if not isinstance(change, Edit):
                raise _no_edits(change)
        return Plan(sites, changes)

    def describe(self) -> str:
        """One line per read and edit."""
        lines = [f"read  {site}" for site in self.reads] + [f"edit  {edit}" for edit in self.edits]
        return "\n".join(lines) or "nothing to read or edit"

    def to_json(self) -> dict[str, Any]:
        """JSON form; tensors appear by hash, see `tensors`.

        Raises:
            PlanError: a plan with `apply`, whose function is not data.
        """
        return {
            "format": FORMAT,
            "reads": [str(site) for site in self.reads],
            "edits": [_edit_json(edit) for edit in self.edits],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the edits by hash."""
        return {digest(edit.value): edit.value for edit in self.edits if edit.op in TENSOR_OPS}

    @staticmethod
    def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan of a JSON form.

        Raises:
            PlanError: another format, or a tensor that is missing.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise PlanError(
                f"this is {data.get('format') if isinstance(data, Mapping) else data!r:.60}, not {FORMAT!r}"
            )
        reads = several("reads", "a list of sites", data.get("reads", ()), PlanError)
        edits = several("edits", "a list of edits", data.get("edits", ()), PlanError)
        return Plan(
            tuple(Site.parse(text) for text in reads), tuple(_edit_from_json(item, tensors or {}) for item in edits)
        )

    def save(self, folder: str | Path) -> None:
        """Write `plan.json`, and `plan.safetensors` if edits carry tensors."""
        from safetensors.torch import save_file

        folder = folder_of("save", folder)
        folder.mkdir(parents=True, exist_ok=True)
        if tensors := self.tensors():
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / "plan.safetensors")
        (folder / "plan.json").write_text(json.dumps(self.to_json(), indent=1))

    @staticmethod
    def load(folder: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            LoadError: no plan there, or not readable.
            PlanError: another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder_of("load", folder) / "plan.json"
        if not path.is_file():
            raise LoadError(f"{folder} holds no plan.json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} is not JSON: {error}") from error
        stored = path.with_name("plan.safetensors")
        try:
            tensors = load_file(stored) if stored.is_file() else {}
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(f"{stored} is damaged ({error}); save the plan again") from error
        # The format has no checksum, and the names are digests of what should be there.
        for key, tensor in tensors.items():
            if digest(tensor) != key:
                raise LoadError(f"{stored} is damaged: the numbers of {key[:12]}… are not those that were saved")
        return Plan.from_json(data, tensors)


def several_sites(read: Any) -> tuple[Any, ...]:
    """What was given as `read=`, in a tuple.

    Raises:
        PlanError: something that is no site and cannot be gone through.
    """
    if isinstance(read, (Site, str)):
        return (read,)
    if isinstance(read, Edit) or not isinstance(read, Iterable):
        raise _no_sites(read)
    return several("read=", "sites", read, PlanError)


def several_edits(edits: Any) -> tuple[Any, ...]:
    """What was given as `edits=`, in a tuple.

    Raises:
        PlanError: something that is no edit and cannot be gone through.
    """
    if isinstance(edits, Edit):
        return (edits,)
    if isinstance(edits, str) or not isinstance(edits, Iterable):
        raise _no_edits(edits)
    return several("edits=", "edits", edits, PlanError)


def _no_sites(value: Any) -> PlanError:
    hint = ": an edit goes into edits=, as in run(text, edits=S.z[3].zero())" if isinstance(value, Edit) else ""
    return PlanError(wrong("read=", "sites like S.resid_post[3]", value) + hint)


def _no_edits(value: Any) -> PlanError:
    hint = ": say what to do there, .set(value), .add(value), .zero(), …" if isinstance(value, Site) else ""
    return PlanError(wrong("edits=", "edits like S.z[3, 5].zero()", value) + hint)


def _edit_json(edit: Edit) -> dict[str, Any]:
    value = edit.value
    if edit.op == "apply":
        raise PlanError(f"{edit}: a function has no JSON form; use set, add, scale, zero or project")
    if isinstance(value, Tensor):
        value = {"tensor": digest(value), "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return {"site": str(edit.site), "op": edit.op, "value": _listed(value)}


def _edit_from_json(item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    if not isinstance(item, Mapping) or not isinstance(item.get("op"), str):
        raise PlanError(wrong("an edit of a plan", '{"site": …, "op": …, "value": …}', item))
    value = item.get("value")
    if isinstance(value, Mapping):
        key = value.get("tensor")
        if not isinstance(key, str) or key not in tensors:
            raise PlanError(
                f"{item.get('site')} {item['op']}: its tensor {key!s:.12}… {value.get('shape')} is not given"
            )
        value = tensors[key]
    return Edit(Site.parse(item.get("site", "")), item["op"], _tupled(value))


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
