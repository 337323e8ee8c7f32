"""Pages of results and of runs: what was asked, of what, what came out, the picture, the numbers, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..columns import shortened
from ..files import without_folders
from .html import Section, copyable, escape, page, table

PROMPTS, ROWS, SHOWN = 8, 200, 12
"""Prompts that a page names, rows of its table, and rows up to which the table is not folded."""
LETTERS = 600
"""Of a setting."""


class Answer(NamedTuple):
    """What a page says, in its order. `Result.page` gives a result's; `run.page` writes the page of a run.

    Attributes:
        heading, question, finding: in words, the finding in one sentence; "" of a part that there is not.
        prompts: a row per prompt or sample, with what belongs to it.
        picture: HTML.
        further: more sentences that the numbers support, below the picture.
        sections: more pictures and tables, each under its title.
        left_out: what could not be used, and why; of paths the last part is told.
        rows: the numbers behind it; few are shown, more are folded away.
        details: further texts by title, folded away.
        provenance: how it was made, see `Result.provenance`; of a run, `run.page` says it.
        whole: where all rows are, if they are more than a page has.
    """

    heading: str
    question: str = ""
    finding: str = ""
    prompts: Sequence[Mapping[str, Any]] = ()
    picture: str = ""
    further: Sequence[str] = ()
    sections: Sequence[Section] = ()
    left_out: Sequence[Mapping[str, Any]] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, str] = MappingProxyType({})
    provenance: Mapping[str, Any] | None = None
    whole: str = "result.table()"


def answer_page(said: Answer) -> str:
    """A whole page."""
    record = said.provenance
    below = subtitle(record) if record else ""
    prompts = Section("What was asked", said.question, _prompts(said.prompts, record))
    sections = [prompts] if said.question or prompts.body else []
    # a picture that is a table, or ends in one, has the numbers already
    few = table(said.rows) if 0 < len(said.rows) <= SHOWN and "<table class='rows'" not in said.picture else ""
    further = "".join(f"<li>{escape(sentence)}</li>" for sentence in said.further)
    further = f"<ul>{further}</ul>" if further else ""
    finding = f"<p><b>{escape(said.finding)}</b></p>" if said.finding else ""
    sections += [Section("What came out", "", finding + said.picture + further + few), *said.sections]
    if said.left_out:
        told = [{key: without_folders(str(held)) for key, held in row.items()} for row in said.left_out]
        sections.append(Section("Left out", "What could not be used, and why.", table(told)))
    folded = [_all(said.rows, said.whole)] if said.rows and not few else []
    folded += [copyable(title, text) for title, text in said.details.items() if text]
    if record:
        folded += [_facts("Settings", record["settings"]), _facts("How it was made", origin(record))]
    if folded:
        sections.append(Section("", "", "".join(folded)))
    return page(said.heading, below, sections)


def subtitle(record: Mapping[str, Any]) -> str:
    """The model and the day, below a title."""
    made = ["interp_core " + record["versions"].get("interp-core", ""), record["date"][:10]]
    if (model := record["model"]) is None:
        return " · ".join(made)
    layers = f", {model['layers']} layers" if model["layers"] else ""
    return " · ".join([f"{model['source']} ({model['class']}{layers})", *made])


def origin(record: Mapping[str, Any]) -> dict[str, str]:
    """How a result was made, in words."""
    model, prompts = record["model"], record["prompts"]
    facts = {} if model is None else _computed(model)
    if prompts is not None:
        shortest, longest = prompts["lengths"]
        tokens = f"{shortest} tokens" if shortest == longest else f"{shortest} to {longest} tokens"
        facts["prompts"] = f"{prompts['count']} of {tokens}, digest {prompts['digest']}"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return facts | {"date": record["date"]} | ({"command": record["command"]} if record["command"] else {})


def _computed(model: Mapping[str, Any]) -> dict[str, str]:
    """Which model, and how it computed."""
    known = ("revision", "fingerprint")
    told = [f"{name} {model[name]}" for name in known if model[name]] or ["weights were not fingerprinted: too many"]
    return {
        "model": f"{model['source']}, {model['class']}, {', '.join(told)}",
        "computed": f"{model['dtype']} on {model['device']}, attention {model['attention']}, engine {model['engine']}",
    }


def _prompts(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None) -> str:
    """The prompts with what belongs to each; of many the first ones, and how many there are."""
    if not rows:
        return ""
    count = max(len(rows), record["prompts"]["count"] if record and record["prompts"] else 0)
    more = f"<p class='soft'>and {count - PROMPTS:,} more</p>" if count > PROMPTS else ""
    return table(rows[:PROMPTS]) + more


def _all(rows: Sequence[Mapping[str, Any]], whole: str) -> str:
    """The numbers behind the picture, behind a title that opens them."""
    left = f"<p class='soft'>and {len(rows) - ROWS:,} more: <code>{escape(whole)}</code></p>"
    more = left if len(rows) > ROWS else ""
    return f"<details><summary>All numbers ({len(rows):,} rows)</summary>{table(rows[:ROWS])}{more}</details>"


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    """Names and what they are, behind a title that opens them."""
    lines = "".join(
        f"<tr><th scope='row'>{escape(key)}</th><td>{escape(_said(x))}</td></tr>" for key, x in facts.items()
    )
    body = f"<div class='scroll'><table class='rows'>{lines}</table></div>" if lines else "<p class='soft'>none</p>"
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _said(fact: Any) -> str:
    return shortened(fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False), LETTERS)
