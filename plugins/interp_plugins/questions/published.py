"""Readers of published data sets, each in the form in which it is handed out.

    chartqa   a folder with test_human.json and test_augmented.json ([{"imgname", "query", "label"}, …]) beside png/,
              that folder's parent, one such file, or a qa.json beside its images. Kind: human or augmented (also
              `meta["part"]`), or the row's own
    docvqa    val_v1.0.json: {"data": [{"questionId", "question", "image", "answers", "question_types"}, …]}. Kind: the
              first question type
    vqav2     v2_OpenEnded_mscoco_val2014_questions.json, with v2_mscoco_val2014_annotations.json beside it or given,
              and COCO_val2014_000000262148.jpg. Kind: the answer type (yes/no, number, other)
    pope      coco_pope_random.json: lines of {"question_id", "image", "text", "label"}. Kind: the split's name
    plain     questions.jsonl with a folder of images (`plain`)

Source: Masry et al. (2022), Mathew et al. (2021), Goyal et al. (2017), Li et al. (2023) and their repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import errors

from .._json_files import read_json
from .images import RowError, placed
from .plain import json_lines, plain_rows, texts
from .question import Question, Questions, Row, gathered

Json = Mapping[str, Any]
DATA_SET = "a .json file of the data set"
DIFFICULTY = {"simple": "easy", "complex": "hard"}
"""What copies of ChartQA say in a row's kind ("human_complex"), by our word."""


def chartqa_rows(path: Path, images: Path | None = None, split: str = "test") -> Iterator[Row]:
    """ChartQA's rows."""
    for file in _chartqa_files(path, split):
        root = images or (file.parent / "png" if (file.parent / "png").is_dir() else file.parent)
        part = file.stem.rpartition("_")[2]
        part = part if part in ("human", "augmented") else ""
        for number, row in enumerate(_rows(file)):

            def make(
                row: Json = row, name: str = f"{file.stem}_{number}", part: str = part, root: Path = root
            ) -> Question:
                kind = str(row.get("kind") or part)
                part = part or kind.partition("_")[0]
                meta = {"part": part} | {
                    key: value for key, value in row.items() if key not in ("imgname", "query", "label", "kind")
                }
                hard = DIFFICULTY.get(kind.rpartition("_")[2])
                meta |= {"difficulty": hard} if hard and "difficulty" not in meta else {}
                image, answers = placed(root, row.get("imgname")), texts("label", row.get("label"))
                return Question(name, (image,), row.get("query", ""), answers, kind, meta)

            yield f"{file}, row {number}", make


def _chartqa_files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    names = (f"{split}_human.json", f"{split}_augmented.json")
    for folder in (path, path / split, path / "ChartQA Dataset" / split):
        if files := [folder / name for name in names if (folder / name).is_file()]:
            return files
    if (path / "qa.json").is_file():
        return [path / "qa.json"]
    raise ic.LoadError(f"{path} has no {names[0]}, {names[1]} or qa.json; give the folder of a split, or split=")


def docvqa_rows(path: Path, images: Path | None = None) -> Iterator[Row]:
    """DocVQA's rows."""
    root = images or path.parent
    for number, row in enumerate(_rows(path, "data")):

        def make(row: Json = row, name: str = f"{path.stem}_{number}") -> Question:
            kinds = row.get("question_types") or [""]
            meta = {key: value for key, value in row.items() if key not in ("question", "image", "answers")}
            image, answers = placed(root, row.get("image")), texts("answers", row.get("answers"))
            label, kind = str(row.get("questionId", name)), str(kinds[0] if isinstance(kinds, list) else kinds)
            return Question(label, (image,), row.get("question", ""), answers, kind, meta)

        yield f"{path}, row {number}", make


