"""Sites and positions as data: grammar, text form, selection errors."""

from __future__ import annotations

import pickle

import pytest
import torch

import interp_core as ic
from interp_core import sites as S
from interp_core.indexing import indices
from interp_core.positions import Mask, PerRow, Rows, Slice, Span, parse_position, position, resolve
from interp_core.sites import SITES, Site

WRITTEN = [
    S.embed,
    S.resid_post,
    S.resid_post[3].at(-1),
    S.z[3, 5].at("target"),
    S.z[:, 5],
    S.z[-1, [1, 2]].at(slice(None, None, 2)),
    S.pattern[8:16].at(query="text", key="vision"),
    S.scores[0].at(key=Span(2, 5)),
    S.resid_pre.at(Span(3, 7)),
    S.resid_pre.at([3, 7]),
    S.resid_pre.at([[1, 2], [3]]),
    S.resid_pre.at(PerRow((-1, -3))),
    S.resid_pre.at(torch.tensor([[True, False], [False, True]])),
    S.logits.at("last"),
]


@pytest.mark.parametrize("site", WRITTEN, ids=str)
def test_text_form_is_read_back(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert pickle.loads(pickle.dumps(site)) == site
    assert hash(Site.parse(str(site))) == hash(site)


def test_text_forms() -> None:
    assert str(S.resid_post[3].at(-1)) == "resid_post[3]@-1"
    assert str(S.z[3, 5].at("target")) == "z[3,5]@target"
    assert str(S.pattern[8:16].at(query="text", key="vision")) == "pattern[8:16]@query=text;key=vision"


def test_different_selections_differ() -> None:
    assert S.resid_pre.at(Span(3, 7)) != S.resid_pre.at([3, 7])
    assert S.resid_pre.at(slice(3, 7)) != S.resid_pre.at(Span(3, 7))
    assert S.z[3] != S.z[[3]]


def test_every_site_has_a_name_in_the_module() -> None:
    assert all(getattr(S, name) == Site(name) for name in SITES)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (lambda: S.reisd_post, "Did you mean 'resid_post'"),
        (lambda: S.named("patern"), "Did you mean 'pattern'"),
        (lambda: S.z[1, 2, 3], "z takes layer, unit"),
        (lambda: S.resid_post[1, 2], "resid_post takes layer"),
        (lambda: S.embed[1], "embed takes no index"),
        (lambda: S.z[1][2], "write both indices at once"),
        (lambda: S.z[True], "integer, slice or list"),
        (lambda: S.z["a"], "integer, slice or list"),
        (lambda: S.z[[]], "selects nothing"),
        (lambda: S.z.at(key=3), "no key axis"),
        (lambda: Site.parse("z[3"), "closing bracket"),
        (lambda: Site.parse("z[x]"), "not an integer"),
        (lambda: indices(7, 6, "layer", "z[7]"), "no layer 7, there are 6, 0 to 5"),
        (lambda: indices(Slice(9, 12), 6, "layer", "z[9:12]"), "selects no layer"),
    ],
)
def test_wrong_sites_say_what_is_right(asked: object, says: str) -> None:
    with pytest.raises(ic.SiteError, match=says.replace("[", r"\[").replace("(", r"\(")):
        asked()  # type: ignore[operator]


def test_unknown_site_is_no_attribute() -> None:
    assert not hasattr(S, "residpost")


ROWS = Rows([[2, 3, 4], [0, 1, 2, 3, 4]], {"subject": [[0, 1], [3]]}, 5)


@pytest.mark.parametrize(
    ("place", "columns"),
    [
        (-1, [[4], [4]]),
        (0, [[2], [0]]),
        ("last", [[4], [4]]),
        ("all", [[2, 3, 4], [0, 1, 2, 3, 4]]),
        ("prompt", [[2, 3, 4], [0, 1, 2, 3, 4]]),
        ("subject", [[2, 3], [3]]),
        (slice(1, None), [[3, 4], [1, 2, 3, 4]]),
        ([0, -1], [[2, 4], [0, 4]]),
        (Span(1, 3), [[3, 4], [1, 2]]),
        ([[0], [1, 2]], [[2], [1, 2]]),
        (PerRow((-1, Span(0, 2))), [[4], [0, 1]]),
        (torch.tensor([[False, False, True, False, False], [True] * 5]), [[2], [0, 1, 2, 3, 4]]),
    ],
)
def test_positions_count_real_tokens(place: object, columns: list[list[int]]) -> None:
    assert resolve(position(place), ROWS) == columns


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (3, "no position 3 in row 0: it has 3 tokens"),
        (-4, "no position -4 in row 0"),
        (Span(2, 9), "lies outside row 0"),
        (Span(2, 2), "lies outside row 0"),
        ("subjet", "Did you mean 'subject'"),
        ("generated", "only in generate"),
        ([0, -3], "selects a position twice"),
        ([[0], [1], [2]], "positions for 3 rows, the batch has 2"),
        (Mask(((0,),), 5), "the mask is .1, 5., the batch is .2, 5."),
        (1.5, "is not a position"),
        (True, "is not a position"),
        ([0, "a"], "is not a position"),
    ],
)
def test_wrong_positions_say_what_is_right(place: object, says: str) -> None:
    with pytest.raises(ic.PositionError, match=says):
        resolve(position(place), ROWS)


@pytest.mark.parametrize("text", ["", "1:x", "[1,x]", "span(1)", "4abc", "a b"])
def test_unreadable_positions(text: str) -> None:
    with pytest.raises(ic.PositionError, match="is not a position"):
        parse_position(text)
