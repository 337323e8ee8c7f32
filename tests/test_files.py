"""Files of others: damaged ones are refused by name, and none of them runs code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import DATA, toy_model
from torch import Tensor

import interp_core as ic
from interp_core import runs, score
from interp_core import sites as S
from interp_core.plan import Plan

STORIES = DATA / "stories260K"


@dataclass(frozen=True, eq=False)
class Sizes(ic.Result):
    """A small result."""

    AXES: ClassVar[dict[str, tuple[str, ...]]] = {"norms": ("batch", "pos"), "extra": ("batch",)}
    norms: Tensor
    extra: Tensor | None
    name: str
    top: int = 3


def saved_result(folder: Path) -> Path:
    return Sizes(torch.ones(2, 3), torch.ones(2), "norms", 4).save(folder)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def drop(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda head: drop(head, "fields"), "result.json has no fields"),
        (lambda head: [head], "result.json has no fields"),
        (lambda head: head | {"class": "Other"}, "holds a Other .* not a Sizes"),
        (lambda head: head | {"format": "interp-result/0"}, "interp-result/0.*, not a Sizes"),
        (lambda head: head | {"fields": head["fields"] | {"colour": 1}}, "has a field 'colour', this one has norms"),
        (lambda head: head | {"fields": head["fields"] | {"norms": 1}}, "has a field 'norms'"),
        (lambda head: head | {"fields": drop(head["fields"], "name")}, "it lacks the field 'name'"),
    ],
)
def test_results_of_another_version(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    folder = saved_result(tmp_path)
    assert Sizes.load(folder) == Sizes.load(str(folder))
    edit_json(folder / "result.json", change)
    with pytest.raises(ic.LoadError, match=says):
        Sizes.load(folder)


def test_fields_with_defaults_may_be_lacking(tmp_path: Path) -> None:
    folder = saved_result(tmp_path)
    edit_json(folder / "result.json", lambda head: head | {"fields": drop(head["fields"], "top")})
    assert Sizes.load(folder).top == 3


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"norms": torch.ones(2, 3)}, ""),
        ({"extra": torch.ones(2)}, "it lacks the field 'norms'"),
        ({"norms": torch.ones(2, 3), "more": torch.ones(2)}, "has a field 'more'"),
        ({"norms": torch.ones(3), "extra": torch.ones(2)}, "damaged Sizes: Sizes.norms has 1 axes"),
        ({"norms": torch.ones(2, 3), "extra": torch.ones(3)}, "damaged Sizes: Sizes.extra: batch is 3"),
    ],
)
def test_tensors_that_are_not_the_results(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    from safetensors.torch import save_file

    folder = saved_result(tmp_path)
    save_file(tensors, folder / "result.safetensors")
    if not says:
        assert Sizes.load(folder).extra is None
        return
    with pytest.raises(ic.LoadError, match=says):
        Sizes.load(folder)


@pytest.mark.parametrize("name", ["result.json", "result.safetensors"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[]", None])
def test_damaged_results(tmp_path: Path, name: str, data: bytes | None) -> None:
    folder = saved_result(tmp_path)
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(ic.LoadError, match="holds no readable result|has no fields"):
        Sizes.load(folder)


def saved_plan(folder: Path) -> Path:
    Plan.of(S.z, S.resid_post[1].add(torch.arange(4.0))).save(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: [plan], "this is .* not 'interp-plan/1'"),
        (lambda plan: plan | {"reads": 3}, "reads takes a list of sites, not int 3"),
        (lambda plan: plan | {"reads": [3]}, "a site takes the text of one"),
        (lambda plan: plan | {"reads": ["zz"]}, "no site is called 'zz'"),
        (lambda plan: plan | {"edits": ["z zero"]}, "an edit of a plan takes"),
        (lambda plan: plan | {"edits": [{"op": "zero"}]}, "no site is called ''"),
        (lambda plan: plan | {"edits": [{"site": "z", "op": "zap"}]}, "no edit is called 'zap'"),
        (lambda plan: plan | {"edits": [{"site": "z", "op": "set", "value": 3}]}, "set takes a torch tensor, not int"),
        (
            lambda plan: plan | {"edits": [{"site": "z", "op": "set", "value": {"tensor": 3}}]},
            "its tensor 3… None is not",
        ),
        (
            lambda plan: plan | {"edits": [{"site": "router_logits", "op": "mask", "value": "x"}]},
            "mask takes the numbers",
        ),
        (lambda plan: plan | {"reads": ["z@who=3;key=2"]}, "has positions of 'who'"),
    ],
)
def test_damaged_plans(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    folder = saved_plan(tmp_path)
    edit_json(folder / "plan.json", change)
    with pytest.raises(ic.InterpError, match=says):
        Plan.load(folder)


def test_numbers_of_plans_are_those_that_were_saved(tmp_path: Path) -> None:
    path = saved_plan(tmp_path) / "plan.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ic.LoadError, match="the numbers of .* are not those that were saved"):
        Plan.load(tmp_path)
    for data in (whole[:20], b"", b"nonsense"):
        path.write_bytes(data)
        with pytest.raises(ic.LoadError, match=r"plan\.safetensors is damaged"):
            Plan.load(tmp_path)


# Eight attempts to run code through files


class Attempt:
    """Pickles to something that writes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """A file that must not be there afterwards; a pickle that was opened by Python writes it."""
    made = tmp_path / "proof"
    pickle.loads(pickle.dumps(Attempt(made)))
    assert made.exists()
    made.unlink()
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def model_folder(tmp_path: Path, files: dict[str, bytes], *gone: str) -> str:
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    folder.chmod(0o755)
    for item in folder.iterdir():
        item.chmod(0o644)
    for name in gone:
        (folder / name).unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def torch_pickle(mark: Path) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    torch.save({"weight": Attempt(mark)}, buffer)
    return buffer.getvalue()


