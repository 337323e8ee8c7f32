"""Scorers of answers: extraction, and each rule with its edge cases as published."""

from __future__ import annotations

import pytest
from interp_plugins.answers import SCORERS, extract, scorer
from interp_plugins.answers.contractions import CONTRACTIONS
from interp_plugins.answers.docvqa import levenshtein
from interp_plugins.answers.pope import official
from interp_plugins.answers.vqav2 import agreement, punctuation, words

import interp_core as ic

EXTRACTED = {
    "42": ("42", "first line"),
    "  \n\n 42 \nbecause": ("42", "first line"),
    "**42**": ("42", "first line"),
    "<think>is it 41?</think>\n42": ("42", "first line"),
    "is it 41?\n</think>\n\n42": ("42", "first line"),  # the chat template opened the block
    "<thinking>41</thinking><think>43</think>42": ("42", "first line"),
    "I see two.\nFinal answer: 42\nDone.": ("42", "final answer"),
    "Final answer: 41\nNo. final  Answer : 42": ("42", "final answer"),
    "**Final Answer:** 42": ("42", "final answer"),
    "**Final answer: 42**": ("42", "final answer"),
    "Final answer:\n\n42": ("42", "final answer"),
    "so \\boxed{42}.": ("42", "box"),
    "\\boxed{41} and \\boxed{\\frac{1}{2}}": ("\\frac{1}{2}", "box"),
    "Final answer: $\\boxed{\\text{12\\%}}$": ("12%", "box"),
    "\\boxed{41}\nFinal answer: 42": ("42", "final answer"),
    "<think>\\boxed{41}</think>42": ("42", "first line"),
}
UNPARSABLE = {
    "": "the text is empty",
    " \n\t": "the text is empty",
    "<think>is it 41? Final answer: 41": "the thinking never ends",
    "<think>a</think>": "the text is empty",
    "<think>a</think>42<think>or": "the thinking never ends",
    "Final answer:": "the final answer is empty",
    "the answer is \\boxed{4": "the box is never closed",
    "\\boxed{ }": "the box is empty",
}


@pytest.mark.parametrize("text", EXTRACTED)
def test_extraction(text: str) -> None:
    answer = extract(text)
    assert (answer.answer, answer.found) == EXTRACTED[text] and not answer.problem and not answer.cut


@pytest.mark.parametrize("text", UNPARSABLE)
def test_what_has_no_answer_scores_nothing_and_is_counted(text: str) -> None:
    assert extract(text).problem == UNPARSABLE[text]
    for name in SCORERS:
        options = {"convention": "strict"} if name == "pope" else {} if name != "contains" else {"extraction": True}
        gold = {"choice": "A", "count": "0", "colour": "red", "yes_no": "no", "pope": "no"}.get(name, "")
        scores = scorer(name, **options).all([text], [gold])
        assert scores.mean == 0 and scores.unparsable == 1 and scores.problems == {UNPARSABLE[text]: 1}, name


def test_words_beyond_the_most_are_left_off_and_said() -> None:
    assert extract("New York City", 2).answer == "New York" and extract("New York City", 2).cut
    assert not extract("New York", 2).cut
    scores = scorer("docvqa", max_words=2).all(["New York City", "Rome"], ["New York", "Rome"])
    assert scores.mean == 1 and scores.record()["cut"] == 1
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ic.PlanError, match="max_words takes a whole number"):
            scorer("docvqa", max_words=wrong)


# ChartQA

