"""Discovery by entry points: real distributions on the path, some of them broken."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import interp_core as ic
from interp_core.cli import app
from interp_core.methods import API
from interp_core.plugins import KINDS, OWN, Plugin, Registry, find, refresh
from interp_core.plugins.sandbox import inspect_plugin


def distribution(folder: Path, name: str, points: dict[str, dict[str, str]], code: str, needs: str = "") -> None:
    """An installed distribution, as pip would leave it."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{needs}")
    lines = [
        f"[interp_core.{kind}]\n" + "".join(f"{k} = {v}\n" for k, v in items.items()) for kind, items in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / f"{name.replace('-', '_')}.py").write_text(textwrap.dedent(code))


GOOD = """
import interp_core as ic

class Count(ic.Method):
    name = "count"

    class Config(ic.Config):
        by: int = 1

    def run(self, model, tokens, config):
        return Counted(n=len(tokens.labels[0]) * config.by)

from dataclasses import dataclass

@dataclass(frozen=True, eq=False)
class Counted(ic.Result):
    n: int

class Old(ic.Method):
    api = 0
    def run(self, model, tokens, config): ...
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    good = {
        "count": "hello_plugin:Count",
        "old": "hello_plugin:Old",
        "nothing": "hello_plugin:Missing",
        "odd": "json:dumps",
    }
    distribution(tmp_path, "hello-plugin", {"methods": good}, GOOD)
    distribution(tmp_path, "broken-plugin", {"methods": {"crash": "broken_plugin:X"}}, "raise RuntimeError('no luck')")
    clash = {"methods": {"logit_lens": "clash_plugin:Lens", "count": "clash_plugin:Lens"}}
    distribution(tmp_path, "xclash-plugin", clash, "Lens = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    refresh()
    yield tmp_path
    for name in ("hello_plugin", "broken_plugin"):
        sys.modules.pop(name, None)
    refresh()


def test_our_own_come_the_same_way() -> None:
    assert "logit_lens" in ic.registry("methods") and "demo" in ic.registry("recipes")
    assert "torch" in ic.registry("engines") and {"gpt2", "qwen3_moe"} <= set(ic.registry("architectures").names())
    assert all(row.dist == "interp-core" for kind in KINDS for row in ic.registry(kind))
    assert ic.registry("launchers").names() == ["local", "ray", "slurm"]


def test_a_method_of_another_package(installed: Path, toy: ic.Model) -> None:
    result = ic.method("count")(toy, "Q: big\nA:", by=3)
    assert result.n == 12
    with pytest.raises(ic.PlanError, match="count has no setting 'bye'. Did you mean 'by'"):
        ic.method("count")(toy, "Q:", bye=3)
    with pytest.raises(ic.PlanError, match=r"setting by: Input should be a valid integer.*got 'x'"):
        ic.method("count")(toy, "Q:", by="x")


def test_listing_imports_nothing(installed: Path) -> None:
    code = (
        "import sys; from interp_core.plugins import KINDS, registry;"
        "rows = [r for k in KINDS for r in registry(k)];"
        "print(len(rows), 'torch' in sys.modules, 'hello_plugin' in sys.modules, 'broken_plugin' in sys.modules)"
    )
    path = {"PYTHONPATH": str(installed)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert out.stdout.split()[1:] == ["False", "False", "False"] and int(out.stdout.split()[0]) >= 12


def test_broken_plugins_are_rows_until_they_are_asked_for(installed: Path) -> None:
    methods = ic.registry("methods")
    rows = {(row.name, row.dist): row for row in methods}
    assert rows["crash", "broken-plugin"].status == "unloaded"
    for _ in range(2):
        with pytest.raises(
            ic.PluginError,
            match=r"(?s)'crash' of broken-plugin 1.2 cannot be imported: .*no luck.*Traceback.*pip install -U",
        ):
            ic.method("crash")
    assert rows["crash", "broken-plugin"].status == "broken" and "no luck" in rows["crash", "broken-plugin"].error
    with pytest.raises(ic.PluginError, match="has no attribute 'Missing'"):
        ic.method("nothing")
    with pytest.raises(ic.PluginError, match="not a subclass of interp_core.Method"):
        ic.method("odd")
    with pytest.raises(ic.PluginError, match=f"was written for interface 0, this is {API}: update the package"):
        ic.method("old")
    assert find("old").status == "incompatible"
    assert ic.method("logit_lens").name == "logit_lens"


@pytest.mark.parametrize("within", ["src", ""], ids=["under src", "flat"])
def test_a_package_is_found_beside_its_own_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    """Its folder has the package's name and is no package: here, and in the process that looks at plugins."""
    name = f"lying_{within or 'flat'}"
    package = tmp_path / name / within / name
    package.mkdir(parents=True)
    (tmp_path / name / "pyproject.toml").write_text("[project]\n")
    (package / "__init__.py").write_text(f'"""A page."""\n{GOOD}'.replace('"count"', f'"{name}"'))
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as of a notebook, or `interp plugins check`
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    seen = inspect_plugin("methods", name, f"{name}:Count")
    assert not seen.error and seen.page == "A page." and list(seen.schema["properties"]) == ["by"]
    for target, said in {
        f"{name}:Cuont": f"{name} has no 'Cuont'. Did you mean 'Count'",
        "bare:Count": "the folder 'bare' here is no package: it has no __init__.py. Run the command where",
        "nowhere_at_all:Count": "there is no module 'nowhere_at_all', installed or in this folder; give MODULE:NAME",
    }.items():
        error = inspect_plugin("methods", "", target).error
        assert error.startswith(said) and "\n" not in error
    assert Plugin("methods", name, f"{name}:Count", "session", "").load().name == name


