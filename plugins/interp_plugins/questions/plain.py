"""The plain form: `questions.jsonl`, a row per question, and a folder of images.

    {"name": "chart_1", "image": "images/chart_1.png", "question": "Which bar is tallest?", "answer": "red",
     "kind": "human", "meta": {"difficulty": "hard", "boxes": [[4, 0, 8, 16]]}}

`images` and `answers` take several; `name`, `kind` and `meta` may be missing, and any other field is kept in `meta`.
Names of images are relative to the file's folder. Must equal: what is written is read again, pixel by pixel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import errors, runs

from .. import _json_files
from .images import RowError, placed
from .question import Question, Row

FILE = "questions.jsonl"
FIELDS = ("name", "image", "images", "question", "answer", "answers", "kind", "meta")


def plain_rows(path: Path, images: Path | None = None) -> Iterator[Row]:
    """The rows of a file of this form, or of the one in a folder."""
    path = path / FILE if path.is_dir() else path
    root = images or path.parent
    for number, row in json_lines(path):
        name = f"{path.stem}_{number}"

        # defaults hold on to this row, whenever it is made a question of
        def make(row: Mapping[str, Any] = row, name: str = name) -> Question:
            several = row.get("images", row.get("image"))
            files = several if isinstance(several, list) else [several]
            answers = texts("answer", row.get("answers", row.get("answer")))
            meta = row.get("meta") or {}
            if not isinstance(meta, dict):
                raise RowError("meta", "it is no object", errors.wrong("meta", "an object", meta))
            more = {key: value for key, value in row.items() if key not in FIELDS}
            label, kind = str(row.get("name", name)), str(row.get("kind") or "")
            pictures = tuple(placed(root, file) for file in files)
            return Question(label, pictures, row.get("question", ""), answers, kind, {**more, **meta})

        yield f"{path}, line {number}", make


def write_questions(folder: str | Path, questions: Iterable[Question]) -> Path:
    """Write questions and their images; files are copied as they are, images in memory become PNG.

    Returns:
        The file of questions, which is written last.

    Raises:
        PlanError: two questions of one name, or metadata that JSON does not have.
        LoadError: an image that is gone.
    """
    folder, several = Path(folder), list(questions)
    if len({question.name for question in several}) < len(several):
        raise ic.PlanError("two questions have one name; give each its own")
    lines, files, taken = [], {}, set[str]()
    for question in several:
        names = []
        for i, image in enumerate(question.images):
            plain = runs.safe_name(question.name) + (f"_{i}" if len(question.images) > 1 else "")
            while plain.lower() in taken:  # "x_0", and the first image of "x"; "A" and "a" are one file on some disks
                plain += "+"
            taken.add(plain.lower())
            name = f"images/{plain}{image.suffix if isinstance(image, Path) else '.png'}"
            files[name] = image
            names.append(name)
        row = {"name": question.name, "images": names, "question": question.question, "answers": list(question.answers)}
        try:
            lines.append(json.dumps(row | {"kind": question.kind, "meta": dict(question.meta)}, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise ic.PlanError(f"question {question.name!r}: its meta is no JSON: {error}") from error
    for name, image in files.items():
        runs.write(folder / name, _bytes(image))
    runs.write(folder / FILE, "".join(f"{line}\n" for line in lines))
    return folder / FILE


def _bytes(image: Any) -> bytes:
    if not isinstance(image, Path):
        image.save(content := BytesIO(), format="PNG")
        return content.getvalue()
    try:
        return image.read_bytes()
    except OSError as error:
        raise ic.LoadError(f"{image} cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbered rows of JSON lines; a line that is no object is a row without fields.

    Raises:
        LoadError: a file that cannot be read, or a line that is no JSON.
    """
    lines = _json_files.json_lines(path, takes="a .jsonl file, a row per question")
    return ((number, row if isinstance(row, dict) else {}) for number, row in lines)


def texts(field: str, value: Any) -> tuple[str, ...]:
    """One text or several, with numbers as texts.

    Raises:
        RowError: something else, or none.
    """
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not several:
        raise RowError(field, "it has no answer")
    if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in several):
        raise RowError(field, "it is no text", errors.wrong(field, "a text, or several", value))
    return tuple(map(str, several))
