"""The demo: where does a model decide between two answers, and can that be moved?

    clean      a prompt that leads to the answer
    corrupted  a twin of as many tokens that leads to another
    lens       what each layer would say at the end of the clean prompt
    patching   effect[layer, head] = (d_patched - d_corrupted) / (d_clean - d_corrupted)
               d = logit(answer) - logit(other); patched: corrupted, with this head's z at the last token from clean
    ablation   the heads that the map names are set to their mean over other tasks: the answer should go, while as many
               other heads do nothing
    steering   the mean difference of the residual stream between clean and corrupted prompts, added at the last token

On the toy, clean prompts show antonyms and corrupted ones French translations of the same words; on another model,
one pair of texts. Cost: one forward pass per head.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

STORY = "Once upon a time, there was a little {}. The little {} was very happy. One day, the little"


@dataclass(frozen=True)
class Task:
    """Clean and corrupted prompts with the two answers (ids `[batch]`), and prompts for the mean ablation."""

    clean: ic.Tokens
    corrupted: ic.Tokens
    answer: Tensor
    other: Tensor
    neutral: ic.Tokens
    story: str


def toy_task(model: ic.Model, n: int = 32, shots: int = 5) -> Task:
    """Antonym against French: same words, same seed, other relation."""
    from interp_core.toys.text import relation_example, relations

    tables = relations()
    pick = random.Random(0)
    words = [w for w in tables["antonym"] if tables["antonym"][w] != tables["french"][w]]
    seeds = {word: pick.randrange(1 << 30) for word in pick.sample(words, n)}

    def prompts(relation: str) -> list[str]:
        return [relation_example(random.Random(s), relation, shots, word).prompt for word, s in seeds.items()]

    def ids(relation: str) -> Tensor:
        return torch.cat([model.tokens(f" {tables[relation][word]}").ids[0] for word in seeds])

    neutral = [relation_example(pick, relation, shots).prompt for relation in tables for _ in range(10)]
    story = (
        f"{n} pairs of prompts. The clean one shows five antonyms, the corrupted one five French translations; both "
        "end with the same word: its antonym is the answer, its translation the rival."
    )
    return Task(
        model.tokens(prompts("antonym")), model.tokens(prompts("french")), ids("antonym"), ids("french"),
        model.tokens(neutral), story,
    )  # fmt: skip


def text_task(model: ic.Model, clean: str, corrupted: str, answer: str, other: str) -> Task:
    """One pair of texts, for any model."""
    pair = model.tokens(clean), model.tokens(corrupted)
    if pair[0].lengths != pair[1].lengths:
        raise ic.TextError(
            f"clean has {pair[0].lengths[0]} tokens, corrupted {pair[1].lengths[0]}: patching needs as many. "
            "Change a word, or give --clean, --corrupted, --answer and --other"
        )
    ids = [model.tokens(text, target=more).ids[0] for text, more in ((clean, answer), (clean, other))]
    start = pair[0].lengths[0]
    first = next((i for i in range(start, min(map(len, ids))) if ids[0][i] != ids[1][i]), None)
    if first != start:
        raise ic.TextError(f"the answers {answer!r} and {other!r} begin with the same token; choose two that do not")
    return Task(
        *pair,
        ids[0][start : start + 1],
        ids[1][start : start + 1],
        ic.Tokens.stack(pair),
        f"One pair of prompts: the clean one leads to {answer!r}, the corrupted one to the rival {other!r}.",
    )


def patching_map(model: ic.Model, task: Task) -> tuple[Tensor, float, float]:
    """Effect of every head `[layer head]`, and the logit difference of clean and corrupted prompts."""
    difference = score.logit_diff(task.answer, task.other)
    clean = model.run(task.clean, read=S.z.at(-1), logits=-1)
    taken = [clean[S.z[layer].at(-1)][:, head] for layer, head in model.heads]
    variants = [S.z[layer, head].at(-1).set(z) for (layer, head), z in zip(model.heads, taken, strict=True)]
    sweep = model.sweep(task.corrupted, variants, difference)
    high, low = difference(clean).mean(), sweep.clean.mean()
    effect = torch.zeros(model.n_layers, max(head for _, head in model.heads) + 1)
    for (layer, head), value in zip(model.heads, sweep.values.mean(-1), strict=True):
        effect[layer, head] = (value - low) / (high - low)
    return effect, float(high), float(low)


def named_heads(effect: Tensor) -> list[tuple[int, int]]:
    """Heads with at least a third of the largest effect, strongest first."""
    order = effect.flatten().argsort(descending=True).tolist()
    return [divmod(i, effect.shape[1]) for i in order if float(effect.flatten()[i]) >= float(effect.max()) / 3]


def judged(run: ic.Run, task: Task) -> dict[str, float]:
    """How far a run gives the clean answer: in first place, ahead of the other answer, and by how much."""
    difference = score.logit_diff(task.answer, task.other)(run)
    first = run.logits.argmax(-1).cpu() == task.answer
    return {
        "answer is first": float(first.float().mean()),
        "answer beats rival": float((difference > 0).float().mean()),
        "logit difference": float(difference.mean()),
    }


def ablation(model: ic.Model, task: Task, heads: Sequence[tuple[int, int]], draws: int = 8) -> list[dict[str, Any]]:
    """Clean prompts without the named heads, and without as many others."""
    mean = model.run(task.neutral, read=S.z.at(-1))

    def without(chosen: Sequence[tuple[int, int]]) -> dict[str, float]:
        edits = [S.z[layer, h].at(-1).set(mean[S.z[layer].at(-1)][:, h].mean(0)) for layer, h in chosen]
        return judged(model.run(task.clean, edits=edits, logits=-1, allow_noop=True), task)

    rest = [head for head in model.heads if head not in heads]
    pick = random.Random(0)
    others = [without(pick.sample(rest, min(len(heads), len(rest)))) for _ in range(draws)]
    mean_of_others = {key: sum(row[key] for row in others) / draws for key in others[0]}
    return [
        {"ablated": "none", **without([])},
        {"ablated": ", ".join(f"z[{layer},{h}]" for layer, h in heads), **without(heads)},
        {"ablated": f"{len(heads)} others, mean of {draws} draws", **mean_of_others},
    ]


def steering(model: ic.Model, task: Task, layer: int, new: int) -> tuple[list[dict[str, Any]], ic.Generation]:
    """Continuations of corrupted prompts, as they are and with the clean direction added at every new token."""
    site = S.resid_post[layer].at(-1)
    away = model.run(task.clean, read=site)[site] - model.run(task.corrupted, read=site)[site]
    prompts = ic.Tokens.stack([task.corrupted.row(i) for i in range(min(4, len(task.corrupted)))])
    plain = model.generate(prompts, max_new_tokens=new)
    steered = model.generate(prompts, edits=site.add(away.mean(0)), max_new_tokens=new)
    rows = []
    for row, text in enumerate(prompts.texts or ()):
        ends = {"prompt ends": text[-20:], "plain": plain.texts[row], "steered": steered.texts[row]}
        rows.append({key: end.replace("\n", "⏎") for key, end in ends.items()})
    return rows, steered


def best_layer(model: ic.Model, task: Task) -> tuple[int, list[dict[str, Any]]]:
    """The layer where the mean clean-minus-corrupted direction moves corrupted prompts furthest."""
    clean = model.run(task.clean, read=S.resid_post.at(-1))
    corrupted = model.run(task.corrupted, read=S.resid_post.at(-1))
    rows = []
    for layer in range(model.n_layers):
        site = S.resid_post[layer].at(-1)
        edit = site.add((clean[site] - corrupted[site]).mean(0))
        rows.append({"layer": layer, **judged(model.run(task.corrupted, edits=edit, logits=-1), task)})
    best = max(rows, key=lambda row: row["logit difference"])
    return int(best["layer"]), rows


@dataclass(frozen=True)
class Findings:
    """Everything that the demo found.

    Attributes:
        lens: logit lens of the end of the first clean prompt.
        effect: patching map `[layer head]`.
        gap: logit difference on clean and on corrupted prompts.
        heads: those that the map names.
        ablated, layers, steered: rows of `ablation`, `best_layer`, `steering`.
        layer: the best one to steer at.
        generation: the steered one.
    """

    lens: Any
    effect: Tensor
    gap: tuple[float, float]
    heads: list[tuple[int, int]]
    ablated: list[dict[str, Any]]
    layer: int
    layers: list[dict[str, Any]]
    steered: list[dict[str, Any]]
    generation: ic.Generation

    @property
    def finding(self) -> str:
        """What came out, in a sentence."""
        names = " and ".join(f"z[{a},{b}]" for a, b in self.heads)
        which = f"head {names} carries" if len(self.heads) == 1 else f"heads {names} carry"
        best, (whole, without, others) = float(self.effect[self.heads[0]]), self.ablated
        first, gap = "answer is first", "logit difference"
        fall, chance = whole[gap] - without[gap], whole[gap] - others[gap]
        alone = f"patched alone into the corrupted prompt, z[{self.heads[0][0]},{self.heads[0][1]}] gives back "
        alone += f"{percent(best)} of the gap between the answers"
        if fall <= 2 * abs(chance):
            return (
                f"No head is shown to carry the answer: {alone}, but without {names} the logit difference falls by "
                f"{fall:.2f}, without as many random heads by {chance:.2f}."
            )
        return (
            f"{which[0].upper()}{which[1:]} the answer: {alone}, and without {names} the answer comes first in "
            f"{percent(without[first])} of the clean prompts, without as many random heads in {percent(others[first])}."
        )

    def sentences(self) -> list[str]:
        """What came out, in more words."""
        names = ", ".join(f"z[{a},{b}] {percent(float(self.effect[a, b]))}" for a, b in self.heads)
        whole, without, others = self.ablated
        moved = self.layers[self.layer]
        first, gap = "answer is first", "logit difference"
        before, after = percent(whole[first]), percent(without[first])
        leading = f"{after} of the prompts" + (f" instead of {before}" if before != after else ", as with them")
        return [
            f"The answer's logit minus that of its rival is {self.gap[0]:.2f} on clean prompts and {self.gap[1]:.2f} "
            "on corrupted ones.",
            f"Patched from the clean prompt into the corrupted one, each by itself and at the last token, these heads "
            f"give back so much of that gap: {names}.",
            f"Control: without these heads the difference goes from {whole[gap]:.2f} to {without[gap]:.2f}, and the "
            f"answer comes first in {leading}. "
            f"Removing as many random heads leaves {others[gap]:.2f} and {percent(others[first])}.",
            f"Steering: the mean difference of the two kinds of prompts, added after layer {self.layer}, puts the "
            f"answer ahead of its rival in {percent(moved['answer beats rival'])} of the corrupted prompts, and first "
            f"in {percent(moved[first])}.",
        ]


def study(model: ic.Model, task: Task, new: int, run: ic.runs.RunFolder) -> Findings:
    """Lens, patching, ablation and steering, one after the other; the map is kept where the run has it."""
    start = max(0, task.clean.lengths[0] - 11)
    lens = ic.method("logit_lens")(model, task.clean.row(0), at=slice(start, None))

    def patched() -> dict[str, Tensor]:
        effect, high, low = patching_map(model, task)
        return {"effect": effect, "gap": torch.tensor([high, low], dtype=torch.float64)}

    kept = run.stage("patching.safetensors", patched)
    effect, (high, low) = kept["effect"], kept["gap"].tolist()
    heads = named_heads(effect)
    layer, layers = best_layer(model, task)
    steered, generation = steering(model, task, layer, new)
    return Findings(lens, effect, (high, low), heads, ablation(model, task, heads), layer, layers, steered, generation)


class DemoConfig(ic.Config):
    """What the demo runs on.

    Attributes:
        model: toy:text, a folder, or a hub id.
        out: folder of the run (default: results/{model}/{dataset}/{timestamp}-demo-{hash}).
        clean: prompt that leads to the answer. The toy, if it is given no prompts, has a task of its own.
        corrupted: a prompt of as many tokens that leads to the other answer.
        answer, other: what should follow the one and the other; of prompts of yours, what the model itself says.
    """

    model: str = "toy:text"
    out: Path | None = None
    clean: str = STORY.format("cat", "cat")
    corrupted: str = STORY.format("dog", "dog")
    answer: str = " cat"
    other: str = " dog"


def answers(model: ic.Model, config: DemoConfig) -> tuple[str, str]:
    """What should follow the two prompts: as the settings say; of prompts of your own, the likeliest tokens."""
    chosen = []
    for prompt, answer in (("clean", "answer"), ("corrupted", "other")):
        if answer in config.model_fields_set or not config.model_fields_set & {"clean", "corrupted"}:
            chosen.append(getattr(config, answer))
        else:
            chosen.append(model.word(int(model.run(getattr(config, prompt), logits=-1).logits.argmax())))
    return chosen[0], chosen[1]


def demo(config: DemoConfig) -> Path:
    """Run the demo; returns the report's path."""
    began = time.perf_counter()
    loaded = ic.load(config.model)
    toy = config.model == "toy:text" and not config.model_fields_set & {"clean", "corrupted", "answer", "other"}
    dataset = "toy-relations" if toy else "texts"
    with ic.runs.open(
        config.out, config.model_dump(exclude={"out"}), recipe="demo", model=loaded, dataset=dataset
    ) as run:
        run.claim(["report.html", "lens.png", "patching.png"])
        task = toy_task(loaded) if toy else text_task(loaded, config.clean, config.corrupted, *answers(loaded, config))
        print(f"{loaded}\n{task.story}\n", flush=True)
        findings = study(loaded, task, 4 if toy else 24, run)
        findings.lens.show()
        print("", findings.finding, *findings.sentences(), "", sep="\n")
        for row in findings.steered:
            print(f"  …{row['prompt ends']}   plain: {row['plain']}   steered: {row['steered']}")
        print(f"  {findings.generation.receipts[0]}")
        write_report(run, loaded, task, findings)
    report = run.path / "report.html"
    print(f"\n{report} ({time.perf_counter() - began:.1f} s)")
    return report