OFFICIAL = [
    # prediction, gold, score of the texts as they are
    ("5", "5", 1), ("5.25", "5", 1), ("5.26", "5", 0), ("4.75", "5", 1), ("-5", "5", 0), ("105", "100", 1),
    ("0", "0", 1), ("0.0", "0", 0), ("0", "0.0", 0), ("0.001", "0", 0), ("12%", "0.12", 1), ("12%", "12", 0),
    ("0%", "0%", 1), ("0%", "0", 0), ("12%", "12.5%", 1), ("12 %", "12%", 1), ("%", "%", 1),
    ("5 ", "5", 1), ("red ", "red", 0), ("Red", "red", 1), ("red", "red.", 0),
    ("nan", "nan", 0), ("inf", "inf", 0), ("5", "inf", 0), ("nan", "5", 0), ("1_000", "1000", 1), ("1e3", "1000", 1),
    ("1,000", "1000", 0), ("1,000", "1,000", 1), ("$5", "5", 0), ("1950", "2000", 1), ("", "", 1),
]  # fmt: skip
LENIENT = [
    ("1,000", "1000", 1), ("1,234,567", "1234567", 1), ("1 234 567", "1234567", 1), ("12,34", "1234", 0),
    ("1,0000", "10000", 0), ("$5", "5", 1), ("US$ 5", "5", 1), ("5 €", "5", 1), ("5k", "5000", 1), ("5 K", "5,000", 1),
    ("5m", "5000000", 1), ("5 mn", "5 million", 1), ("5bn", "5,000 million", 1), ("1.2 trillion", "1.2t", 1),
    ("$1.5 billion", "1500000000", 1), ("5 million", "5", 0), ("5", "5 million", 0),
    ("12 percent", "12%", 1), ("12 per cent", "12 pct", 1), ("12%", "12", 1), ("12%", "0.12", 1), ("0.12", "12%", 1),
    ("12", "12%", 1), ("1%", "100%", 0), ("0.12%", "12%", 0), ("(5)", "-5", 1), ("($1,200)", "-1200", 1),
    ("(5%)", "-5%", 1), ("−5", "-5", 1), ("- 5", "-5", 1), ("5", "-5", 0), ("0.0", "0", 1), ("1e-10", "0", 1),
    ("1e-8", "0", 0), ("0%", "0", 1), ("nan", "nan", 1), ("inf", "inf", 1), ("nan", "5", 0),
    ("Red ", "red", 1), ("light  blue.", "Light blue", 1), ("light blue", "blue", 0),
    ("1999", "2000", 0), ("2000", "2000", 1), ("2000.0", "2000", 1), ("2,000", "2000", 1), ("2k", "2000", 1),
    ("1950", "1950.5", 1), ("1,950", "2,000", 1), ("2150", "2200", 1), ("about 5", "5", 0), ("k", "k", 1), ("", "", 1),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "gold", "score"), OFFICIAL)
def test_chartqa_official(prediction: str, gold: str, score: int) -> None:
    assert scorer("chartqa", extraction=False)(prediction, gold).value == score


@pytest.mark.parametrize(("prediction", "gold", "score"), LENIENT)
def test_chartqa_lenient(prediction: str, gold: str, score: int) -> None:
    assert scorer("chartqa", convention="lenient", extraction=False)(prediction, gold).value == score


def test_chartqa_years_are_exact_where_asked() -> None:
    exact = scorer("chartqa", exact_years=True)
    assert exact("1999", "2000").value == 0 and exact("1999", "2000.5").value == 1 and exact("2000", "2000").value == 1
    loose = scorer("chartqa", convention="lenient", exact_years=False)
    assert loose("1999", "2000").value == 1
    for gold in ("0999", "2101", "999", "2000 ", "2000%"):
        assert exact(gold.strip(), gold).value == (gold != "0999" or 1)
    assert [exact(str(int(gold) + 1), gold).value for gold in ("999", "1000", "2100", "2101")] == [1, 0, 0, 1]


def test_lenient_never_scores_less_than_official() -> None:
    """But for years."""
    lenient = scorer("chartqa", convention="lenient", exact_years=False, extraction=False)
    plain = scorer("chartqa", extraction=False)
    texts = sorted({text for p, g, _ in (*OFFICIAL, *LENIENT) for text in (p, g)})
    pairs = [(p, g) for p in texts for g in texts if plain(p, g).value]
    assert len(pairs) > 120
    less = [pair for pair in pairs if not lenient(*pair).value]
    assert not less


def test_chartqa_takes_the_best_gold_and_extracts() -> None:
    score = scorer("chartqa")("<think>11?</think>Final answer: 12 ", ["7", "12"])
    assert score.value == 1 and score.gold == "12" and score.answer == "12" and float(score) == 1


# DocVQA

ANLS = [
    # prediction, gold, paper, boundary kept, lmms
    ("cat", "cat", 1, 1, 1), ("Cat", "cAT", 1, 1, 1), ("", "", 1, 1, 1), ("a", "", 0, 0, 0), ("", "a", 0, 0, 0),
    ("ab", "ac", 0, 0.5, 0.5), ("abc", "abd", 2 / 3, 2 / 3, 2 / 3), ("abc", "xyd", 0, 0, 0),
    (" new   york ", "New York", 1, 1, 1), ("cat      ", "bat", 2 / 3, 2 / 3, 8 / 9), ("kitten", "sitting", 4 / 7, 4 / 7, 4 / 7),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "gold", "paper", "kept", "lmms"), ANLS)