def test_clashes_keep_ours_and_reach_theirs_by_distribution(installed: Path) -> None:
    methods = ic.registry("methods")
    mine = [row for row in methods if row.name == "logit_lens"]
    assert [(row.dist, row.status) for row in mine] == [("interp-core", "unloaded"), ("xclash-plugin", "shadowed")]
    assert ic.method("logit_lens").name == "logit_lens"
    with pytest.raises(ic.PluginError, match="cannot be imported"):
        methods.get("xclash-plugin:logit_lens")  # its module is not there


def test_unknown_names() -> None:
    with pytest.raises(ic.PluginError, match="no method is called 'logit_lense'. Did you mean 'logit_lens'"):
        ic.method("logit_lense")
    with pytest.raises(
        ic.PluginError, match="Did you mean 'activation_patching' or 'attribution_patching' or 'path_pat"
    ):
        ic.method("patching")
    with pytest.raises(ic.PluginError, match="no kind of plugin is called 'method'. Did you mean 'methods'"):
        ic.registry("method")
    with pytest.raises(ic.PluginError, match="is a .*, not a int"):
        Registry("methods").get("logit_lens", int)


def test_registering_by_hand() -> None:
    registry = Registry("methods")
    mine = type("Mine", (ic.Method,), {"name": "mine", "run": lambda *_: None})
    lens = type("Lens", (mine,), {"name": "logit_lens"})
    registry.register("mine", mine)
    registry.register("logit_lens", lens)
    assert registry.get("mine") is mine and registry.get("logit_lens") is lens
    assert [row.status for row in registry if row.name == "logit_lens"] == ["shadowed", "ok"]
    assert registry.get("interp-core:logit_lens").__module__ == "interp_plugins.logit_lens.method"
    registry.register("mine", again := type("Mine", (mine,), {}))  # a notebook's cell, run again
    assert registry.get("mine") is again and [row.status for row in registry if row.name == "mine"] == ["ok"]


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("methods", type("Other", (ic.Method,), {"name": "other", "run": None}), "has name = 'other' but is registered as 'x'"),
        ("methods", type("Bare", (ic.Method,), {"name": "x"}), "leaves run to be written"),
        ("methods", type("New", (ic.Method,), {"name": "x", "api": 2}), "for interface 2, this is 1: update interp_core"),
        ("recipes", 3, "is 3, not a function"),
        ("engines", int, "not an engine"),
        ("architectures", {}, "is a dict, not a Family"),
        ("launchers", print, "not a launcher"),
    ],
)  # fmt: skip
def test_what_each_kind_must_be(kind: str, value: object, says: str) -> None:
    with pytest.raises(ic.PluginError, match=rf"{kind[:-1]} 'x' cannot be registered: .*{says}"):
        Registry(kind).register("x", value)


