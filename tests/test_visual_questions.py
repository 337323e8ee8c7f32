"""Questions about images: every published file form, what is skipped and why, selection, and the plain form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interp_plugins.questions import Question, Questions, Skipped, read_questions, write_questions
from PIL import Image, ImageDraw

import interp_core as ic


def drawn(path: Path, number: int = 0) -> Path:
    """A picture of a bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (24, 16), "white")
    ImageDraw.Draw(image).rectangle((4, 14 - number % 12, 10, 15), fill=(200, 10 * number % 255, 30))
    image.save(path)
    return path


def dumped(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def chart(number: int, **more: Any) -> dict[str, Any]:
    return {"imgname": f"chart_{number}.png", "query": f"What is bar {number}?", "label": str(number), **more}


def chartqa(root: Path) -> Path:
    split = root / "ChartQA Dataset" / "test"
    for number in range(4):
        drawn(split / "png" / f"chart_{number}.png", number)
    dumped(split / "test_human.json", [chart(0), chart(1), chart(0)])
    dumped(split / "test_augmented.json", [chart(2), chart(3)])
    return root


def test_chartqa_as_published(tmp_path: Path) -> None:
    questions = read_questions("chartqa", chartqa(tmp_path))
    assert questions.kinds == {"human": 3, "augmented": 2} and not questions.skipped
    assert [question.name for question in questions][2:4] == ["test_human_2", "test_augmented_0"]
    first = questions[0]
    assert (first.question, first.answers, first.meta["part"]) == ("What is bar 0?", ("0",), "human")
    assert first.difficulty is None and isinstance(first.images[0], Path)
    assert first.image == questions[2].image != questions[1].image
    (picture,) = first.pictures()
    assert picture.size == (24, 16) and picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
    split = tmp_path / "ChartQA Dataset" / "test"
    assert list(read_questions("chartqa", split)) == list(questions)
    assert len(read_questions("chartqa", split / "test_human.json")) == 3
    with pytest.raises(ic.LoadError, match="has no val_human.json, val_augmented.json or qa.json"):
        read_questions("chartqa", split, split="val")


def test_chartqa_with_kinds_beside_its_images(tmp_path: Path) -> None:
    """As copies of it have it: difficulty comes from the row's kind."""
    for number in range(3):
        drawn(tmp_path / f"chart_{number}.png")
    kinds = ("human_simple", "human_complex", "augmented")
    dumped(tmp_path / "qa.json", [chart(i, kind=kind, chart="bar") for i, kind in enumerate(kinds)])
    questions = read_questions("chartqa", tmp_path)
    assert [question.difficulty for question in questions] == ["easy", "hard", None]
    assert [question.meta["part"] for question in questions] == ["human", "human", "augmented"]
    assert questions[0].meta["chart"] == "bar" and list(questions.kinds) == list(kinds)


def test_docvqa_as_published(tmp_path: Path) -> None:
    drawn(tmp_path / "documents" / "a_1.png")
    row = {
        "questionId": 337, "question": "What is the date?", "question_types": ["handwritten", "form"],
        "image": "documents/a_1.png", "docId": 279, "answers": ["1/8/93", "1-8-93"], "data_split": "val",
    }  # fmt: skip
    file = dumped(tmp_path / "val_v1.0.json", {"dataset_name": "docvqa", "data": [row]})
    (question,) = read_questions("docvqa", file)
    assert question.name == "337" and question.answers == ("1/8/93", "1-8-93") and question.kind == "handwritten"
    assert question.meta["docId"] == 279 and question.pictures()[0].size == (24, 16)
    moved = dumped(tmp_path / "elsewhere" / "val.json", {"data": [row]})
    assert read_questions("docvqa", moved, images=tmp_path)[0].images == question.images


def vqav2(root: Path) -> Path:
    drawn(root / "val2014" / "COCO_val2014_000000000042.jpg")
    asked = [{"image_id": 42, "question": f"Is it {i}?", "question_id": 420 + i} for i in range(3)]
    answers = [{"answer": "yes" if i < 9 else "no", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    told = [
        {"question_id": 420 + i, "image_id": 42, "answer_type": "yes/no", "question_type": "is it", "answers": answers}
        for i in (1, 0)
    ]
    dumped(root / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    data = {"data_subtype": "val2014", "questions": asked}
    return dumped(root / "v2_OpenEnded_mscoco_val2014_questions.json", data)


def test_vqav2_as_published(tmp_path: Path) -> None:
    questions = read_questions("vqav2", vqav2(tmp_path))
    assert [question.name for question in questions] == ["420", "421"] and questions[0].kind == "yes/no"
    assert questions[0].answers == ("yes",) * 9 + ("no",) and questions[0].meta["image_id"] == 42
    assert questions.counts == {"answers: no annotation has its question_id": 1}
    moved = (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "annotations.json")
    again = read_questions("vqav2", tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", annotations=moved)
    assert list(again) == list(questions)


def test_pope_as_published(tmp_path: Path) -> None:
    drawn(tmp_path / "COCO_val2014_000000000042.jpg")
    row = {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog?", "label": "yes"}
    file = lines(
        tmp_path / "coco_pope_adversarial.json", [row, {**row, "question_id": 2, "label": "no"}, {**row, "label": "?"}]
    )
    questions = read_questions("pope", file)
    assert [(q.name, q.answers, q.kind) for q in questions] == [
        ("adversarial_1", ("yes",), "adversarial"), ("adversarial_2", ("no",), "adversarial"),
    ]  # fmt: skip
    assert questions.counts == {"label: it is neither yes nor no": 1}


def plain(root: Path) -> Path:
    """Two rows that can be used, and one of each kind that cannot."""
    drawn(root / "images" / "good.png")
    whole = (root / "images" / "good.png").read_bytes()
    (root / "images" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "text.png").write_text("no image")
    good = {"name": "a", "image": "images/good.png", "question": "Which?", "answer": "red"}
    rows = [
        good,
        {"images": ["images/good.png", "images/good.png"], "question": "Same?", "answers": ["yes", "y"], "kind": "two", "source": "x"},
        {**good, "name": "gone", "image": "images/gone.png"},
        {**good, "name": "text", "image": "images/text.png"},
        {**good, "name": "broken", "image": "images/broken.png"},
        {**good, "name": "none", "image": None},
        {**good, "name": "out", "image": "../images/good.png"},
        {**good, "name": "root", "image": "/images/good.png"},
        {**good, "name": "drive", "image": "C:\\good.png"},
        {**good, "name": "silent", "question": " "},
        {**good, "name": "unanswered", "answer": ""},
        {"name": "lacking", "image": "images/good.png", "question": "Which?"},
        {**good, "name": "odd", "answer": {"text": "red"}},
        {**good, "question": "Which one?"},
        {**good, "name": "meta", "meta": [1]},
        "no object",
    ]  # fmt: skip
    return lines(root / "questions.jsonl", rows)


def test_rows_that_cannot_be_used_are_recorded_and_skipped(tmp_path: Path) -> None:
    questions = read_questions("plain", plain(tmp_path))
    assert [question.name for question in questions] == ["a", "questions_2", "broken"]
    assert (
        questions[1].answers == ("yes", "y") and questions[1].meta == {"source": "x"} and len(questions[1].images) == 2
    )
    assert questions.counts == {
        "image: there is no such file": 1, "image: it is no picture that can be read": 1, "image: it has no image": 1,
        "image: its name leads out of the folder of images": 3, "question: it has no question": 1,
        "answer: it has no answer": 3, "answer: it is no text": 1, "name: another question has it": 1, "meta: it is no object": 1,
    }  # fmt: skip
    assert (
        questions.skipped[0].where == f"{tmp_path / 'questions.jsonl'}, line 3"
        and "gone.png" in questions.skipped[0].detail
    )
    assert "1 rows skipped: image: there is no such file" in str(
        questions
    ) and "3 questions (2 of no kind, 1 two)" in str(questions)
    with pytest.raises(ic.LoadError, match="question 'broken': image: it is no picture that can be read"):
        questions[2].pictures()
    checked = questions.checked()
    assert [question.name for question in checked] == ["a", "questions_2"]
    assert (
        checked.counts["image: it is no picture that can be read"] == 2
        and len(checked.skipped) == len(questions.skipped) + 1
    )


def test_strict_raises_for_the_first_bad_row(tmp_path: Path) -> None:
    file = plain(tmp_path)
    with pytest.raises(ic.LoadError, match=r"line 3: image: there is no such file \(.*gone.png\)"):
        read_questions("plain", file, strict=True)
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:2]))
    assert len(read_questions("plain", tmp_path, strict=True)) == 2


def test_huge_images_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Which?", "answer": "red"}
    file = lines(tmp_path / "questions.jsonl", [row])
    monkeypatch.setattr("interp_core.vision.pictures.LARGEST", 200)
    for most in (200, 100):  # Pillow warns above it, and raises above twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ic.LoadError, match="1 image: it has too many pixels"):
            read_questions("plain", file)


def test_pictures_are_those_that_the_model_is_shown(tmp_path: Path) -> None:
    """Turned as a camera's file says, like wherever else a picture is opened; tiny ones are skipped."""
    image = Image.new("RGB", (24, 16))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (2, 2)).save(tmp_path / "tiny.png")
    rows = [{"image": name, "question": "Which?", "answer": "red"} for name in ("turned.jpg", "tiny.png")]
    questions = read_questions("plain", lines(tmp_path / "questions.jsonl", rows))
    assert questions.counts == {"image: it is too small": 1}
    assert questions[0].pictures()[0].size == (16, 24)


def test_nothing_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    file = lines(tmp_path / "questions.jsonl", [{"image": "x.png", "question": "?", "answer": "a"}] * 3)
    with pytest.raises(
        ic.LoadError, match="no question of .* can be used: 3 image: there is no such file. The first: .*line 1"
    ):
        read_questions("plain", file)
    with pytest.raises(ic.LoadError, match="it has no row"):
        read_questions("plain", lines(tmp_path / "empty.jsonl", []))


def test_files_of_another_form(tmp_path: Path) -> None:
    with pytest.raises(ic.PlanError, match="no reader of 'chartQA'. Did you mean 'chartqa'"):
        read_questions("chartQA", tmp_path)
    with pytest.raises(ic.PlanError, match="no option 'splits'. Did you mean 'split'"):
        read_questions("chartqa", tmp_path, splits="val")
    with pytest.raises(ic.LoadError, match="there is no .*gone"):
        read_questions("plain", tmp_path / "gone")
    with pytest.raises(ic.LoadError, match="there is no folder .*gone"):
        read_questions("plain", plain(tmp_path), images=tmp_path / "gone")
    with pytest.raises(ic.LoadError, match=r'holds|takes an object with a list under "data"'):
        read_questions("docvqa", dumped(tmp_path / "val.json", {"rows": []}))
    for name, content, message in (
        ("a.jsonl", "{", "line 1, is no JSON"), ("b.jsonl", b"\xff\xfe\x00", "cannot be read"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ic.LoadError, match=message):
            read_questions("plain", tmp_path / name)
    (tmp_path / "c.json").write_text("[1")
    with pytest.raises(ic.LoadError, match="cannot be read"):
        read_questions("docvqa", tmp_path / "c.json")


def many(*kinds: str) -> Questions:
    image = Image.new("RGB", (2, 2))
    return Questions(tuple(Question(f"q{i}", (image,), "Which?", ("a",), kind) for i, kind in enumerate(kinds)))


def test_selection_holds_every_kind_in_its_share() -> None:
    questions = many(*["bars"] * 60, *["lines"] * 30, *["pies"] * 10)
    for count in range(1, 100):
        kinds = questions.select(count, seed=3).kinds
        for kind, total in questions.kinds.items():
            assert abs(kinds.get(kind, 0) - count * total / 100) <= 1, (count, kind)
    few, more = questions.select(10), questions.select(30)
    assert {q.name for q in few} < {q.name for q in more} and few.kinds == {"bars": 6, "lines": 3, "pies": 1}
    order = [int(question.name[1:]) for question in more]
    assert order == sorted(order) and more == questions.select(30)
    assert few != questions.select(10, seed=1)


def test_splits_share_no_question_and_do_not_depend_on_the_rest() -> None:
    questions = many(*["bars"] * 20, *["lines"] * 10)
    pilot, rest = questions.split(8, 10, seed=5)
    assert (len(pilot), len(rest)) == (8, 10) and not {q.name for q in pilot} & {q.name for q in rest}
    assert pilot == questions.select(8, seed=5)
    alone = questions.where(lambda question: question.kind == "bars")
    turned = Questions(alone.questions[::-1])
    assert {q.name for q in alone.select(5)} == {q.name for q in turned.select(5)}
    lost = Questions(
        questions.questions, tuple(Skipped(f"row {i}", "image", "there is no such file", "") for i in range(3))
    )
    with pytest.raises(ic.PlanError, match=r"has 30 \(3 rows could not be used: 3 for image: there is no such file\)"):
        lost.split(31)
    for counts, message in (
        ((31,), "31 questions are asked for, questions has 30"),
        ((0,), "whole numbers"),
        ((), "whole numbers"),
    ):
        with pytest.raises(ic.PlanError, match=message):
            questions.split(*counts)
    with pytest.raises(ic.PlanError, match="no by='kinds'. Did you mean 'kind'"):
        questions.select(3, by="kinds")
    assert len(questions[:4]) == 4 and isinstance(questions[:4], Questions)


def test_difficulty_is_what_the_source_says() -> None:
    image = Image.new("RGB", (2, 2))
    said = Question("a", (image,), "How many more than the average?", ("3",), meta={"difficulty": "hard"})
    silent = Question("b", (image,), "How many more than the average?", ("3",))
    assert (said.difficulty, silent.difficulty) == ("hard", None)
    assert said.image == silent.image != Question("c", (Image.new("RGB", (2, 2), "red"),), "?", ("a",)).image
    for lacking in ({"images": ()}, {"question": ""}, {"answers": ()}, {"answers": (" ",)}):
        with pytest.raises(ic.LoadError, match="it has no"):
            Question(**({"name": "d", "images": (image,), "question": "?", "answers": ("a",)} | lacking))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = drawn(tmp_path / "source" / "chart.jpg", 5)
    shown = Image.new("RGB", (5, 4), (1, 2, 3))
    questions = [
        Question(
            "Größe/1", (shown,), "Wie groß?", ("5", "fünf"), "human", {"difficulty": "easy", "boxes": [[0, 0, 2, 3]]}
        ),
        Question("two", (file, shown), "Same?", ("no",)),
    ]
    path = write_questions(tmp_path / "written", questions)
    again = read_questions("plain", tmp_path / "written", strict=True)
    assert path.name == "questions.jsonl" and len(again) == 2
    for before, after in zip(questions, again, strict=True):
        for field in ("name", "question", "answers", "kind", "meta"):
            assert getattr(before, field) == getattr(after, field)
        for a, b in zip(before.pictures(), after.pictures(), strict=True):
            assert a.tobytes() == b.tobytes() and a.size == b.size
    twice = write_questions(tmp_path / "twice", again)
    assert twice.read_text() == path.read_text()
    with pytest.raises(ic.PlanError, match="two questions have one name"):
        write_questions(tmp_path / "x", [questions[0]] * 2)
    with pytest.raises(ic.PlanError, match="question 'two': its meta is no JSON"):
        write_questions(tmp_path / "x", [Question("two", (shown,), "?", ("a",), meta={"x": shown})])
    file.unlink()
    with pytest.raises(ic.LoadError, match=r"chart\.jpg cannot be read"):
        write_questions(tmp_path / "y", questions)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y" / "questions.jsonl").exists()


def test_no_image_takes_the_place_of_another(tmp_path: Path) -> None:
    """Names of files are made of names of questions and numbers of images, and may come out alike."""
    shown = [Image.new("RGB", (4, 4), (40 * i, 0, 255 - i)) for i in range(6)]
    asked = [Question("x", tuple(shown[:2]), "which?", ("1",)), Question("x_0", (shown[2],), "which?", ("1",)),
             Question("X_1", (shown[3],), "which?", ("1",)), Question("a b", (shown[4],), "which?", ("1",))]  # fmt: skip
    write_questions(tmp_path, asked)
    for question, again in zip(asked, read_questions("plain", tmp_path), strict=True):
        pixels = [Image.open(image).getpixel((0, 0)) for image in again.images]
        assert pixels == [image.getpixel((0, 0)) for image in question.images]
    assert len({file.name.lower() for file in (tmp_path / "images").iterdir()}) == 5


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """Texts may hold characters that end a line elsewhere, and JSON does not escape."""
    asked = [Question("1", (Image.new("RGB", (4, 4)),), "one\u2028two\x85three\x1cfour", ("a\u2029b",))]
    write_questions(tmp_path, asked)
    (again,) = read_questions("plain", tmp_path)
    assert (again.question, again.answers) == (asked[0].question, asked[0].answers)
