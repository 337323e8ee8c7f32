"""Function vectors of tasks: from pairs of words to vectors, accuracies and a page.

    interp run function_vectors --set tasks=antonym                       a relation of toy:text
    interp run function_vectors --set tasks=antonym.json --model gpt2     a task file
    interp run function_vectors --set tasks=all                           all relations, and what they share

Per task, in the order and with the random numbers of the published script: rows that the model answers with shots;
mean activations and indirect effects over them; the vector of the heads of largest AIE; zero-shot and shuffled
few-shot accuracy with the vector after every layer (or after `edit_layer`), on test rows that it answers with shots; 0
to n shots without. The layer that examples are shown for is chosen on validation rows. Of several tasks also `related`:
one set of heads for all, differences of vectors, similarities; it chooses its own layer.

`out/<task>/` has the published result files by their names, the vector, tables (CSV), a picture and `report.html`; of
several tasks `out/report.html` has all. A second run keeps what the first made; `out` is a run folder, which other
settings or another model cannot enter (docs/run_folders.md), while tasks may be added.
Relations of the toy are split by word, the same for all, files by row. Cost: as `interp_plugins.function_vectors`.

Source: Todd et al. (2024), arXiv:2310.15213.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from interp_plugins import function_vectors as fv
from interp_plugins.function_vectors import report
from interp_plugins.function_vectors.files.published import read_effects, read_means
from interp_plugins.function_vectors.related import Extracted, Related, by_word, choose, related
from interp_plugins.function_vectors.report import Findings
from interp_plugins.function_vectors.rows import digest
from torch import Tensor

import interp_core as ic
from interp_core.errors import nearest
from interp_core.toys.text import relations

from .configs import words
from .fv_configs import TemplateConfig

ARGS = "fv_eval_args.txt"
MEAN, EFFECT = "{}_mean_head_activations.pt", "{}_indirect_effect.pt"
VALID, FEW, BASELINE = "fs_results_validation.json", "fs_results_layer_sweep.json", "model_baseline.json"
ZERO, SHUFFLED = "zs_results_{}.json", "fs_shuffled_results_{}.json"
AT_ONCE = {"trials": 4, "prompts": 8}
"""So many are worked at together, by one of the processes at work on the run."""


class TasksConfig(TemplateConfig):
    """Which tasks, and how their vectors are extracted and measured.

    Attributes:
        tasks: task files or relations of toy:text, separated by commas; "all": every relation.
        model: toy:text, a folder, or a hub id.
        out: folder of the run (default: results/{model}/{dataset}/{timestamp}-function_vectors-{hash}).
        n_shots: demonstrations in each prompt.
        n_mean_trials, n_trials: prompts for mean activations, and for indirect effects.
        n_top_heads: heads that make a vector.
        seed: of the split and of all draws.
        test_split: share of a file's rows that are not for training; of the others 30 % validate at 0.3.
        compute_baseline: also accuracies of 0 to n_shots shots.
        examples: test rows to show.
        edit_layer: the layer after which the vector is evaluated; -1: every layer.
        instructions: text before the demonstrations.
    """

    tasks: str = "antonym"
    model: str = "toy:text"
    out: Path | None = None
    n_shots: int = 10
    n_mean_trials: int = 100
    n_trials: int = 25
    n_top_heads: int = 10
    seed: int = 42
    test_split: float = 0.3
    compute_baseline: bool = True
    examples: int = 8
    edit_layer: int = -1
    instructions: str = ""

    @property
    def template(self) -> fv.Template:
        """The template of all prompts."""
        return fv.Template.filled(self.prefixes, self.separators, instructions=self.instructions)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Where the vector is evaluated (None: after every layer)."""
        return None if self.edit_layer == -1 else (self.edit_layer,)

    @property
    def drawn(self) -> dict[str, Any]:
        """What all prompts of the run share."""
        return {"seed": self.seed, "template": self.template}

    def name(self, results: str) -> str:
        """The published name of a file of results with the vector."""
        return results.format("layer_sweep" if self.layers is None else f"editlayer_{self.edit_layer}")

    def check(self) -> None:
        """Raise a PlanError for numbers, or a template, that mean nothing; before a model is loaded."""
        for key in ("n_shots", "n_mean_trials", "n_trials", "n_top_heads"):
            if (number := getattr(self, key)) < 1:
                raise ic.PlanError(f"function_vectors: {key} is at least 1, not {number}")
        _ = self.template

    def numbers(self) -> dict[str, Any]:
        """The settings of the published script, in the order of its `fv_eval_args.txt`."""
        names = ("n_shots", "n_mean_trials", "n_trials", "n_top_heads", "seed", "test_split", "compute_baseline")
        return {name: getattr(self, name) for name in (*names, "edit_layer")}