def test_weights_with_code(mark: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, {"pytorch_model.bin": torch_pickle(mark)}, "model.safetensors")
    with pytest.raises(ic.LoadError, match="are pickled, and hold more than tensors"):
        ic.load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_are_a_bare_pickle(mark: Path, tmp_path: Path) -> None:
    bare = pickle.dumps(Attempt(mark))
    folder = model_folder(tmp_path, {"pytorch_model.bin": bare, "model.safetensors": bare})
    with pytest.raises(ic.LoadError, match="damaged"):
        ic.load(folder)
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(ic.LoadError, match="are pickled, and hold more than tensors"):
        ic.load(folder)


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_code_that_comes_with_a_model(mark: Path, tmp_path: Path, kind: str) -> None:
    code = f"open({str(mark)!r}, 'w').write('ran')\nclass Own: pass\n".encode()
    name = "config.json" if kind == "AutoConfig" else "tokenizer_config.json"
    settings = json.loads((STORIES / name).read_text()) if kind == "AutoConfig" else {"tokenizer_class": "Own"}
    points = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    settings |= {"auto_map": points if kind == "AutoConfig" else {"AutoTokenizer": ["own.Own", None]}}
    settings |= {"model_type": "own"} if kind == "AutoConfig" else {}
    folder = model_folder(tmp_path, {name: json.dumps(settings).encode(), "own.py": code})
    with pytest.raises(ic.LoadError, match="custom code"):
        ic.load(folder)


def test_chat_templates_with_code(mark: Path) -> None:
    reach = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ic.TextError, match="cannot render this conversation: access to attribute '__class__'"):
        toy_model().chat([{"role": "user", "content": "big"}], chat_template=reach)


@pytest.mark.parametrize("data", [pickle.dumps, lambda attempt: torch_pickle(attempt.mark)])
def test_results_plans_and_sweeps_with_pickles(mark: Path, tmp_path: Path, data: Callable[[Any], bytes]) -> None:
    model, variants = toy_model(), [S.z[1].zero()]
    code = data(Attempt(mark))
    (saved_result(tmp_path / "a") / "result.safetensors").write_bytes(code)
    with pytest.raises(ic.LoadError, match="no readable result"):
        Sizes.load(tmp_path / "a")
    (saved_plan(tmp_path / "b") / "plan.safetensors").write_bytes(code)
    with pytest.raises(ic.LoadError, match="is damaged"):
        Plan.load(tmp_path / "b")
    model.sweep("Q: big", variants, score.logprob(5), out=tmp_path / "c")
    (tmp_path / "c/sweep.safetensors").write_bytes(code)
    with pytest.raises(ic.LoadError, match="cannot be read"):
        model.sweep("Q: big", variants, score.logprob(5), out=tmp_path / "c")


def test_plans_that_name_code(mark: Path, tmp_path: Path) -> None:
    folder = saved_plan(tmp_path / "plan")
    call = {"site": "z", "op": "apply", "value": f"open({str(mark)!r}, 'w').write('ran')"}
    edit_json(folder / "plan.json", lambda plan: plan | {"edits": [call]})
    with pytest.raises(ic.PlanError, match="apply takes a function of the value x that returns the new one, not str"):
        Plan.load(folder)


def test_artefacts_with_code(mark: Path, tmp_path: Path) -> None:
    from interp_plugins.function_vectors.files.published import read_tensor

    for data in (torch_pickle(mark), pickle.dumps(Attempt(mark))):
        (tmp_path / "fv.pt").write_bytes(data)
        with pytest.raises(ic.LoadError, match=r"fv\.pt"):
            read_tensor(tmp_path / "fv.pt")


def test_names_from_data_are_no_paths(tmp_path: Path) -> None:
    """A weight index that points out of the folder, and a result that calls itself a path."""
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode()}
    folder = model_folder(tmp_path, files, "model.safetensors")
    shutil.copy(STORIES / "model.safetensors", tmp_path / "outside.safetensors")
    with pytest.raises(ic.LoadError, match=r"names weights outside of the folder \('\.\./outside\.safetensors'\)"):
        ic.load(folder)
    saved = saved_result(tmp_path / "result")
    edit_json(saved / "result.json", lambda head: head | {"class": "../../Sizes"})
    with pytest.raises(ic.LoadError, match="not a Sizes"):
        Sizes.load(saved)
    with pytest.raises(ic.PluginError, match="cannot be the name of a method"):
        from interp_core.scaffold import write_package

        write_package("../evil", None, "method")


def test_lines_end_where_json_lines_say() -> None:
    """What is written is read again, with every character at which `str.splitlines` would break."""
    rows = [{"text": f"a{mark}b"} for mark in "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\r\n"]
    lines = runs.split_lines(runs.json_lines(rows))
    assert [json.loads(line) for line in lines] == rows and len(rows) == 10
    assert runs.split_lines("") == [] and runs.split_lines("{}") == runs.split_lines("{}\n") == ["{}"]
    assert runs.split_lines("1\n\n2\n\n") == ["1", "", "2", ""]
