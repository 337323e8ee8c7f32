"""Templates: how pairs become a prompt, and the role of every piece of it.

    [prefix.instructions][instructions][sep.instructions]
    { [prefix.input][ x][sep.input][prefix.output][ y][sep.output] }   once per demonstration
    [prefix.input][ x][sep.input][prefix.output]                       the query

The default is Q: / A:, a line break after the input and an empty line after the output; every x and y has one space in
front, so that the prompt ends in "A:" and the answer is " y".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import interp_core as ic
from interp_core.errors import nearest

from .tasks import Pair

Boundary = Literal["strict", "recompute", "recompute-strict", "reference"]
"""How the tokens of an answer are found; see `prompts.target_ids`."""
FIELDS = ("input", "output", "instructions")
BOS_TEXT = "<|endoftext|>"
PREFIXES = (
    ("A:", "B:"), ("input:", "output:"), ("Input:", "Output:"), ("In:", "Out:"), ("question:", "answer:"),
    ("Question:", "Answer:"), ("", " ->"), ("", " :"), ("text:", "label:"), ("x:", "f(x):"), ("x:", "y:"), ("X:", "Y:"),
)  # fmt: skip
"""Prefixes of input and output over which the reference tests portability."""
SEPARATORS = (
    (" ", ""), (" ", "\n"), (" ", "\n\n"), ("\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n\n"), (" ", "|"), ("\n", "|"),
    ("|", "\n"), ("|", "\n\n"),
)  # fmt: skip
"""Separators after input and output over which the reference tests portability."""


class Part(NamedTuple):
    """A piece of a prompt: its text, its label, and what its first and last token are called instead."""

    text: str
    label: str
    first: str = ""
    last: str = ""


class Front(NamedTuple):
    """What stands before a prompt: whether the tokenizer puts its own BOS there, or the text of one."""

    added: bool
    text: str


@dataclass(frozen=True)
class Template:
    r"""How pairs become a prompt.

    Attributes:
        prefixes, separators: texts before and after `input`, `output` and `instructions` (this one "" if left out).
        instructions: text before the demonstrations.
        prepend_space: one space in front of every x and y.
        bos: None, the reference's rule: a BOS that the tokenizer adds, else the text `<|endoftext|>` (or of its own
            BOS) in front, else none. True: the same, but a tokenizer without is an error. False: no special tokens, no
            such text.
        boundary: how the answer's tokens are found; see `prompts.target_ids`.

    Raises:
        PlanError: a field that there is not, is missing or is no text; a boundary that there is not.
    """

    prefixes: Mapping[str, str] = field(default_factory=lambda: {"input": "Q:", "output": "A:", "instructions": ""})
    separators: Mapping[str, str] = field(default_factory=lambda: {"input": "\n", "output": "\n\n", "instructions": ""})
    instructions: str = ""
    prepend_space: bool = True
    bos: bool | None = None
    boundary: Boundary = "strict"

    def __post_init__(self) -> None:
        for name in ("prefixes", "separators"):
            texts = {"instructions": "", **getattr(self, name)}
            for key, text in texts.items():
                if key not in FIELDS:
                    raise ic.PlanError(f"{name} of a template have no {key!r}. {nearest(key, FIELDS)}")
                if not isinstance(text, str):
                    raise ic.PlanError(f"{name}[{key!r}] of a template is text, not {text!r}")
            if missing := [key for key in FIELDS if key not in texts]:
                raise ic.PlanError(f'{name} of a template lack {missing[0]!r}; write "" for none')
            # frozen: filled, and put in one order, which hashes and files go by
            object.__setattr__(self, name, {key: texts[key] for key in FIELDS})
        if self.boundary not in (known := Boundary.__args__):  # type: ignore[attr-defined]
            raise ic.PlanError(f"a template has no boundary {self.boundary!r}. {nearest(str(self.boundary), known)}")

    @staticmethod
    def of(prefixes: tuple[str, str], separators: tuple[str, str], **more: Any) -> Template:
        """A template from the prefixes and separators of input and output, as in `PREFIXES` and `SEPARATORS`."""
        before, after = ({"input": pair[0], "output": pair[1]} for pair in (prefixes, separators))
        return Template(before, after, **more)

    @staticmethod
    def filled(prefixes: Mapping[str, str] | None, separators: Mapping[str, str] | None, **more: Any) -> Template:
        """A template from settings; None leaves the default's."""
        plain = Template()
        return Template(prefixes or plain.prefixes, separators or plain.separators, **more)

    def __hash__(self) -> int:
        texts = (*self.prefixes.values(), *self.separators.values(), self.instructions)
        return hash((texts, self.prepend_space, self.bos, self.boundary))

    def __str__(self) -> str:
        pieces = (self.prefixes["input"], "{}", self.separators["input"], self.prefixes["output"], "{}")
        return "".join(pieces) + self.separators["output"]

    def spaced(self, text: str) -> str:
        """A word as it stands in a prompt."""
        return f" {text}" if self.prepend_space else text

    def parts(self, demos: Sequence[Pair], query: str, front: str = "") -> list[Part]:
        """The pieces of a prompt, empty ones left out.

        Args:
            front: text of a BOS, before the prefix of the instructions.
        """
        pieces = [
            Part(front + self.prefixes["instructions"], "bos_token"),
            Part(self.instructions, "instructions_token"),
            Part(self.separators["instructions"], "separator_token"),
        ]
        for number, (x, y) in enumerate(demos, 1):
            pieces += self._question(x, f"demonstration_{number}_token", "")
            pieces.append(Part(self.spaced(y), f"demonstration_{number}_label_token"))
            pieces.append(Part(self.separators["output"], "separator_token", first="end_of_example_token"))
        pieces += self._question(query, "query_demonstration_token", "query_")
        return [piece for piece in pieces if piece.text]

    def _question(self, x: str, label: str, kind: str) -> Iterator[Part]:
        """Prefix, input, separator, prefix of the output; the last token before the answer is the predictive one."""
        predictive = f"{kind}predictive_token"
        yield Part(self.prefixes["input"], f"{kind}structural_token")
        yield Part(self.spaced(x), label)
        last = "" if self.prefixes["output"] else predictive
        yield Part(self.separators["input"], f"{kind}separator_token", last=last)
        yield Part(self.prefixes["output"], f"{kind}structural_token", last=predictive)

    def front(self, tokenizer: Any) -> Front:
        """What stands before this template's prompts with a tokenizer.

        Raises:
            TextError: a BOS is asked for and there is none; or the tokenizer adds more than one token in front.
        """
        if self.bos is False:
            return Front(False, "")
        # what a tokenizer adds is seen on one letter, whatever its settings call it
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        if whole[1:] == plain and len(whole) > len(plain):
            return Front(True, "")
        if whole != plain:
            raise ic.TextError(
                f"{name_of(tokenizer)} makes {tokenizer.convert_ids_to_tokens(whole)} of 'a'; prompts of function "
                "vectors know one special token in front. Pass Template(bos=False) to leave all of them out"
            )
        text = next((t for t in (BOS_TEXT, tokenizer.bos_token) if t and tokenizer.tokenize(t) == [t]), "")
        if self.bos and not text:
            raise ic.TextError(
                f"a BOS is asked for, but {name_of(tokenizer)} adds none and knows neither {BOS_TEXT!r} nor a BOS of "
                "its own; pass Template(bos=None) or set tokenizer.bos_token"
            )
        return Front(False, text)


def name_of(tokenizer: Any) -> str:
    """What a tokenizer is called in messages and files."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