def write_report(run: ic.runs.RunFolder, model: ic.Model, task: Task, findings: Findings) -> None:
    """One page, two pictures, the lens as data."""
    values = findings.effect.tolist()
    rows = [f"layer {i}" for i in range(len(values))]
    columns = [f"head {i}" for i in range(len(values[0]))]
    texts = [[percent(value) for value in line] for line in values]
    note = "Corrupted prompts with one head's z at the last token taken from the clean run: share of the gap restored."
    grid = ic.report.Heatmap(
        values, rows, columns, texts=texts, diverging=True, title="Heads that carry the answer", caption=note,
        colorbar="share of the gap restored", percent=True,
    )  # fmt: skip
    run.result("lens", findings.lens)
    run.figure("lens.png", findings.lens.png)
    run.figure("patching.png", grid.png)
    words = [model.word(int(ids[0])) for ids in (task.answer, task.other)]
    pair = [(tokens.texts or ("",))[0] for tokens in (task.clean, task.corrupted)]
    steered = ic.report.table(findings.steered) + f"<pre>{ic.report.escape(findings.generation.receipts[0])}</pre>"
    sections = [
        ic.report.Section(
            "Control: the heads taken out", "The named heads, and as many random ones, set to their mean over tasks.",
            ic.report.table(_shares(findings.ablated)),
        ),
        ic.report.Section(
            "Logit lens", "What each layer would say at the end of the first clean prompt, if the model stopped there.",
            findings.lens.html(),
        ),
        ic.report.Section(
            "Steering by layer", "Corrupted prompts with the mean difference added after a layer, at the last token.",
            ic.report.table(_shares(findings.layers)),
        ),
        ic.report.Section(
            "Steered text", f"The same difference, added after layer {findings.layer} at every new token.", steered
        ),
    ]  # fmt: skip
    answer = ic.report.Answer(
        "Where the model decides between two answers",
        f"Which heads decide between the answer and its rival, and can the decision be moved? {task.story}",
        findings.finding,
        [{f"clean, leads to {words[0]!r}": pair[0], f"corrupted, leads to {words[1]!r}": pair[1]}],
        grid.html(), further=findings.sentences(), sections=sections,
        details={"Every site of this model": str(model.sites)},
    )  # fmt: skip
    run.page("report.html", answer, model)


def _shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table whose shares are written in per cent."""
    return [{key: percent(x) if key.startswith("answer") else x for key, x in row.items()} for row in rows]


def percent(value: float) -> str:
    """Whole percents, without a minus before zero."""
    return f"{round(100 * value) + 0}%"