def vqav2_rows(path: Path, images: Path | None = None, annotations: str | Path | None = None) -> Iterator[Row]:
    """VQAv2's rows."""
    data = read_json(path, DATA_SET)
    part = str(data.get("data_subtype", "")) if isinstance(data, dict) else ""
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    theirs = {row.get("question_id"): row for row in _rows(Path(annotations or beside), "annotations")}
    root = images or (path.parent / part if (path.parent / part).is_dir() else path.parent)
    for number, row in enumerate(_rows(path, "questions")):

        def make(row: Json = row) -> Question:
            theirs_of = theirs.get(row.get("question_id"))
            if theirs_of is None:
                raise RowError("answers", "no annotation has its question_id", repr(row.get("question_id")))
            image = row.get("image_id")
            if not isinstance(image, int):
                raise RowError("image", "it has no image", errors.wrong("image_id", "a whole number", image))
            answers = [a.get("answer") if isinstance(a, dict) else a for a in theirs_of.get("answers") or ()]
            kind = str(theirs_of.get("answer_type", ""))
            meta = {"image_id": image, "question_type": theirs_of.get("question_type")}
            meta |= {"multiple_choice_answer": theirs_of.get("multiple_choice_answer")}
            file = placed(root, f"COCO_{part}_{image:012d}.jpg")
            return Question(
                str(row["question_id"]), (file,), row.get("question", ""), texts("answers", answers), kind, meta
            )

        yield f"{path}, row {number}", make


def pope_rows(path: Path, images: Path | None = None) -> Iterator[Row]:
    """POPE's rows."""
    root, kind = images or path.parent, path.stem.rpartition("_")[2]
    for number, row in json_lines(path):

        def make(row: Json = row, number: int = number) -> Question:
            label = row.get("label")
            if label not in ("yes", "no"):
                raise RowError("label", "it is neither yes nor no", repr(label))
            name = f"{kind}_{row.get('question_id', number)}"
            return Question(name, (placed(root, row.get("image")),), row.get("text", ""), (label,), kind)

        yield f"{path}, line {number}", make


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "chartqa": chartqa_rows, "docvqa": docvqa_rows, "vqav2": vqav2_rows, "pope": pope_rows, "plain": plain_rows,
}  # fmt: skip
"""Readers by the name of the data set."""


def read_questions(
    dataset: str, path: str | Path, *, images: str | Path | None = None, strict: bool = False, **options: Any
) -> Questions:
    """The questions of a data set.

    Args:
        dataset: one of `READERS`.
        path: its file or folder.
        images: the folder that names of images are relative to; None: where the data set has them.
        strict: the first row that cannot be used is an error; else it is skipped, recorded and counted.
        options: `split=` of chartqa, `annotations=` of vqav2.

    Raises:
        LoadError: a file of another form, or no row that can be used; with `strict`, one that cannot, naming it.
        PlanError: no such data set or option.
    """
    if dataset not in READERS:
        raise ic.PlanError(f"there is no reader of {dataset!r}. {errors.nearest(dataset, READERS)}")
    reader, path = READERS[dataset], Path(path)
    known = [name for name in reader.__annotations__ if name not in ("path", "images", "return")]
    for name in options:
        if name not in known:
            raise ic.PlanError(f"the reader of {dataset} has no option {name!r}. {errors.nearest(name, known)}")
    if not path.exists():
        raise ic.LoadError(f"there is no {path}; give the file or folder of {dataset}")
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise ic.LoadError(f"there is no folder {folder}; give the folder that the names of images are relative to")
    return gathered(str(path), reader(path, folder, **options), strict=strict)


def _rows(path: Path, key: str = "") -> list[Json]:
    """The rows of a JSON list, or of the list under a key.

    Raises:
        LoadError: it cannot be read, or is of another form.
    """
    data = read_json(path, DATA_SET)
    data = data.get(key) if key and isinstance(data, dict) else data
    if not isinstance(data, list):
        holds = f'an object with a list under "{key}"' if key else "a list of rows"
        raise ic.LoadError(f"{path} is of another form: {errors.wrong('it', holds, data)}")
    return [row if isinstance(row, dict) else {} for row in data]