def test_docvqa_conventions(prediction: str, gold: str, paper: float, kept: float, lmms: float) -> None:
    for convention, score in (("paper", paper), ("boundary_kept", kept), ("reference_lmms", lmms)):
        value = scorer("docvqa", convention=convention, extraction=False)(prediction, gold).value
        assert value == pytest.approx(score, abs=1e-12), convention


def test_docvqa_takes_the_nearest_gold() -> None:
    score = scorer("docvqa")("kitten", ["dog", "sitting", "kittens"])
    assert score.value == pytest.approx(6 / 7) and score.gold == "kittens"
    assert [levenshtein(a, b) for a, b in (("", "abc"), ("abc", ""), ("flaw", "lawn"), ("ab", "ba"))] == [3, 3, 2, 2]


# VQAv2

PUNCTUATION = {
    "1,000": "1000", "red/blue": "red blue", "red / blue": "red  blue", "3.5": "3.5", ".5": ".5", "1.000.000": "1.000.000",
    "U.S.": "US", "5.": "5", "t-shirt": "t shirt", "t-shirt, 1,000": "tshirt 1000", "yes!": "yes ", "it's 5:30": "it's 5:30",
    "." * 40: "." * 8, "3 .5": "3 .5", "a.b": "ab",
}  # fmt: skip


@pytest.mark.parametrize("text", PUNCTUATION)
def test_vqav2_punctuation(text: str) -> None:
    assert punctuation(text) == PUNCTUATION[text]


def test_vqav2_words() -> None:
    assert words("The  Two dogs and an apple") == "2 dogs and apple" and words("none") == "0" and words("Ten a") == "10"
    assert words("dont youre couldnt've somebodyd lets shes Im") == "don't you're couldn't've somebodyd lets shes im"
    assert len(CONTRACTIONS) == 120 and CONTRACTIONS["somebody'd"] == "somebodyd" and "couldntve" not in CONTRACTIONS
    assert [form for form, word in CONTRACTIONS.items() if word == "'ow's'at"] == ["ow's'at", "'ows'at", "'ow'sat"]


def test_vqav2_leaves_one_out_by_its_place() -> None:
    ten = [agreement([True] * n + [False] * (10 - n)) for n in range(11)]
    assert ten == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)
    assert scorer("vqav2")("red", ["red"] * 10).value == 1  # equal records do not drop out together
    for count in range(2, 12):
        for n in range(count + 1):
            same = [True] * n + [False] * (count - n)
            sets = [min(1, (sum(same) - same[i]) / 3) for i in range(count)]
            assert agreement(same) == pytest.approx(sum(sets) / count)
    assert agreement([True]) == 1 and agreement([False]) == 0


CONVENTIONS = [
    # prediction, golds, 2021, 2017, always
    ("Yes", ["yes"] * 10, 0, 1, 1),  # identical: 2021 compares as they are
    ("yes", ["Yes"] * 10, 0, 0, 1),
    ("the dog", ["dog"] * 10, 0, 1, 1),
    ("two", ["2"] * 6 + ["3"] * 4, 1, 1, 1),
    ("2", ["two"] * 6 + ["3"] * 4, 1, 0, 1),  # 2017 cleans no words of golds
    ("t-shirt", ["t-shirt"] * 10, 1, 0, 1),  # 2017 cleans the prediction alone
    ("t-shirt", ["t-shirt"] * 4 + ["shirt"] * 6, 1, 1, 1),
    ("red\n", ["red\t"] * 9 + ["red"], 1, 0.3, 1),  # 2017 takes golds as they came, and so they differ
    ("a red", ["red"] * 3 + ["blue"] * 7, 0.9, 0.9, 0.9),
    ("red", ["blue"] * 10, 0, 0, 0),
]


@pytest.mark.parametrize(("prediction", "golds", "late", "early", "always"), CONVENTIONS)
def test_vqav2_conventions(prediction: str, golds: list[str], late: float, early: float, always: float) -> None:
    for convention, score in (("official_2021", late), ("official_2017", early), ("always", always)):
        value = scorer("vqav2", convention=convention, extraction=False)(prediction, golds).value
        assert value == pytest.approx(score), convention


