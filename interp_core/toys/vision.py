"""Pictures and questions of `toy:vision`, with their ground truth, and its tokenizer.

A picture is 32x32 pixels, 4x4 cells of 8x8, one visual token each:

* shapes   two to five objects, each in a cell: square, ring, triangle or cross, in red, green, blue or yellow
* bars     four bars, one of each colour, 1 to 7 high (4 pixels a unit), each in a column of cells

and a question about it is of one of eight kinds:

| kind | question | answer |
|---|---|---|
| exist | Is there a red square? | yes, no |
| color | What color is the square? | red, green, blue, yellow |
| shape | What shape is red? | square, ring, triangle, cross |
| count | How many are red? | 0 to 5 |
| where | Where is the red square? | left, right |
| value | How tall is red? | 1 to 7 |
| tallest | Which is tallest? | red, green, blue, yellow |
| compare | Is red taller than blue? | yes, no |

Nothing here imports torch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TextError, nearest
from . import text as plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BARS", "COLORS", "KINDS", "SHAPES", "Question", "Scene", "Thing", "ask", "bars_scene", "build_tokenizer", "draw",
    "patches", "questions", "shapes_scene",
]  # fmt: skip

SIZE, CELL, PATCH, MERGE = 32, 8, 4, 2
"""Edges in pixels of a picture, of what a visual token sees, of a patch; and patches per cell's edge."""
GRID = SIZE // CELL
COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "ring", "triangle", "cross")
RGB = {"red": (205, 45, 45), "green": (45, 165, 60), "blue": (50, 70, 205), "yellow": (215, 195, 45)}
BACKGROUND = (240, 240, 240)
JITTER = 20
"""How far each channel of an object's colour may lie from `RGB`."""
MASKS = {
    "square": ("######", "######", "######", "######", "######", "######"),
    "ring": (".####.", "##..##", "#....#", "#....#", "##..##", ".####."),
    "triangle": ("......", "..##..", "..##..", ".####.", ".####.", "######"),
    "cross": ("#....#", "##..##", ".####.", ".####.", "##..##", "#....#"),
}
PICTURES = ("shapes", "bars")
_SHARES = {
    "exist": 0.2, "color": 0.18, "shape": 0.14, "count": 0.14, "where": 0.04, "value": 0.14, "tallest": 0.05,
    "compare": 0.11,
}  # fmt: skip
KINDS: Mapping[str, float] = MappingProxyType(_SHARES)
"""Share of each kind among the questions of training. `where` is rare: it is learnt last, and is not part of what the
toy is held to."""
BARS = ("value", "tallest", "compare")
"""The kinds that are asked about bars, the others about shapes."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, half-open."""
Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""`[height width channel]`."""


@dataclass(frozen=True)
class Thing:
    """An object of a picture.

    Attributes:
        shape: one of `SHAPES`, or "bar".
        color: one of `COLORS`.
        box: the pixels it is drawn in.
        height: of a bar, 1 to 7.
        rgb: the colour it is drawn with.
    """

    shape: str
    color: str
    box: Box
    height: int
    rgb: tuple[int, int, int]

    @property
    def cells(self) -> tuple[int, ...]:
        """Which of the picture's visual tokens (row by row) see a part of it."""
        left, top, right, bottom = self.box
        rows, cols = range(top // CELL, (bottom - 1) // CELL + 1), range(left // CELL, (right - 1) // CELL + 1)
        return tuple(row * GRID + col for row in rows for col in cols)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `kind` is "shapes" or "bars"."""

    kind: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a picture, with its answer and what decides it.

    Attributes:
        name: unique among the questions drawn together.
        images: the one picture, `[32 32 3]` of bytes.
        question: the words of the question.
        answers: the one right answer.
        kind: one of `KINDS`.
        meta: `scene`; `boxes` of the things asked about, in pixels; `tokens`, which of the 16 visual tokens see a part
            of them. Both are empty where the answer is that there is no such thing.
    """

    name: str
    images: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def shapes_scene(rng: random.Random, least: int = 2, most: int = 5) -> Scene:
    """Objects in different cells; a palette of few colours makes equal ones frequent."""
    number = rng.randint(least, most)
    palette = rng.sample(COLORS, rng.randint(1, 4))
    things = []
    for cell in rng.sample(range(GRID * GRID), number):
        top, left = CELL * (cell // GRID) + 1, CELL * (cell % GRID) + 1
        color = rng.choice(palette)
        things.append(Thing(rng.choice(SHAPES), color, (left, top, left + 6, top + 6), 0, _shade(rng, color)))
    return Scene("shapes", tuple(things))


def bars_scene(rng: random.Random) -> Scene:
    """A bar of every colour in random order; heights differ."""
    things = []
    for col, (color, height) in enumerate(zip(rng.sample(COLORS, 4), rng.sample(range(1, 8), 4), strict=True)):
        box = (CELL * col + 1, SIZE - 4 * height, CELL * col + 7, SIZE)
        things.append(Thing("bar", color, box, height, _shade(rng, color)))
    return Scene("bars", tuple(things))


def _shade(rng: random.Random, color: str) -> tuple[int, int, int]:
    red, green, blue = (channel + rng.randint(-JITTER, JITTER) for channel in RGB[color])
    return red, green, blue


@cache
def _mask(shape: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([[pixel == "#" for pixel in row] for row in MASKS[shape]])


def draw(scene: Scene) -> Picture:
    """The picture of a scene, `[32 32 3]`."""
    picture = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        part = picture[top:bottom, left:right]
        part[... if thing.shape == "bar" else _mask(thing.shape)] = thing.rgb
    return picture


def ask(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str, tuple[Thing, ...]] | None:
    """A question of a kind about a scene: its words, its answer, the things it asks about; None if there is none."""
    return _ASK[kind](rng, scene.things)


Asked = tuple[str, str, tuple[Thing, ...]] | None


def _exist(rng: random.Random, things: Sequence[Thing]) -> Asked:
    """Most of what is asked for in vain has the colour of one object and the shape of another."""
    there = {(t.color, t.shape) for t in things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(there))
    else:
        every = [(color, shape) for color in COLORS for shape in SHAPES]
        absent = [pair for pair in every if pair not in there]
        mixed = [(c, s) for c, s in absent if any(c == t.color for t in things) and any(s == t.shape for t in things)]
        color, shape = rng.choice(mixed if mixed and rng.random() < 0.75 else absent)
    shown = tuple(t for t in things if (t.color, t.shape) == (color, shape))
    return f"Is there a {color} {shape}?", "yes" if shown else "no", shown


def _the_one(rng: random.Random, things: Sequence[Thing], features: Sequence[str]) -> Thing | None:
    """One of the things that are alone in these features."""
    look = [tuple(getattr(t, name) for name in features) for t in things]
    alone = [t for t, features_of_it in zip(things, look, strict=True) if look.count(features_of_it) == 1]
    return rng.choice(alone) if alone else None


def _color(rng: random.Random, things: Sequence[Thing]) -> Asked:
    thing = _the_one(rng, things, ["shape"])
    return (f"What color is the {thing.shape}?", thing.color, (thing,)) if thing else None


def _shape(rng: random.Random, things: Sequence[Thing]) -> Asked:
    thing = _the_one(rng, things, ["color"])
    return (f"What shape is {thing.color}?", thing.shape, (thing,)) if thing else None


def _count(rng: random.Random, things: Sequence[Thing]) -> Asked:
    counts = Counter(t.color for t in things)
    absent = [color for color in COLORS if color not in counts]
    color = rng.choice(absent) if absent and rng.random() < 0.15 else rng.choice(sorted(counts))
    return f"How many are {color}?", str(counts[color]), tuple(t for t in things if t.color == color)


def _where(rng: random.Random, things: Sequence[Thing]) -> Asked:
    thing = _the_one(rng, things, ["color", "shape"])
    if thing is None:
        return None
    return f"Where is the {thing.color} {thing.shape}?", "left" if thing.box[0] < SIZE // 2 else "right", (thing,)


def _value(rng: random.Random, things: Sequence[Thing]) -> Asked:
    thing = rng.choice(things)
    return f"How tall is {thing.color}?", str(thing.height), (thing,)


def _tallest(_rng: random.Random, things: Sequence[Thing]) -> Asked:
    thing = max(things, key=lambda t: t.height)
    return "Which is tallest?", thing.color, (thing,)


def _compare(rng: random.Random, things: Sequence[Thing]) -> Asked:
    a, b = rng.sample(list(things), 2)
    return f"Is {a.color} taller than {b.color}?", "yes" if a.height > b.height else "no", (a, b)


_ASK = {
    "exist": _exist, "color": _color, "shape": _shape, "count": _count, "where": _where, "value": _value,
    "tallest": _tallest, "compare": _compare,
}  # fmt: skip


def questions(rng: random.Random, number: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """Questions of these kinds in turn (None: all), each about a picture of its own.

    Raises:
        TextError: there is no such kind.
    """
    kinds = list(KINDS if kinds is None else kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise TextError(f"toy:vision has no questions of the kind {unknown[0]!r}. {nearest(unknown[0], KINDS)}")
    out: list[Question] = []
    while len(out) < number:
        kind = kinds[len(out) % len(kinds)]
        scene = bars_scene(rng) if kind in BARS else shapes_scene(rng)
        if question := ask(rng, scene, kind):
            words, answer, things = question
            tokens = tuple(sorted({cell for thing in things for cell in thing.cells}))
            meta = {"scene": scene, "boxes": tuple(thing.box for thing in things), "tokens": tokens}
            out.append(Question(f"{kind}-{len(out)}", (draw(scene),), words, (answer,), kind, meta))
    return out


SPECIAL = (
    plain.END, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""The chat template, laid out as Qwen's."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with Qwen's special tokens, in which every word of the questions is one token."""
    pieces = ["user", "assistant", "system", "\n", "?", "yes", "no", "left", "right", *COLORS, *SHAPES]
    pieces += [*map(str, range(8)), *(f" {word}" for word in (*COLORS, *SHAPES))]
    for words in ("Is there a", "What color is the", "What shape is", "How many are", "Where is the", "How tall is",
                  "Which is tallest", "Is red taller than blue"):  # fmt: skip
        first, *rest = words.split()
        pieces += [first, *(f" {word}" for word in rest)]
    tokenizer = plain.build_tokenizer(pieces, SPECIAL, eos="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def patches(picture: Picture) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`pixel_values` of a picture, `[patch pixel]`: what `Qwen2VLImageProcessor` makes of it. Patches that are merged
    into one visual token follow each other."""
    scaled = ((picture.astype(np.float32) / 255 - 0.5) / 0.5).astype(np.float32)
    rows, cols = picture.shape[0] // CELL, picture.shape[1] // CELL
    blocks = scaled.reshape(rows, MERGE, PATCH, cols, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(blocks).reshape(-1, 3 * PATCH * PATCH)