def function_vectors(config: TasksConfig) -> Path:
    """Extract and measure; returns the page's path.

    Raises:
        LoadError, PlanError, TextError: tasks, model and settings that do not fit, before the model runs.
    """
    began = time.perf_counter()
    config.check()
    tasks = _tasks(config)
    model = ic.load(config.model)
    run = _opened(model, tasks, config)
    parts = [run.part(task.name, {"dataset": _fingerprint(task)}, task.name) for task in tasks]
    _check(model, tasks, parts, config)
    print(model, flush=True)
    done = []
    with run:
        for task, part in zip(tasks, parts, strict=True):
            print(task)
            with part.attempt(strict=True):
                done.append(_study(model, task, part, config))
                report.write_task(part, model, done[-1], _args(task, model, config))
            print("", *report.sentences(done[-1]), "", sep="\n")
        page = _together(model, done, parts, run, config) if len(done) > 1 else parts[0].path / "report.html"
    print(f"{time.perf_counter() - began:.1f} s")
    return page


def _opened(model: ic.Model, tasks: Sequence[fv.Task], config: TasksConfig) -> ic.runs.RunFolder:
    """The run's folder; tasks may be added to it, and more examples shown."""
    names = [task.name for task in tasks]
    shown = {"examples": config.examples, "template": config.template}
    settings = {**config.numbers(), **shown, "tasks": names, "model": model.source}
    dataset = "+".join(names) if len(names) <= 3 else f"{len(names)} tasks"
    return ic.runs.open(
        config.out, settings, recipe="function_vectors", model=model, dataset=dataset, free=("tasks", "examples")
    )


def _tasks(config: TasksConfig) -> list[fv.Task]:
    """Tasks by name or file.

    Raises:
        PlanError, LoadError: no such relation or file; two of one name.
    """
    known = {task.name: task for task in by_word(relations())}
    names = words(config.tasks)
    tasks = []
    for name in known if names == ["all"] else names:
        if name in known:
            tasks.append(known[name])
        elif Path(name).suffix or Path(name).exists():
            tasks.append(fv.load_task(name, seed=config.seed, test_split=config.test_split))
        else:
            raise ic.PlanError(
                f"there is no task {name!r}, neither a relation of toy:text nor a file. {nearest(name, known)} A task "
                "file is a .json list of objects with 'input' and 'output'"
            )
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise ic.PlanError(
            f"tasks {config.tasks!r}: give at least one, each once; results go to a folder of the task's name"
        )
    return tasks


def _fingerprint(task: fv.Task) -> str:
    return hashlib.sha256(repr((task.pairs, task.train, task.valid, task.test)).encode()).hexdigest()[:16]


def _args(task: fv.Task, model: ic.Model, config: TasksConfig) -> dict[str, Any]:
    """The settings, as `fv_eval_args.txt` has them."""
    template = config.template
    return {
        "dataset_name": task.name, "dataset_source": task.source, "model_name": model.source,
        **config.numbers(),
        "prefixes": dict(template.prefixes), "separators": dict(template.separators),
        "instructions": template.instructions,
        "model_identity": model.fingerprint(), "dataset_fingerprint": _fingerprint(task),
    }  # fmt: skip