@pytest.mark.parametrize(
    ("needs", "status", "says"),
    [
        ("Requires-Dist: interp-core>=0.1,<2\n", "unloaded", ""),
        ("Requires-Dist: Interp_Core\n", "unloaded", ""),
        ("Requires-Dist: interp-core>=99\n", "incompatible", "it needs interp-core>=99, this is .*pip install -U 'interp-core>=99'"),
        ("Requires-Dist: interp-core<0.1\n", "incompatible", "it needs interp-core<0.1"),
        ("Requires-Dist: interp-core>=99; python_version<'3'\n", "unloaded", ""),
        ("Requires-Dist: interp-core-extras>=99\n", "unloaded", ""),
        ("Requires-Dist: interp-core=>1\n", "incompatible", "cannot be read"),
    ],
)  # fmt: skip
def test_requirements(installed: Path, needs: str, status: str, says: str) -> None:
    distribution(installed, "needy", {"methods": {"need": "needy:Need"}}, "Need = 1", needs)
    refresh()
    row = find("need")
    assert row.status == status and re.search(says, row.error) and bool(row.error) == bool(says)
    if says:
        with pytest.raises(ic.PluginError, match="(?s)method 'need' of needy 1.2 is incompatible: .*"):
            ic.method("need")


def test_metadata_that_cannot_be_read(installed: Path) -> None:
    distribution(installed, "odd-lines", {"methods": {"fine": "odd_lines:X", "spaced": "odd lines"}}, "X = 1")
    info = installed / "odd_lines-1.2.dist-info/entry_points.txt"
    info.write_text(info.read_text() + "# a comment\nno target\n[interp_core.nothing]\nx = y:z\n[other]\na = b:c\n")
    distribution(installed, "no-name", {"recipes": {"lost": "no_name:f"}}, "")
    (installed / "no_name-1.2.dist-info/METADATA").write_text("")
    distribution(installed, "not-text", {"methods": {"a": "b:c"}}, "")
    (installed / "not_text-1.2.dist-info/entry_points.txt").write_bytes(b"[interp_core.methods]\n\xff\xfe = b:c\n")
    refresh()
    rows = {row.name: row for row in ic.registry("methods") if row.dist == "odd-lines"}
    assert {name: row.status for name, row in rows.items()} == {
        "fine": "unloaded",
        "spaced": "broken",
        "no target": "broken",
    }
    assert "its entry point 'spaced = odd lines' is not `name = module:attribute`" in rows["spaced"].error
    assert find("lost").dist == "?"


def test_a_plugin_that_ends_the_process_is_broken(installed: Path) -> None:
    distribution(installed, "quits", {"methods": {"quit": "quits:X"}}, "raise SystemExit(3)")
    refresh()
    with pytest.raises(ic.PluginError, match="SystemExit: 3"):
        ic.method("quit")


def test_an_incompatible_one_takes_no_name(installed: Path) -> None:
    """A usable plugin wins over an incompatible one, whatever the order of their distributions."""
    needs = "Requires-Dist: interp-core>=99\n"
    distribution(installed, "aaa", {"methods": {"count": "aaa:X"}}, "", needs)
    refresh()
    assert [(row.dist, row.status) for row in ic.registry("methods") if row.name == "count"] == [
        ("aaa", "incompatible"),
        ("hello-plugin", "unloaded"),
        ("xclash-plugin", "shadowed"),
    ]
    assert ic.method("count").name == "count"
    with pytest.raises(ic.PluginError, match="of aaa 1.2 is incompatible"):
        ic.registry("methods").get("aaa:count")


def test_the_same_name_in_two_kinds(installed: Path) -> None:
    distribution(installed, "both", {"methods": {"twin": "both:X"}, "recipes": {"twin": "both:f"}}, "")
    refresh()
    with pytest.raises(ic.PluginError, match="'twin' is a method and a recipe; say which with --kind methods"):
        find("twin")
    assert find("twin", ("recipes",)).kind == "recipes"


def test_a_wrong_result_is_named(toy: ic.Model) -> None:
    mine = type("Mine", (ic.Method,), {"name": "mine", "run": lambda *_: {"a": 1}})
    with pytest.raises(ic.PluginError, match=r"Mine.run returned a dict: methods return an interp_core.Result"):
        mine()(toy, "Q:")


