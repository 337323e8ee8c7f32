"""Settings: from the command line, as a schema, described by docstrings; and the package that `new` writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from interp_plugins.logit_lens import LensConfig

import interp_core as ic
from interp_core import settings
from interp_core.scaffold import write_package


class Many(ic.Config):
    """Settings.

    Attributes:
        a, b: share a line
            and go on.
        at (int): where.

    Raises:
        c: nothing.
    """

    a: int = 1
    b: list[int] = [1]
    c: str = "x"
    d: Path | None = None
    e: bool = False
    f: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=3", 3),
        ("b=[1, 2]", [1, 2]),
        ("c=5", "5"),
        ("c=null", "null"),
        ("c=", ""),
        ("c=x=y", "x=y"),
        ("d=out/x", "out/x"),
        ("d=null", None),
        ("e=true", True),
        ("a=x", "x"),
    ],
)
def test_values_from_the_command_line(pair: str, value: object) -> None:
    assert settings.read("many", Many, [pair]) == {pair[0]: value}


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ic.PlanError, match="'a' is not a setting: write key=value"):
        settings.read("many", Many, ["a"])
    with pytest.raises(ic.PlanError, match="many has no setting 'aa'"):
        settings.read("many", Many, ["aa=1"])
    with pytest.raises(ic.PlanError, match=r"many: setting a: .*valid integer.*got 'x'"):
        settings.configured("many", Many, {"a": "x"})
    needing = settings.of_function(lambda text: text)
    with pytest.raises(ic.PlanError, match="setting text is missing; it has no default"):
        settings.configured("f", needing, {})


def test_descriptions_come_from_docstrings() -> None:
    assert settings.described(Many.__doc__ or "") == {
        "a": "share a line and go on.", "b": "share a line and go on.", "at": "where.",
    }  # fmt: skip
    assert settings.described("No section.") == {}
    rows = {row["setting"]: row for row in settings.rows(LensConfig)}
    assert rows["top_k"] == {
        "setting": "top_k", "type": "int", "default": "5", "description": "how many tokens to keep per layer and position.",
    }  # fmt: skip


def test_inherited_settings_are_described_where_they_are_written() -> None:
    class More(Many):
        """Settings.

        Attributes:
            b: of its own.
            g: new.
        """

        g: int = 2

    assert [row["setting"] for row in settings.rows(More)] == ["g", "a", "b", "c", "d", "e", "f"]  # its own first
    rows = {row["setting"]: row["description"] for row in settings.rows(More)}
    assert (rows["a"], rows["b"], rows["g"]) == ("share a line and go on.", "of its own.", "new.")
    assert settings.schema(More)["properties"]["a"]["description"] == "share a line and go on."


def test_a_method_is_called_with_its_settings_by_name() -> None:
    """As notebooks and completion see it."""
    lens = ic.method("logit_lens")
    called = inspect.signature(lens)
    assert list(called.parameters)[:5] == ["model", "x", "batch_size", "progress", "out"]
    assert set(called.parameters) > set(lens.Config.model_fields)
    assert called.parameters["top_k"].default == 5 and called.return_annotation == "LogitLensResult"
    assert called.parameters["top_k"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "top_k" not in inspect.signature(type(lens)).parameters
    assert not [name for name in ic.registry("methods").names() if "settings" in
                inspect.signature(ic.method(name)).parameters]  # fmt: skip


def test_schemas_are_json_whatever_the_types() -> None:
    schema = json.loads(json.dumps(settings.schema(LensConfig)))
    assert schema["additionalProperties"] is False and schema["properties"]["top_k"]["type"] == "integer"
    assert any("Python only" in str(option) for option in schema["properties"]["translator"]["anyOf"])
    assert json.dumps(settings.schema(Many))


def test_functions_have_settings_too() -> None:
    def recipe(text: str, copy: int = 2, *rest: int, out: Path = Path("x"), **more: int) -> None:
        """Do it.

        Args:
            text: to read.
        """

    made = settings.of_function(recipe)
    assert [row["setting"] for row in settings.rows(made)] == ["text", "copy", "out"]
    assert settings.rows(made)[0]["description"] == "to read." and settings.rows(made)[2]["default"] == "'x'"
    recipe.__annotations__["text"] = "Missing"
    with pytest.raises(ic.PluginError, match="an argument's annotation cannot be read: name 'Missing'"):
        settings.of_function(recipe)


def test_a_function_of_one_config_has_the_settings_of_that() -> None:
    """And is called with it; a function of plain arguments is called with these."""

    def study(config: Many) -> int:
        return config.a

    def plain(a: int, b: Path = Path("x"), **more: int) -> tuple[int, Path]:
        return a, b

    def mixed(config: Many, a: int = 1) -> int:
        return config.a + a

    assert settings.of_function(study) is Many and settings.call(study, Many(a=4)) == 4
    arguments = settings.of_function(plain)
    assert settings.call(plain, arguments(a="3", b="y")) == (3, Path("y"))
    assert list(settings.of_function(mixed).model_fields) == ["config", "a"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("My-Lens", "'My-Lens' cannot be the name.* Try 'my_lens'"),
        ("class", "'class' cannot be the name"),
        ("../x", "cannot be the name"),
        ("logit_lens", "interp-core has a method 'logit_lens' already"),
        ("torch", "there is a module 'torch' here already"),
    ],
)
def test_names_that_cannot_be(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ic.PluginError, match=says):
        write_package(name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write_package("a_lens", tmp_path / "x")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    with pytest.raises(ic.PluginError, match="is there already and not empty: nothing was written"):
        write_package("b_lens", tmp_path / "x")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    with pytest.raises(ic.PluginError, match="no template for a 'methd'. Did you mean 'method'"):
        write_package("b_lens", tmp_path / "y", "methd")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_shot": 3}, "Shots has no setting 'n_shot'. Did you mean 'n_shots'"),
        ({"n_shots": "many"}, r"Shots: setting n_shots: .*integer.* \(got 'many'\)"),
        ({}, "Shots: setting n_shots is missing"),
    ],
)
def test_a_config_made_in_python_refuses_as_the_command_line_does(wrong: dict[str, object], message: str) -> None:
    class Shots(ic.Config):
        n_shots: int

    with pytest.raises(ic.PlanError, match=message):
        Shots(**wrong)


def test_a_line_that_goes_on_begins_no_setting_also_where_it_has_a_colon() -> None:
    doc = """Settings.

    Attributes:
        translator: a function; those of a lens know their
            layers: the rows that it has.
        top_k, at: how many, and
            where: at all of them.
    """
    texts = settings.described(doc)
    assert texts["translator"] == "a function; those of a lens know their layers: the rows that it has."
    assert texts["top_k"] == texts["at"] == "how many, and where: at all of them." and len(texts) == 3
