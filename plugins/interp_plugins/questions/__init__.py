"""Questions about images: data sets in their published file forms, and JSON lines with a folder of images.

question    `Question`, and `Questions`: several, with the rows that could not be used and why
published   readers of ChartQA, DocVQA, VQAv2 and POPE, by name: `read_questions("chartqa", folder)`
plain       `questions.jsonl` with a folder of images, read and written
selection   the same questions for the same seed, every kind in its share
images      files are opened when their pixels are asked for; Pillow alone

from interp_plugins.questions import read_questions

questions = read_questions("chartqa", "ChartQA Dataset/test")
print(questions)                                      # how many, of which kinds, and what was skipped and why
pilot, rest = questions.split(8, 10, seed=0)
rest[0].pictures(), rest[0].question, rest[0].answers
"""

from __future__ import annotations

from .plain import write_questions
from .published import READERS, read_questions
from .question import Question, Questions, Skipped

__all__ = ["READERS", "Question", "Questions", "Skipped", "read_questions", "write_questions"]