def test_a_call_of_ones_own_takes_by_position_what_it_says(toy: ic.Model) -> None:
    """The message for what stands by position beyond that is one for all methods."""

    @dataclass(frozen=True, eq=False)
    class Seen(ic.Result):
        other: str

    class Pair(ic.Method):
        name = "pair"

        def __call__(self, model: ic.Model, x: Any, other: str, *, scale: int = 1) -> Seen:
            return Seen(other * scale)

        def run(self, model: ic.Model, tokens: ic.Tokens, config: ic.Config) -> Seen:
            raise AssertionError

    class Many(Pair):
        def __call__(self, model: ic.Model, *texts: Any) -> Seen:
            return Seen("".join(texts))

    assert Pair()(toy, "Q:", "b", scale=2).other == "bb" and Many()(toy, "a", "b", "c").other == "abc"
    with pytest.raises(ic.PlanError, match=r"method pair takes .* not int 3\. Write scale=…; several"):
        Pair()(toy, "Q:", "b", 3)  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(ic.method("ifr"))).__class__ is ic.method("ifr").__class__


def test_fifty_plugins_are_listed_without_importing_them(tmp_path: Path) -> None:
    """`benchmarks/listing.py` times this."""
    for i in range(10):
        points = {kind: {f"p{i}_{kind}": f"pack{i}:X"} for kind in KINDS}
        distribution(tmp_path, f"pack{i}", points, "raise RuntimeError", f"Requires-Dist: {OWN}>=0.1\n")
    code = (
        "import sys; from interp_core.plugins import KINDS, registry;"
        "rows = [r for k in KINDS for r in registry(k) if r.dist.startswith('pack')];"
        "print(len(rows), [m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'pack0') if m in sys.modules])"
    )
    path = {"PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert out.stdout.strip() == "50 []"


def test_command_line_lists_all(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    run = [sys.executable, "-m", "interp_core.cli", "plugins"]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
    assert "crash" in out and "hello-plugin" in out and "shadowed" in out
    assert "interp-core has a method of this name; 'xclash-plugin:logit_lens' is this one" in out
    rows = json.loads(
        subprocess.run([*run, "methods", "--json"], capture_output=True, text=True, check=True, env=env).stdout
    )
    assert {"kind", "name", "status", "dist", "version", "target"} <= rows[0].keys()
    assert any(row["name"] == "count" and row["dist"] == "hello-plugin" for row in rows)


def test_verbose_listing_loads_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"recipes": {"crash": "broken_plugin:x", "fine": "json:dumps"}}
    distribution(tmp_path, "broken-plugin", points, "raise RuntimeError('no luck')")
    monkeypatch.syspath_prepend(str(tmp_path))
    refresh()
    out = CliRunner().invoke(app, ["plugins", "recipes", "-v"]).stdout
    refresh()
    table = out.partition("\n\n")[0].splitlines()[2:]  # below the kind and the head; errors stand behind
    rows = {line.split()[0]: line.split()[1] for line in table}
    assert rows.pop("crash") == "broken" and {"demo", "fine"} <= rows.keys() and {*rows.values()} == {"ok"}
    assert "no luck" in out and "Traceback" in out
    assert "broken_plugin" not in sys.modules


def test_a_clone_that_is_not_installed_has_all_families(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Else a model of a family that the general walk reads wrongly would be taken for what it is not."""
    before = {kind: Registry(kind).names() for kind in KINDS}
    own = {kind: [row.name for row in Registry(kind) if row.dist == OWN] for kind in KINDS}
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: iter(()))
    request.addfinalizer(refresh)
    refresh()
    found = {kind: Registry(kind).names() for kind in KINDS}
    assert {"gpt_neox", "opt"} <= set(found["architectures"]) <= set(before["architectures"])
    assert found == own


def test_a_copy_without_its_families_is_refused(monkeypatch: pytest.MonkeyPatch, request: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: iter(()))
    monkeypatch.setattr("interp_core.plugins.PROJECT", tmp_path / "pyproject.toml")
    request.addfinalizer(refresh)
    refresh()
    model = ic.testing.tiny("opt")
    with pytest.raises(ic.PluginError, match=r"without its engines and model families.*pip install interp-core"):
        ic.load(model)
