"""What a method or a recipe runs, in numbers that need no weights: `Config.cost` gives them, `interp plan` prices them.

    class MyConfig(ic.Config):
        def cost(self, work: ic.Work) -> ic.Cost:
            return work.forward() + work.forward(backward=1)

A cost is a list of passes: so many rows of so many columns through some layers. Token-layers, operations and memory
follow from that and the model's sizes; see docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import PlanError, wrong

TOGETHER = 512
"""Tokens of the texts that share a sweep's clean pass, at most: a matrix product of so many rows runs at the machine's
rate."""


@dataclass(frozen=True)
class Passes:
    """Rows that go through the same layers.

    Attributes:
        rows: of all calls together.
        columns: tokens of a row that are computed.
        start, stop: first layer, and the one behind the last.
        calls: how often the model is called for them; 0 where the rows join a call that is counted already.
        past: tokens of a row whose keys and values are there from before.
        read_out: positions of all rows together that are turned into logits.
        at_once: of these, how many at a time.
        backward: backward passes through these layers.
        generated: the columns are made one by one: a call each, `past` growing.
    """

    rows: int
    columns: int
    start: int
    stop: int
    calls: int = 1
    past: int = 0
    read_out: int = 0
    at_once: int = 0
    backward: int = 0
    generated: bool = False

    @property
    def token_layers(self) -> int:
        """Tokens times layers, forward."""
        return self.rows * self.columns * max(self.stop - self.start, 0)

    @property
    def rows_at_once(self) -> int:
        """Rows of the widest call."""
        calls = max(self.calls // self.columns if self.generated else self.calls, 1)
        return -(-self.rows // calls)


@dataclass(frozen=True)
class Cost:
    """What is run; costs add up.

    Attributes:
        passes: alike ones together.
        kept: bytes that stay until the end: activations that were read, results.
        beside: operations of products of matrices that are none of the model's passes.
        assumes: what is not known before the run, and is taken to be so: sentences for the plan.
    """

    passes: tuple[Passes, ...] = ()
    kept: int = 0
    beside: int = 0
    assumes: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        assumes = tuple(dict.fromkeys((*self.assumes, *other.assumes)))
        return Cost((*self.passes, *other.passes), self.kept + other.kept, self.beside + other.beside, assumes)

    def __mul__(self, times: int) -> Cost:
        """The same so many times, one after the other."""
        passes = tuple(
            replace(each, rows=each.rows * times, calls=each.calls * times, read_out=each.read_out * times)
            for each in self.passes
        )
        return Cost(passes if times else (), self.kept * times, self.beside * times, self.assumes)

    @property
    def forward(self) -> int:
        """Token-layers of forward passes, those of generation among them."""
        return sum(each.token_layers for each in self.passes)

    @property
    def backward(self) -> int:
        """Token-layers of backward passes."""
        return sum(each.token_layers * each.backward for each in self.passes)

    @property
    def calls(self) -> int:
        """How often the model is called."""
        return sum(each.calls for each in self.passes)

    @property
    def read_out(self) -> int:
        """Positions that are turned into logits."""
        return sum(each.read_out for each in self.passes)

    @property
    def generated(self) -> int:
        """Tokens that are generated, without the first of each text, which the prompt's pass gives."""
        return sum(each.rows * each.columns for each in self.passes if each.generated)