# POPE

POPE = ["Yes.", "NO", "no dogs", ""]


def test_pope_official_reads_as_the_published_script() -> None:
    scores = scorer("pope").all(POPE, ["yes", "yes", "no", "no"])
    assert [score.read for score in scores.scores] == ["yes", "yes", "no", "yes"] and scores.unparsable == 0
    metrics = scores.metrics
    assert metrics["accuracy"] == 0.75 and metrics["precision"] == pytest.approx(2 / 3) and metrics["recall"] == 1
    assert metrics["f1"] == pytest.approx(0.8) and metrics["yes_rate"] == 0.75
    assert {text: official(text) for text in ("don't", "It is not.", "Yes. no", "no,", "no!", "a\nno")} == {
        "don't": "yes", "It is not.": "no", "Yes. no": "yes", "no,": "no", "no!": "yes", "a\nno": "yes",
    }  # fmt: skip


def test_pope_strict_counts_what_it_cannot_read_and_never_as_yes() -> None:
    scores = scorer("pope", convention="strict").all([*POPE, "yes or no"], ["yes", "yes", "no", "no", "yes"])
    assert [score.read for score in scores.scores] == ["yes", "no", "no", "", ""] and scores.unparsable == 2
    assert scores.metrics == {
        "accuracy": 0.4, "precision": 1, "recall": pytest.approx(1 / 3), "f1": 0.5, "yes_rate": 0.2,
    }  # fmt: skip
    record = scores.record()
    assert (
        record["unparsable"] == 2
        and record["f1"] == 0.5
        and record["scorer"] == "pope(extraction=True, convention='strict')"
    )
    silent = scorer("pope", convention="strict").all(["", ""], ["no", "no"]).metrics
    assert silent == {"accuracy": 0, "precision": None, "recall": None, "f1": None, "yes_rate": 0}