def _files(task: fv.Task, config: TasksConfig) -> list[str]:
    """What is made of a task and kept for the next run."""
    steered = [config.name(name) for name in (ZERO, SHUFFLED)]
    names = [ARGS, MEAN.format(task.name), EFFECT.format(task.name), VALID, FEW, *steered]
    return [*names, BASELINE] if config.compute_baseline else names


def _check(model: ic.Model, tasks: Sequence[fv.Task], parts: Sequence[ic.runs.Part], config: TasksConfig) -> None:
    """Everything that can be known before the model runs.

    Raises:
        PlanError, TextError: heads or a layer that the model does not have, rows for fewer shots, prompts that cannot
            be built, a template whose slots do not align, files that this run did not write.
    """
    if model.tokenizer is None:
        raise ic.TextError("function_vectors builds prompts of its tasks: load the model with its tokenizer")
    if config.n_top_heads > len(model.heads):
        raise ic.PlanError(f"n_top_heads is {config.n_top_heads}; {model.source} has {len(model.heads)} heads")
    if config.edit_layer not in range(-1, model.n_layers):
        raise ic.PlanError(
            f"edit_layer is {config.edit_layer}; {model.source} has layers 0 to {model.n_layers - 1}. Give one of "
            "them, or -1 for all"
        )
    for task, part in zip(tasks, parts, strict=True):
        part.claim(_files(task, config))
        fv.legacy_trials(task, model.tokenizer, n_trials=config.n_trials, n_shots=config.n_shots, **config.drawn)
        fv.questions(task, model.tokenizer, shots=config.n_shots, **config.drawn)


def _study(model: ic.Model, task: fv.Task, part: ic.runs.Part, config: TasksConfig) -> Findings:
    """The published protocol, stage by stage."""
    seed, shots = config.seed, config.n_shots
    part.put({ARGS: json.dumps(_args(task, model, config), indent=2, ensure_ascii=False)})
    # as the published script has it, validation prompts come from a stream of their own, test prompts from the seed's
    valid = _kept(part, VALID, lambda: _answered(part, model, task, "valid", config, seed + 42))
    right = [row for row, rank in enumerate(valid["clean_rank_list"]) if rank == 0]
    drawn: dict[str, Any] = {"n_shots": shots, "filter_set": right, **config.drawn}
    few = _kept(part, FEW, lambda: _answered(part, model, task, "test", config, seed))
    kept = [row for row, rank in enumerate(few["clean_rank_list"]) if rank == 0]
    if not right or not kept:
        raise ic.PlanError(
            f"{model.source} answers no {'test' if right else 'validation'} row of {task.name} with {shots} shots: it "
            "does not do this task, and a vector of it would mean nothing. Take more shots, another task or model"
        )

    def means() -> Tensor:
        trials = fv.legacy_trials(task, model.tokenizer, n_trials=config.n_mean_trials, shuffle=False, **drawn)
        return fv.mean_head_activations(model, [trial.clean for trial in trials])

    def effects() -> Tensor:
        trials = fv.legacy_trials(task, model.tokenizer, n_trials=config.n_trials, **drawn)
        return _effects(part, model, [trial.corrupted for trial in trials], mean, right)

    shown, patched = MEAN.format(task.name), EFFECT.format(task.name)
    mean = part.stage(shown, means, after=[VALID], read=lambda path: read_means(path, model), data=ic.runs.pt_bytes)
    effect = part.stage(
        patched, effects, after=[VALID, shown], read=lambda path: read_effects(path, model), data=ic.runs.pt_bytes,
        shared=True,
    )  # fmt: skip
    aie = fv.average(effect)
    extracted = Extracted(task, mean, aie, config.template)
    choice, _ = choose(model, [extracted], [config.n_top_heads], "own", layers=config.layers)
    heads = fv.top_heads(aie, config.n_top_heads)
    vector = fv.function_vector(model, mean, heads, task=task.name, layer=choice.layer)
    after = [FEW, shown, patched]
    zero = _kept(part, config.name(ZERO), lambda: _steered(part, model, task, vector, 0, kept, config), after)
    shuffled = _kept(
        part, config.name(SHUFFLED), lambda: _steered(part, model, task, vector, shots, kept, config), after
    )  # fmt: skip
    baseline = _kept(part, BASELINE, lambda: _baseline(part, model, task, config)) if config.compute_baseline else {}
    return Findings(
        task, aie, mean, vector, choice, len(kept) / len(few["clean_rank_list"]),
        _evaluation(zero, "zero-shot", config.layers), _evaluation(shuffled, "shuffled", config.layers), baseline,
        fv.words(model, fv.decoded(model, vector)), _examples(model, task, vector, config),
    )  # fmt: skip