@dataclass(frozen=True)
class Work:
    """The prompts of a plan, and the sizes of the model that reads them.

    Attributes:
        prompts: how many.
        tokens: of each, its target among them.
        target: of these, tokens at the end that are explained or scored.
        visual: of these, tokens of an image, before the text (0: nobody says).
        new_tokens: generated for each.
        batch: prompts that go through the model together.
        heads, kv_heads: query and key-value heads of each layer, 0 where a layer has none.
        experts: experts of each layer, 0 where it is dense.
        d_key, d_value: widths of a head's keys and values, in each layer.
        d_model, d_vocab: widths.
        itemsize: bytes of a number.
    """

    prompts: int
    tokens: int
    heads: tuple[int, ...]
    target: int = 0
    new_tokens: int = 0
    batch: int = 1
    kv_heads: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    d_key: tuple[int, ...] = ()
    d_value: tuple[int, ...] = ()
    d_model: int = 1
    d_vocab: int = field(default=1, repr=False)
    itemsize: int = field(default=4, repr=False)
    visual: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "tokens", "batch"):
            if getattr(self, name) < 1:
                raise PlanError(wrong(f"{name} of a plan", "a number from 1", getattr(self, name)))
        if not 0 <= self.target < self.tokens:
            raise PlanError(
                f"the target has {self.target} tokens of {self.tokens}: it is the end of a text, and a prompt of a "
                "token at least comes before it; give more --tokens or a smaller --target"
            )
        if not 0 <= self.visual < self.tokens - self.target:
            raise PlanError(
                f"the image has {self.visual} tokens of {self.tokens}, {self.target} of them the target: text comes "
                "behind it; give more --tokens or a smaller --visual"
            )
        if self.new_tokens < 0:
            raise PlanError(wrong("new_tokens of a plan", "a number from 0", self.new_tokens))

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.heads)

    def forward(
        self,
        rows: int | None = None,
        columns: int | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        read_out: int = 1,
        backward: int = 0,
        batch: int | None = None,
    ) -> Cost:
        """Rows through some layers, in batches.

        Args:
            rows: None: a row per prompt.
            columns: tokens of a row (None: of a prompt).
            start, stop: first layer, and the one behind the last (None: all).
            read_out: positions of each row that are turned into logits (their last, as a rule).
            backward: backward passes after each.
            batch: rows of a call, at most (None: the plan's).
        """
        rows = self.prompts if rows is None else rows
        at_once = min(self.batch if batch is None else batch, rows)
        if not rows:
            return Cost()
        passes = Passes(
            rows, self.tokens if columns is None else columns, start, self.layers if stop is None else stop,
            calls=-(-rows // at_once), read_out=rows * read_out, at_once=at_once * read_out, backward=backward,
        )  # fmt: skip
        return Cost((passes,))

    def reading_out(self, positions: int) -> Cost:
        """Positions that are turned into logits beside all passes, a few at a time."""
        return Cost((Passes(0, 0, self.layers, self.layers, calls=0, read_out=positions, at_once=1),))

    def generate(self, new_tokens: int | None = None) -> Cost:
        """Greedy generation after every prompt: the prompt's pass, which gives the first token, and a call for each of
        the others."""
        count = self.new_tokens if new_tokens is None else new_tokens
        prefill = self.forward()
        if count < 2:
            return prefill
        (first,) = prefill.passes
        more = replace(
            first, columns=count - 1, past=self.tokens, calls=first.calls * (count - 1),
            read_out=self.prompts * (count - 1), generated=True,
        )  # fmt: skip
        return prefill + Cost((more,))

    def swept(self, starts: dict[tuple[int, int], int], rows: int | None = None) -> Cost:
        """A sweep: a clean pass over every row, and variants that run what they change alone.

        Args:
            starts: how many variants of a row begin at `(layer, position)`, counted from the text's begin.
            rows: texts (None: a row per prompt).
        """
        texts = self.prompts if rows is None else rows
        together = max(1, TOGETHER // self.tokens)
        joining = tuple(
            Passes(
                texts * count, self.tokens - position, layer, self.layers, calls=0, past=position,
                read_out=texts * count, at_once=count,
            )
            for (layer, position), count in starts.items()
        )  # fmt: skip
        clean = self.forward(texts, batch=together)
        groups = sum(each.calls for each in clean.passes)
        # variants of as many columns share a call, which the weights are read for
        widths = groups * len({position for _, position in starts})
        return clean + Cost((*joining, Passes(0, 0, 0, self.layers, calls=widths)))