def test_pope_intervals_draw_images() -> None:
    predictions, labels = ["yes", "no", "yes", "yes"] * 6, ["yes", "no", "no", "yes"] * 6
    scores = scorer("pope").all(predictions, labels)
    images = [i // 6 for i in range(24)]
    intervals = scores.intervals(images, resamples=200)
    for name, interval in intervals.items():
        assert interval is not None and interval.units == 4 and interval.value == pytest.approx(scores.metrics[name])
    assert scorer("pope", convention="strict").all(["", "no"], ["no", "no"]).intervals([0, 1])["precision"] is None
    with pytest.raises(ic.TextError, match="the label yes or no"):
        scorer("pope")("yes", "maybe")


# Words

READ = {
    "yes_no": {
        "Yes": "yes", "no.": "no", "No, it is yes": "no", "I think yes.": "yes", "There is no dog": "no", "maybe": "",
        "it is yes or no": "", "nothing": "", "yesterday": "", "YES!": "yes",
    },
    "count": {
        "3": "3", "There are three.": "3", "Twenty one": "21", "twenty-one": "21", "1,234": "1234", "none": "0", "No dogs": "0",
        "3.0": "3", "3.5": "", "2 cats, 3 dogs": "", "3 (three)": "3", "many": "", "a hundred": "100", "someone": "", "21st": "",
        "-2": "-2",
    },
    "colour": {
        "Grey": "gray", "It is gray.": "gray", "red and white": "red and white", "White/red": "red and white",
        "dark-blue": "dark blue", "darker blue": "dark blue", "navy blue": "navy", "violet": "purple", "reddish": "", "bored": "", "a car": "",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, table in READ.items() for text in table])
def test_words_are_read(name: str, text: str) -> None:
    gold = {"yes_no": "yes", "count": "5", "colour": "teal"}[name]
    score = scorer(name)(text, READ[name][text] or gold)
    assert score.read == READ[name][text] and score.value == bool(READ[name][text]) and score.parsed == bool(score.read)
    assert scorer(name)(text, gold).value == (score.read == gold)


def test_shades_can_be_left_aside() -> None:
    assert scorer("colour")("dark blue", "blue").value == 0
    assert scorer("colour", shades=False)("dark blue", "blue").value == 1


CHOICES = ["dog", "cat", "black cat", "none of these"]
LETTERS = {
    "B": "B", "b": "B", "(B)": "B", "B.": "B", "B. cat": "B", "b) cat": "B", "The answer is B.": "B", "Answer: B": "B",
    "cat": "B", "A cat": "B", "It is a cat": "B", "the black cat": "C", "a dog and a cat": "", "(A) or (B)": "", "E": "",
    "horse": "", "None of these!": "D", "A": "A", "the answer is a dog": "A",
}  # fmt: skip


@pytest.mark.parametrize("text", LETTERS)
def test_choices_by_letter_or_text(text: str) -> None:
    choice = scorer("choice")
    score = choice(text, LETTERS[text] or "A", choices=CHOICES)
    assert score.read == LETTERS[text] and score.value == bool(LETTERS[text]) and score.parsed == bool(LETTERS[text])
    if LETTERS[text]:
        assert choice(text, CHOICES["ABCD".index(LETTERS[text])], choices=CHOICES).value == 1


def test_choices_of_many_questions() -> None:
    scores = scorer("choice").all(["B", "left", "x"], ["B", "A", "B"], [CHOICES, ["left", "right"], CHOICES])
    assert scores.values == [1, 1, 0] and scores.unparsable == 1
    assert scorer("choice").all(["B"], ["B"]).mean == 1
    with pytest.raises(ic.TextError, match="prediction 0.*gold answer 'horse' cannot be read"):
        scorer("choice").all(["B"], ["horse"], [CHOICES])
    with pytest.raises(ic.PlanError, match="1 predictions and 2 choices"):
        scorer("choice").all(["B"], ["B"], [CHOICES, CHOICES])


def test_contains_is_of_whole_words_and_flagged() -> None:
    contains = scorer("contains")
    assert (
        contains("21", "1").value == 0
        and contains("it is 1.", "1").value == 1
        and contains("A Red car", "red").value == 1
    )
    assert contains("c++", "c++").value == 1 and contains("anything", "").value == 0
    scores = contains.all(["21"], ["1"])
    assert scores.legacy and scores.record()["legacy"] and "LEGACY" in str(scores)
    assert not scorer("chartqa").all(["1"], ["1"]).legacy


# All of them


def test_scores_of_parts_and_their_interval() -> None:
    scores = scorer("chartqa").all(["1", "2", "x", ""], ["1", "2", "3", "4"])
    assert (
        scores.mean == 0.5
        and len(scores) == 4
        and str(scores) == "chartqa(convention='official'): 0.5000 (n = 4, 1 unparsable)"
    )
    parts = scores.by(["human", "augmented", "human", "human"])
    assert list(parts) == ["human", "augmented"] and parts["human"].mean == pytest.approx(1 / 3)
    interval = scores.interval(images=[0, 0, 1, 1], resamples=100)
    assert interval.value == 0.5 and interval.units == 2
    with pytest.raises(ic.PlanError, match="3 labels for 4 scores"):
        scores.by([1, 2, 3])


def test_what_is_refused() -> None:
    with pytest.raises(ic.PlanError, match="no scorer 'chartq'. Did you mean 'chartqa'"):
        scorer("chartq")
    with pytest.raises(ic.PlanError, match="no option 'covention'. Did you mean 'convention'"):
        scorer("docvqa", covention="paper")
    with pytest.raises(ic.PlanError, match="no convention 'official'. There are: 'paper'"):
        scorer("docvqa", convention="official")
    with pytest.raises(ic.PlanError, match="shades takes True or False"):
        scorer("colour", shades="no")
    for golds in ([], [3], None):
        with pytest.raises(ic.TextError, match="golds takes a text, or several"):
            scorer("chartqa")("3", golds)
    with pytest.raises(ic.PlanError, match="takes a text, not int 3"):
        scorer("chartqa")(3, "3")
    with pytest.raises(ic.PlanError, match="2 predictions and 1 golds"):
        scorer("chartqa").all(["3", "4"], ["3"])
    with pytest.raises(ic.PlanError, match="no prediction"):
        scorer("chartqa").all([], [])
    with pytest.raises(ic.TextError, match="prediction 1: .*golds takes a text"):
        scorer("chartqa").all(["3", "4"], ["3", []])
    with pytest.raises(ic.TextError, match="gold answer 'several' cannot be read: it has no number"):
        scorer("count")("3", "several")