def _kept(part: ic.runs.Part, name: str, make: Callable[[], Any], after: Sequence[str] = ()) -> Any:
    """A stage in a JSON file of the published form."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    return part.stage(name, make, after=after, read=read, data=lambda value: json.dumps(value, indent=2), shared=True)


def _effects(
    part: ic.runs.Part, model: ic.Model, prompts: Sequence[fv.Prompt], mean: Tensor, right: Sequence[int]
) -> Tensor:
    """Indirect effects, some trials at a time."""

    def rows(numbers: Sequence[int]) -> list[dict[str, Any]]:
        effects = fv.indirect_effect(model, [prompts[number] for number in numbers], mean)
        return [{"effects": trial.tolist()} for trial in effects]

    of = {"rows that are answered": list(right), "means": digest(mean)}
    listed = part.map(
        "effects", rows, range(len(prompts)), by=lambda number: number, inputs=of, batch=AT_ONCE["trials"], strict=True,
        file=False,
    )  # fmt: skip
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    return torch.tensor([row["effects"] for row in listed], dtype=kind)


def _evaluated(
    part: ic.runs.Part, name: str, model: ic.Model, by_shots: Mapping[int, Sequence[fv.Prompt]],
    vector: fv.FunctionVector | None = None, kept: Sequence[int] = (), layers: Sequence[int] | None = None,
) -> dict[int, fv.Evaluation]:  # fmt: skip
    """Evaluations of lists of prompts, some prompts at a time: of rows that are kept with a vector, or without one, and
    then with likelihoods."""

    def rows(some: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        prompts = [by_shots[shots][number] for shots, number in some]
        evaluation = fv.evaluate(model, prompts, vector, layers=layers, likelihood=vector is None)
        columns = {"clean": evaluation.clean_rank, "nll": evaluation.clean_nll, "rank": evaluation.rank}
        lists = {key: column.movedim(-1, 0).tolist() for key, column in columns.items() if column is not None}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]

    of = {} if vector is None else {"vector": digest(vector.vector), "rows": list(kept)}
    items = [(shots, number) for shots, prompts in by_shots.items() for number in range(len(prompts))]
    listed = part.map(
        name, rows, items, by=lambda item: f"{item[1]}, {item[0]} shots", inputs=of, batch=AT_ONCE["prompts"],
        alike=lambda item: item[0], strict=True, file=False,
    )  # fmt: skip
    places = tuple(range(model.n_layers) if layers is None else layers)
    evaluations = {}
    for shots in by_shots:
        own = [row for row, item in zip(listed, items, strict=True) if item[0] == shots]
        ranks, nll = (None if key not in own[0] else torch.tensor([row[key] for row in own]) for key in ("rank", "nll"))
        clean = torch.tensor([row["clean"] for row in own])
        evaluations[shots] = fv.Evaluation(
            clean, None if ranks is None else ranks.T, nll, () if vector is None else places
        )
    return evaluations


def _answered(
    part: ic.runs.Part, model: ic.Model, task: fv.Task, split: str, config: TasksConfig, seed: int
) -> dict[str, Any]:
    prompts = fv.questions(
        task, model.tokenizer, shots=config.n_shots, split=split, seed=seed, template=config.template
    )  # fmt: skip
    return _evaluated(part, split, model, {config.n_shots: prompts})[config.n_shots].published()


def _steered(
    part: ic.runs.Part, model: ic.Model, task: fv.Task, vector: fv.FunctionVector, shots: int, kept: Sequence[int],
    config: TasksConfig,
) -> dict[int, Any] | dict[str, Any]:  # fmt: skip
    """The published form: by layer after a sweep, else of the one layer."""
    prompts = fv.questions(task, model.tokenizer, shots=shots, shuffled=shots > 0, filter_set=kept, **config.drawn)
    name = "shuffled" if shots else "zero"
    evaluation = _evaluated(part, name, model, {shots: prompts}, vector, kept, config.layers)[shots]
    by_layer = {layer: evaluation.published(layer) for layer in evaluation.layers}
    return by_layer if config.layers is None else by_layer[config.edit_layer]


def _baseline(part: ic.runs.Part, model: ic.Model, task: fv.Task, config: TasksConfig) -> dict[int, Any]:
    numbers = range(config.n_shots + 1)
    by_shots = {shots: fv.questions(task, model.tokenizer, shots=shots, **config.drawn) for shots in numbers}
    return {
        shots: evaluation.published() for shots, evaluation in _evaluated(part, "baseline", model, by_shots).items()
    }


def _evaluation(published: Mapping[str, Any], name: str, layers: Sequence[int] | None) -> fv.Evaluation:
    """Ranks from the published form."""
    by_layer: Mapping[Any, Any] = published if layers is None else {layers[0]: published}
    ranks = torch.tensor([row["intervention_rank_list"] for row in by_layer.values()])
    clean = torch.tensor(next(iter(by_layer.values()))["clean_rank_list"])
    return fv.Evaluation(clean, ranks, None, tuple(int(layer) for layer in by_layer), name)


def _examples(model: ic.Model, task: fv.Task, vector: fv.FunctionVector, config: TasksConfig) -> list[dict[str, Any]]:
    """Test rows zero-shot and with shuffled answers: what the model says without the vector, and with it."""
    assert vector.layer is not None
    edit, rows = fv.injection(model, vector, vector.layer), range(min(config.examples, len(task.test)))
    examples: list[dict[str, Any]] = []
    for kind, shots in (("zero-shot", 0), ("shuffled", config.n_shots)) if rows else ():
        prompts = fv.questions(task, model.tokenizer, shots=shots, shuffled=shots > 0, rows=rows, **config.drawn)
        new = max(len(prompt.target_ids) for prompt in prompts)
        plain, steered = (fv.generated(model, prompts, edits, max_new_tokens=new) for edits in ((), edit))
        for row, a, b in zip(rows, plain, steered, strict=True):
            query = task.pairs[task.test[row]].input
            said = {"without": a["generated"].strip(), "with vector": b["generated"].strip()}
            examples.append({"prompt": kind, "query": query, "answer": a["target"]} | said)
    return examples


def _together(
    model: ic.Model,
    done: Sequence[Findings],
    parts: Sequence[ic.runs.Part],
    run: ic.runs.RunFolder,
    config: TasksConfig,
) -> Path:
    """What the tasks share, measured and written; kept if the same tasks made it."""
    print(f"related: {len(done)} tasks", flush=True)
    inputs = {findings.task.name: part.data["inputs"]["dataset"] for findings, part in zip(done, parts, strict=True)}
    after = [f"{part.prefix}/{form.format(part.name)}" for part in parts for form in (MEAN, EFFECT)]
    if run.kept("related", inputs=inputs, after=after):
        shared = Related.load(run.path / "related")
    else:
        extracted = [Extracted(findings.task, findings.mean, findings.aie, config.template) for findings in done]
        shared = related(model, extracted, seed=config.seed)
        args = {findings.task.name: _args(findings.task, model, config) for findings in done}
        files = {**shared.files(), ARGS: json.dumps(args, indent=2, ensure_ascii=False)}
        run.put(
            {f"related/{name}": content for name, content in files.items()}, stage="related", inputs=inputs, after=after
        )
    shared.show()
    return report.write_all(run, model, done, shared)
