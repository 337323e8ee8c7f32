"""Prompts of the tasks that circuits are studied on: pairs that differ in one respect, with an answer and its rival.

    data = ic.prompts.indirect_objects(model, 16)
    ic.method("activation_patching")(model, data.clean, corrupted=data.corrupted, answer=data.answer, other=data.other)

    indirect_objects   When Mary and John went to the park, John gave a book to     Mary, not John
    greater_than       The war lasted from the year 1732 to the year 17             46, not 18
    facts              The capital of France is                                     Paris, not Tokyo
    in_context         Q: big, A: small, Q: hot, A:                                 cold, not hotter
    induction          moon tree dog moon tree                                      dog, not cat

Pairs are drawn with a seed and kept if the tokenizer can score them: both prompts have as many tokens, answer and rival
are one token each, and following the prompt they leave its tokens as they are. No prompt comes twice. The same seed and
tokenizer give the same pairs.

Sources: Wang et al. (2022), arXiv:2211.00593, for indirect objects; Hanna et al. (2023), arXiv:2305.00586, for years;
Meng et al. (2022), arXiv:2202.05262, for facts; Todd et al. (2023), arXiv:2310.15213, for relations in context; Olsson
et al. (2022) for induction. Sentences, names and tables are of this package.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import PlanError, TextError, nearest, wrong
from .toys.text import relations, words
from .views import Part, Shown, Table, View

if TYPE_CHECKING:
    from torch import Tensor

    from .chat import Chars
    from .score import Score

__all__ = ["Pairs", "facts", "greater_than", "in_context", "indirect_objects", "induction"]

FRUITLESS = 5000
"""Draws in a row without a new pair after which there are taken to be no more."""
NAMES = (
    "Adam", "Alice", "Amy", "Andrew", "Anna", "Ben", "Bob", "Brian", "Chris", "Daniel", "David", "Emma", "Frank",
    "George", "Helen", "Henry", "Jack", "James", "Jane", "Jason", "John", "Julia", "Karen", "Kate", "Kevin", "Laura",
    "Lisa", "Maria", "Mark", "Martin", "Mary", "Michael", "Paul", "Peter", "Rachel", "Robert", "Sarah", "Simon",
    "Susan", "Tom",
)  # fmt: skip
PLACES = ("beach", "garden", "hospital", "library", "market", "museum", "office", "park", "school", "station", "store")
OBJECTS = ("bag", "ball", "book", "cake", "coat", "drink", "key", "letter", "map", "present", "ring", "ticket")
GIVING = (
    "When {} and {} went to the {place}, {s2} gave a {object} to",
    "After {} and {} had met at the {place}, {s2} handed a {object} to",
    "While {} and {} were waiting near the {place}, {s2} showed a {object} to",
    "As soon as {} and {} got back from the {place}, {s2} passed a {object} to",
    "Last week {} and {} worked at the {place}, where {s2} sold a {object} to",
    "Once {} and {} had left the {place}, {s2} offered a {object} to",
)
EVENTS = (
    "war", "siege", "dispute", "famine", "voyage", "reign", "rebellion", "drought", "expedition", "alliance", "trial",
    "construction", "occupation", "partnership", "plague", "project", "conflict", "journey", "campaign", "truce",
)  # fmt: skip
PERIOD = "The {event} lasted from the year {century}{year} to the year {century}"
LANDMARKS = {
    "Louvre": "Paris", "Eiffel Tower": "Paris", "Notre Dame cathedral": "Paris", "Colosseum": "Rome",
    "Trevi Fountain": "Rome", "Kremlin": "Moscow", "Bolshoi Theatre": "Moscow", "Parthenon": "Athens",
    "Brandenburg Gate": "Berlin", "Reichstag": "Berlin", "Prado": "Madrid", "Tower Bridge": "London",
    "British Museum": "London", "Buckingham Palace": "London", "Charles Bridge": "Prague", "Atomium": "Brussels",
    "Rijksmuseum": "Amsterdam", "Blue Mosque": "Istanbul", "Forbidden City": "Beijing", "Burj Khalifa": "Dubai",
    "Opera House with the white shells": "Sydney", "Space Needle": "Seattle", "CN Tower": "Toronto",
    "White House": "Washington", "Willis Tower": "Chicago", "Belvedere Palace": "Vienna", "Meiji Shrine": "Tokyo",
}  # fmt: skip
FACTS = {
    "capital": ("The capital of {subject} is", "The capital city of {subject} is called"),
    "language": ("Most people in {subject} speak", "The official language of {subject} is"),
    "continent": ("The country of {subject} is in", "On a map of the world, {subject} lies in"),
    "landmark": ("The {subject} is located in the city of", "To see the {subject}, travel to the city of"),
}
SPLIT_WORD = "a word of several tokens, before any was drawn"
Encode = Callable[[str], list[int]]
Fact = Literal["capital", "language", "continent", "landmark"]


@dataclass(frozen=True, repr=False)
class Pairs(Shown):
    """Pairs of prompts, row by row, as methods take them.

    Attributes:
        clean, corrupted: the prompts, of as many tokens in each row.
        answer, other: what follows the clean prompt, and its rival: a word that is one token, as scores take it.
        kind: which form each row has ("ABBA" or "BABA", a sentence, a relation).
        places: characters `(start, stop)` in each clean prompt by name; `model.tokens(data.clean).name(**data.places)`
            makes them positions.
        dropped: how many pairs that were drawn, and words that were to be drawn from, the tokenizer cannot score, by
            reason.
        score: what the task's authors judge by, where that is not the difference of two logits; None.
    """

    clean: list[str]
    corrupted: list[str]
    answer: list[str]
    other: list[str]
    kind: list[str]
    places: dict[str, list[Chars]]
    dropped: dict[str, int]
    score: Score | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def _view(self) -> View:
        rows = list(zip(self.clean, self.corrupted, self.answer, self.other, self.kind, strict=True))
        lines = [f"{answer!r}, not {other!r}, after {clean!r}" for clean, _, answer, other, _ in rows]
        lost = [f"{count} with {why}" for why, count in self.dropped.items()]
        table = Table(["clean", "corrupted", "answer", "other", "kind"], [list(map(str, row)) for row in rows])
        return View(f"Pairs of prompts: {len(self)}", [Part("answers", lines, table), Part("dropped", lost)])


class _Draft(NamedTuple):
    """A pair before a tokenizer has seen it; answer and other are written with the space that stands before them."""

    clean: str
    corrupted: str
    answer: str
    other: str
    kind: str
    places: Mapping[str, Chars]


def indirect_objects(
    model: Any, count: int = 32, *, corrupted: Literal["swapped", "other_names"] = "swapped", seed: int = 0,
    names: Sequence[str] = NAMES,
) -> Pairs:  # fmt: skip
    """Who is given the thing? As many prompts name the receiver first (ABBA) as second (BABA), in turn; their places
    are `io` (the receiver), `s1` and `s2` (the giver, twice).

    Args:
        model: a model or a tokenizer.
        corrupted: "swapped": the receiver gives, so that the other name is right. "other_names": three other names, of
            which neither answer is (the paper's ABC).
        names: to draw from.

    Raises:
        PlanError: no such corruption, too few names, or fewer pairs than `count` that the tokenizer can score.
    """
    if corrupted not in ("swapped", "other_names"):
        raise PlanError(f"no corruption {corrupted!r}. {nearest(corrupted, ('swapped', 'other_names'))}")
    if len(set(names)) < 5:
        raise PlanError(f"indirect objects take five different names or more, not {len(set(names))}")
    pool = sorted(set(names))

    def draw(rng: random.Random, kept: int) -> _Draft:
        io, s, *others = rng.sample(pool, 5)
        first, second = ("io", "s1") if kept % 2 == 0 else ("s1", "io")
        sentence = rng.choice(GIVING).replace("{}", f"{{{first}}}", 1).replace("{}", f"{{{second}}}", 1)
        setting = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
        clean, places = _filled(sentence, {"io": io, "s1": s, "s2": s, **setting})
        wrong_names = (io, s, io) if corrupted == "swapped" else others
        twin, _ = _filled(sentence, {**dict(zip(("io", "s1", "s2"), wrong_names, strict=True)), **setting})
        shown = {name: places[name] for name in ("io", "s1", "s2")}
        return _Draft(clean, twin, f" {io}", f" {s}", "ABBA" if first == "io" else "BABA", shown)

    return _drawn("indirect objects", model, count, seed, draw)


def greater_than(model: Any, count: int = 32, *, seed: int = 0) -> Pairs:
    """Which years can follow? A period begins in the year XXYY and ends in the same century; in the corrupted prompt it
    begins in XX01. The answer is a year after YY, its rival one as long before it; the place is `year` (YY). `score` is
    the paper's: the probability of all years after YY minus that of YY and those before.

    Args:
        model: a model or a tokenizer; two digits must be a token, as in GPT-2's.

    Raises:
        PlanError: two digits are no token, or there are fewer pairs than `count` that the tokenizer can score.
    """
    from .score import Score

    encode = _encoder(model)
    later = _Later(_years(encode))
    # as in the paper, no years such as 1700 that are a token by themselves
    split = [n for n in range(1100, 1800) if _next(encode, f"the year {n // 100}", f"{n % 100:02}") is not None]
    begins = [n for n in split if 2 <= n % 100 <= 98 and n - n % 100 + 1 in split]
    if not begins:
        raise PlanError(
            "greater than: this tokenizer parts no year from 1100 to 1799 after two digits, as GPT-2's does"
        )

    def draw(rng: random.Random, kept: int) -> _Draft:
        century, year = divmod(rng.choice(begins), 100)
        apart = rng.randint(1, min(year, 99 - year))
        setting = {"event": rng.choice(EVENTS), "century": str(century)}
        clean, places = _filled(PERIOD, {**setting, "year": f"{year:02}"})
        twin, _ = _filled(PERIOD, {**setting, "year": "01"})
        ends = f"{year + apart:02}", f"{year - apart:02}"
        return _Draft(clean, twin, *ends, f"{year:02}", {"year": places["year"]})

    pairs = _drawn("greater than", model, count, seed, draw)
    limits: list[int | str] = [later.years[int(year)] for year in pairs.kind]
    return replace(pairs, score=Score("later_years", later, targets=(limits,)))


def facts(model: Any, count: int = 16, *, relation: Fact = "capital", seed: int = 0) -> Pairs:
    """What a model knows: an attribute of a subject, beside another subject of which it is another. The place is
    `subject`.

    Args:
        model: a model or a tokenizer.
        relation: "capital", "language" or "continent" of a country, or the city of a "landmark".

    Raises:
        PlanError: no such relation, or fewer pairs than `count` that the tokenizer can score.
    """
    if relation not in FACTS:
        raise PlanError(f"no relation {relation!r} of facts. {nearest(relation, FACTS)}")
    table = LANDMARKS if relation == "landmark" else relations()[relation]
    subjects = sorted(table)

    def draw(rng: random.Random, kept: int) -> _Draft:
        sentence, (subject, twin) = rng.choice(FACTS[relation]), rng.sample(subjects, 2)
        clean, places = _filled(sentence, {"subject": subject})
        corrupted, _ = _filled(sentence, {"subject": twin})
        return _Draft(clean, corrupted, f" {table[subject]}", f" {table[twin]}", sentence, places)

    return _drawn(f"facts of {relation}", model, count, seed, draw)


def in_context(
    model: Any,
    count: int = 16,
    *,
    relation: str = "antonym",
    against: str = "comparative",
    shots: int = 4,
    seed: int = 0,
) -> Pairs:
    """Which relation do the examples show? The same words are asked about in both prompts; the answers of the examples
    follow one relation or another. Places are `query` and `shot_0`, `shot_1`, … (the examples' answers).

    Args:
        model: a model or a tokenizer.
        relation, against: names of `interp_core.toys.text.relations()`.
        shots: examples before the question.

    Raises:
        PlanError: no such relation, relations without enough words in common, or fewer pairs than `count` that the
            tokenizer can score.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise PlanError(wrong("in_context: shots", "a number of examples, 1 or more", shots))
    tables = relations()
    for name in (relation, against):
        if name not in tables:
            raise PlanError(f"no relation {name!r} of words. {nearest(name, tables)}")
    table, rival = tables[relation], tables[against]
    encode = _encoder(model)
    apart = sorted(word for word in table.keys() & rival.keys() if table[word] != rival[word])
    ends = {word: [_next(encode, "A:", f" {each[word]}") for each in (table, rival)] for word in apart}
    common = [word for word in apart if None not in ends[word]]
    if len(common) <= shots:
        raise PlanError(
            f"{relation} and {against} tell {len(apart)} words apart, {len(common)} of them with answers of one token "
            f"for this tokenizer; {shots} shots and a question take {shots + 1}"
        )
    lines = [f"Q: {{word_{i}}}\nA: {{shot_{i}}}\n\n" for i in range(shots)]
    text = "".join([*lines, "Q: {query}\nA:"])

    def draw(rng: random.Random, kept: int) -> _Draft:
        query, *shown = rng.sample(common, shots + 1)
        asked_about = {"query": query, **{f"word_{i}": word for i, word in enumerate(shown)}}
        clean, places = _filled(text, {**asked_about, **{f"shot_{i}": table[word] for i, word in enumerate(shown)}})
        twin, _ = _filled(text, {**asked_about, **{f"shot_{i}": rival[word] for i, word in enumerate(shown)}})
        places = {name: place for name, place in places.items() if not name.startswith("word")}
        return _Draft(clean, twin, f" {table[query]}", f" {rival[query]}", f"{relation}, not {against}", places)

    left_out = {SPLIT_WORD: len(apart) - len(common)}
    return _drawn(f"{relation} in context", model, count, seed, draw, left_out)


def induction(model: Any, count: int = 16, *, period: int = 8, seed: int = 0) -> Pairs:
    """What came next the first time? Random words, and then the first of them again; in the corrupted prompt the word
    that is to be copied is another. Its place is `source`.

    Args:
        model: a model or a tokenizer.
        period: different words, of which all but the last one or more come twice.

    Raises:
        PlanError: a period below 3, fewer words of one token than it takes, or fewer pairs than `count`.
    """
    encode = _encoder(model)
    known = [word for word in words() if word.isascii()]
    pool = [word for word in known if _next(encode, "Q:", f" {word}") is not None]
    if isinstance(period, bool) or not isinstance(period, int) or not 3 <= period < len(pool):
        raise PlanError(
            f"induction takes a period of 3 or more and a word more than that, not {period!r}: {len(pool)} of its "
            f"{len(known)} words are one token for this tokenizer"
        )

    def draw(rng: random.Random, kept: int) -> _Draft:
        *sequence, twin = rng.sample(pool, period + 1)
        copied = rng.randrange(2, period)
        labels = [f"word_{i}" if i != copied else "source" for i in range(period)]
        text = "".join(f" {{{label}}}" for label in [*labels, *labels[:copied]])
        clean, places = _filled(text, dict(zip(labels, sequence, strict=True)))
        other, _ = _filled(text, {**dict(zip(labels, sequence, strict=True)), "source": twin})
        source = {"source": places["source"]}
        return _Draft(clean, other, f" {sequence[copied]}", f" {twin}", f"period {period}", source)

    return _drawn("induction", model, count, seed, draw, {SPLIT_WORD: len(known) - len(pool)})


@dataclass(frozen=True)
class _Later:
    """Probability of all years after one, minus that of the others, given the ids of 00 to 99.

    Source: Hanna et al. (2023), arXiv:2305.00586.
    """

    years: tuple[int, ...]

    def __call__(self, logits: Tensor, year: Tensor) -> Tensor:
        import torch

        ids = torch.tensor(self.years, device=logits.device)
        begins = (ids == year.to(ids)[..., None]).int().argmax(-1, keepdim=True)
        later = torch.arange(len(ids), device=logits.device) > begins
        likely = logits.softmax(-1)[..., ids]
        return torch.where(later, likely, -likely).sum(-1)


def _years(encode: Encode) -> tuple[int, ...]:
    """Ids of 00 to 99 after the beginning of a year.

    Raises:
        PlanError: they are not one token each.
    """
    before, _ = _filled(PERIOD, {"event": "war", "century": "17", "year": "32"})
    ids = []
    for year in range(100):
        alone = encode(f"{year:02}")
        # 1700 may be a token of its own, and yet 00 what a model says after 17
        token = _next(encode, before, f"{year:02}")
        ids.append(alone[0] if token is None and len(alone) == 1 else token)
    split = [f"{year:02}" for year, token in enumerate(ids) if token is None]
    if split:
        raise PlanError(
            f"greater than: years are scored by their last two digits, and {split[0]!r} is not one token after "
            f"{before[-12:]!r} for this tokenizer; take one in which two digits are a token, as GPT-2's"
        )
    return tuple(token for token in ids if token is not None)


# Drawing


def _drawn(
    task: str, model: Any, count: int, seed: int, draw: Callable[[random.Random, int], _Draft],
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> Pairs:  # fmt: skip
    """Different pairs that the tokenizer can score, in the order in which they are drawn.

    Args:
        draw: a pair from random numbers and how many there are already.
        left_out: what was dropped before, by reason.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PlanError(wrong(f"{task}: count", "a number of pairs, 1 or more", count))
    encode, rng = _encoder(model), random.Random(f"{task}, seed {seed}")
    kept: list[_Draft] = []
    dropped = {why: number for why, number in left_out.items() if number}
    seen: set[str] = set()
    example, fruitless = "", 0
    while len(kept) < count and fruitless < FRUITLESS:
        draft, fruitless = draw(rng, len(kept)), fruitless + 1
        if draft.clean in seen or draft.answer == draft.other:
            continue
        scored, fault = _spelled(encode, draft)
        if fault:
            dropped[fault] = dropped.get(fault, 0) + 1
            example = example or f"{draft.clean!r} with {draft.answer!r} and {draft.other!r}"
            continue
        seen.add(draft.clean)
        kept.append(scored)
        fruitless = 0
    if len(kept) < count:
        reasons = ", ".join(f"{number} with {why}" for why, number in dropped.items())
        lost = f"; dropped are {reasons}{example and ', such as '}{example}" if dropped else ""
        fix = f"ask for {len(kept)} or fewer" if kept else "take another task or tokenizer"
        raise PlanError(f"{task}: this tokenizer can score {len(kept)} different pairs, not {count}{lost}; {fix}")
    rows = zip(*(draft[:-1] for draft in kept), strict=True)
    clean, corrupted, answer, other, kind = map(list, rows)
    places = {name: [draft.places[name] for draft in kept] for name in kept[0].places}
    return Pairs(clean, corrupted, answer, other, kind, places, dropped)


def _spelled(encode: Encode, draft: _Draft) -> tuple[_Draft, str]:
    """The pair with answers as a score takes them, or why this tokenizer cannot score it."""
    clean, corrupted = encode(draft.clean), encode(draft.corrupted)
    if len(clean) != len(corrupted):
        return draft, "a corrupted prompt of another length"
    spelled = []
    for answer in (draft.answer, draft.other):
        token = _next(encode, draft.clean, answer)
        if token is None or token != _next(encode, draft.corrupted, answer):
            return draft, "an answer of several tokens"
        # SentencePiece puts a space before a text by itself: the word alone is that token, and with a space two.
        same = [word for word in (answer, answer.lstrip()) if encode(word) == [token]]
        if not same:
            return draft, "an answer that is another token by itself"
        spelled.append(same[0])
    return draft._replace(answer=spelled[0], other=spelled[1]), ""


def _next(encode: Encode, before: str, text: str) -> int | None:
    """The token that a text is after another one; None if it is several, or changes those before it."""
    ids, whole = encode(before), encode(before + text)
    return whole[-1] if whole[:-1] == ids else None


def _encoder(model: Any) -> Encode:
    """Ids of a text, without special tokens.

    Raises:
        TextError: neither a tokenizer nor a model that has one.
    """
    tokenizer = getattr(model, "tokenizer", None) if hasattr(model, "hf") else model
    if tokenizer is None:
        raise TextError("this model was loaded without a tokenizer, which says what prompts it can score; "
                        "load(..., tokenizer=…)")  # fmt: skip
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TextError(wrong("prompts", "a model of ic.load or a tokenizer of ic.open_tokenizer", model))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def _filled(sentence: str, fillers: Mapping[str, str]) -> tuple[str, dict[str, Chars]]:
    """A sentence with words in its fields, and where each word stands; of one that comes twice, the first time."""
    text, places = "", dict[str, "Chars"]()
    for before, name, _, _ in string.Formatter().parse(sentence):
        text += before
        if name is not None:
            places.setdefault(name, (len(text), len(text) + len(fillers[name])))
            text += fillers[name]
    return text, places
