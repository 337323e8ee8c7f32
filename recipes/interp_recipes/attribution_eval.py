"""Attribution methods on cached data sets: faithfulness on the generated span, recovery of needles.

    interp run attribution_eval --datasets niah_mq_q2 --data_root D --output_root O --model LABEL --model_path PATH
        --attr_funcs ifr_all_positions,attnlrp,ifr_multi_hop_both --mode faithfulness_gen,recovery_ruler --n_hops 1

writes, as the published experiment does, into the tree O:

    faithfulness/<data set>/<label>/<method>_<num_examples>_examples.csv     RISE, MAS, RISE+AP
    recovery/<data set>/<label>/<method>_<num_examples>_examples.csv         Recovery@10%
    traces/<data set>/<label>/<tag>/                                         with --save_hop_traces
    examples/<data set>/<label>/all_<num_examples>_examples.csv              ours: every example, method and form
    examples/<data set>/<label>/unreadable_<num_examples>_examples.jsonl     ours: lines of the cache that were dropped
    summary/<data set>/<label>/all_<num_examples>_examples.{csv,html}        ours: means with intervals, as a page

The run's record lies beside the tree; the same command goes on where it was stopped. In the profile `reference` every
number is the published code's; `sound` (default) differs where docs/attribution_evaluation.md says.

Source: FlashTrace (Pan et al. 2026), arXiv:2602.01914, `exp/exp2/run_exp.py`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from interp_plugins.attribution.data.cache import Example, load_examples
from interp_plugins.attribution.evaluation.comparing import compare, examples_csv
from interp_plugins.attribution.evaluation.evaluating import FAITHFULNESS, MODES, RECOVERY, Options, evaluate
from interp_plugins.attribution.evaluation.faithfulness import METRICS
from interp_plugins.attribution.evaluation.tables import faithfulness_table, recovery_table, table_path
from interp_plugins.attribution.files.arrays import npz_bytes
from interp_plugins.attribution.files.traces import MANIFEST, line_of, members_of, run_tag

import interp_core as ic
from interp_core import report, runs

from .configs import balanced, words

ATTR_FUNCS = "ifr_all_positions,attnlrp,ifr_multi_hop_both"
MATH = ("math", "gsm8k")
"""Data sets without needles."""
METRICS_SHOWN = {
    "RISE": "RISE (lower is better)", "MAS": "MAS (lower is better)", "recovery": "Recovery@10 % (higher is better)",
    "mass": "Share of the weight on needles", "first_share": "Share of the mass on the first token",
    "sink_share": "Share of the mass on attention sinks", "seconds": "Seconds of the attribution",
}  # fmt: skip
BETTER: dict[str, Callable[..., dict[str, Any]]] = {"RISE": min, "MAS": min, "recovery": max}
"""Metrics by which one method is better than another, and which of their means is best; the first counts most."""
FEWEST = 10
"""Examples below which intervals are too narrow to tell methods apart."""
Rows = list[dict[str, Any]]


class AttributionEvalConfig(ic.Config):
    """Which methods are evaluated on which data sets, and how.

    Attributes:
        datasets: names of caches in `data_root`, or paths of them (a path becomes nested folders); several by commas.
        attr_funcs: methods by their published names, or any attribution method; several by commas.
        model: what the tables call the model; also what is loaded where there is no `model_path`.
        model_path: toy:text, smollm2, a folder, or a hub id.
        data_root: where caches are.
        output_root: where the tree goes.
        num_examples: of each data set, at most.
        mode: faithfulness_gen, recovery_ruler, or both.
        sample: draw so many examples by a shuffle (None: the first ones).
        seed: of that shuffle.
        n_hops: of multi-hop methods.
        chunk_tokens: how many sources of IFR are worked on at a time.
        sink_chunk_tokens: how many sinks of IFR are worked on at a time.
        attnlrp_neg_handling: of AttnLRP: what becomes of negative relevance.
        attnlrp_norm_mode: of AttnLRP: whether relevance is normalised.
        save_hop_traces: also write trace folders.
        cuda: a CUDA device's number, or several (2,3,4) to lay the model over; None: the first, if any.
        cuda_num: the same, by the published command's other name; `cuda` goes before it.
        dtype: of the weights (float16 is what the published experiment uses).
        profile: "reference" reproduces the published code, "sound" does what it should have done.
        tie_orders: random orders among equal weights that are scored too, for the range in the examples' table.
        strict: the first example that cannot be evaluated ends the run; without it, it is recorded and dropped.
        overwrite: replace tables that another run wrote there.
    """

    datasets: list[str] | str
    attr_funcs: list[str] | str = ATTR_FUNCS
    model: str = "toy:text"
    model_path: str | None = None
    data_root: Path = Path("exp/exp2/data")
    output_root: Path = Path("exp/exp2/output")
    num_examples: int = 100
    mode: list[str] | str = FAITHFULNESS
    sample: int | None = None
    seed: int = 42
    n_hops: int = 3
    chunk_tokens: int = 128
    sink_chunk_tokens: int = 32
    attnlrp_neg_handling: Literal["drop", "abs"] = "drop"
    attnlrp_norm_mode: Literal["norm", "no_norm"] = "norm"
    save_hop_traces: bool = False
    cuda: str | int | None = None
    cuda_num: int | None = None
    dtype: str | None = None
    profile: Literal["sound", "reference"] = "sound"
    tie_orders: int = 0
    strict: bool = False
    overwrite: bool = False

    def options(self) -> Options:
        """How examples are evaluated.

        Raises:
            PlanError: a mode or a method that there is not, none of either, numbers out of range.
        """
        named_alike = {field.name: getattr(self, field.name) for field in fields(Options) if field.name != "modes"}
        options = Options(modes=tuple(words(self.mode)), **named_alike)
        for mode in options.modes:
            if mode not in MODES:
                raise ic.PlanError(f"no mode {mode!r}. {ic.errors.nearest(mode, MODES)}")
        functions = words(self.attr_funcs)
        if not options.modes or not functions:
            raise ic.PlanError("nothing to do: give --mode and --attr_funcs")
        for function in functions:
            options.settings(function)
        if options.n_hops < 0:
            raise ic.PlanError(f"n_hops is {options.n_hops}: give 0 or more")
        return options


def attribution_eval(config: AttributionEvalConfig) -> Path:
    """Evaluate attribution methods on caches of examples; returns the folder of the tables.

    Raises:
        PlanError: unknown methods or modes, recovery on data without needles, before the model is loaded.
        LoadError: a cache that cannot be read.
    """
    options, functions = config.options(), words(config.attr_funcs)
    examples_and_dropped = {name: _examples(name, config) for name in words(config.datasets)}
    caches = {name: examples for name, (examples, _) in examples_and_dropped.items()}
    for name, examples in caches.items():
        _check_needles(name, examples, options)
    place = _device(config.cuda_num if config.cuda is None else config.cuda)
    model = ic.load(config.model_path or config.model, dtype=config.dtype, **place)
    _check_template(model, config.profile)
    settings = {
        "datasets": {name: [e.prompt_sha1 + e.target_sha1 for e in examples] for name, examples in caches.items()},
        "label": config.model, "options": {**vars(options), "modes": list(options.modes)},
        "num_examples": config.num_examples, "attr_funcs": functions, "traces": config.save_hop_traces,
    }  # fmt: skip
    about: dict[str, Any] = {"recipe": "attribution_eval", "model": model, "dataset": ",".join(caches)}
    with runs.publish(config.output_root, settings, **about, overwrite=config.overwrite) as run:
        work = [Work(run, model, n, examples, f, options, config) for n, examples in caches.items() for f in functions]
        _evaluated(work, {name: rows for name, (_, rows) in examples_and_dropped.items()})
    return config.output_root


def _evaluated(work: Sequence[Work], dropped: Mapping[str, Rows]) -> None:
    """All methods on all data sets, each data set with its summary, and with the lines that could not be read."""
    for each in work:
        each.claim()
    for name, of_cache in itertools.groupby(work, lambda each: each.name):
        methods = list(of_cache)
        run, config = methods[0].run, methods[0].config
        if dropped[name]:
            place = table_path("examples", name, config.model, "unreadable", config.num_examples)
            run.put({place.removesuffix(".csv") + ".jsonl": runs.json_lines(dropped[name])})
        rows: Rows = []
        left_out = [_left_out(f"line {row['line']}", "", row) for row in dropped[name]]
        for each in methods:
            good, bad = each.done()
            rows, left_out = [*rows, *good], [*left_out, *bad]
        _summary(methods[0], rows, left_out)


def _left_out(which: str, method: str, row: Mapping[str, Any]) -> dict[str, str]:
    return {"which": which, "method": method, "reason": str(row["dropped"])}


@dataclass(frozen=True)
class Work:
    """One method on one data set.

    Attributes:
        run: where files go.
        loaded: the model.
        name: of the data set, in the tree.
        examples: of the data set.
        function: the method, by its published name.
        options: how examples are evaluated.
        config: of the whole evaluation.
    """

    run: runs.RunFolder
    loaded: ic.Model
    name: str
    examples: Sequence[Example]
    function: str
    options: Options
    config: AttributionEvalConfig

    def table(self, kind: str) -> str:
        """Where a table lies in the tree."""
        return table_path(kind, self.name, self.config.model, self.function, self.config.num_examples)

    @property
    def folder(self) -> str:
        """Where traces lie."""
        o = self.options
        settings = (o.n_hops, o.attnlrp_neg_handling, o.attnlrp_norm_mode)
        tag = run_tag(self.function, o.modes, len(self.examples), *settings)
        return f"{self.table('traces').rpartition('/')[0]}/{tag}"

    def claim(self) -> None:
        """Refuse now what another run has written."""
        kinds = {FAITHFULNESS: "faithfulness", RECOVERY: "recovery"}
        names = [self.table(kind) for mode, kind in kinds.items() if mode in self.options.modes]
        if self.config.save_hop_traces:
            names.append(f"{self.folder}/{MANIFEST}")
        self.run.claim(names)

    def done(self) -> tuple[Rows, Rows]:
        """Evaluate the examples that are not done yet, write tables and traces; rows of all, and which were dropped."""
        traces = self.config.save_hop_traces
        every = self.run.map(
            self.table("examples").removesuffix(".csv") + ".jsonl", self._row, range(len(self.examples)),
            by=lambda index: index, strict=self.config.strict,
            beside=lambda index, rows: [self._trace_file(index)] if traces and rows[0]["line"] else [],
        )  # fmt: skip
        good = [row for row in every if not row["dropped"]]
        if not good:
            raise ic.PlanError(f"{self.function}: no example of {self.name} works; the first: {every[0]['dropped']}")
        self._tables([row["forms"] for row in good])
        if self.config.save_hop_traces:
            self.run.put({f"{self.folder}/{MANIFEST}": runs.json_lines(row["line"] for row in good)})
        bad = [_left_out(f"example {row['example']}", self.function, row) for row in every if row["dropped"]]
        return [form for row in good for form in row["forms"]], bad

    def _trace_file(self, index: int) -> str:
        return f"{self.folder}/ex_{index:06d}.npz"

    def _row(self, index: int) -> dict[str, Any]:
        """The row of one example, whose trace is written; an example that does not work is noted and dropped.

        Raises:
            InterpError: it does not work, and the run is strict.
        """
        row: dict[str, Any] = {"example": index, "method": self.function, "dropped": "", "forms": [], "line": None}
        try:
            evaluated = evaluate(self.loaded, self.examples[index], index, self.function, self.options)
        except ic.InterpError as error:
            if self.config.strict:
                raise
            print(f"  dropped example {index}: {error}", file=sys.stderr)
            return row | {"dropped": str(error)}
        if self.config.save_hop_traces:
            self.run.put({self._trace_file(index): npz_bytes(members_of(evaluated.trace))})
        return row | {"forms": evaluated.rows, "line": line_of(evaluated.trace)}

    def _tables(self, forms: Sequence[Rows]) -> None:
        """The published tables of examples' rows, one per form."""
        seconds = [rows[0]["seconds"] for rows in forms]
        if FAITHFULNESS in self.options.modes:
            scores = [[[row[metric] for metric in METRICS] for row in rows] for rows in forms]
            self.run.put({self.table("faithfulness"): faithfulness_table(scores, seconds).text()})
        if RECOVERY in self.options.modes:
            hits = [[row["recovery"] for row in rows] for rows in forms if not rows[0]["skipped"]]
            table = recovery_table(hits, seconds, skipped=len(forms) - len(hits))
            self.run.put({self.table("recovery"): table.text()})


def _summary(work: Work, rows: Rows, left_out: Rows) -> None:
    """Our own tables of a data set: every example, and means with intervals as CSV and as a page."""
    name, label, count = work.name, work.config.model, work.config.num_examples
    metrics = [metric for metric in METRICS_SHOWN if any(row.get(metric) is not None for row in rows)]
    lines = compare(rows, metrics)
    places = {kind: table_path(kind, name, label, "all", count) for kind in ("examples", "summary")}
    files = {places["examples"]: examples_csv(rows), places["summary"]: runs.csv_text(lines, list(lines[0]))}
    work.run.put(files, stage=places["summary"])
    first, *others = [metric for metric in (*BETTER, *METRICS_SHOWN) if metric in metrics]
    finding, *further = [winner(rows, metric) for metric in BETTER if metric in metrics]
    others = [metric for metric in dict.fromkeys(others) if metric != first]
    answer = report.Answer(
        f"Attribution on {Path(name).stem}",
        f"Which of the methods {', '.join(dict.fromkeys(line['method'] for line in lines))} best names the tokens on "
        f"which the answers of {len(work.examples)} examples of {Path(name).name} depend?",
        finding,
        [{"prompt": report.short(e.prompt, 300), "answer": report.short(e.target or "", 300)} for e in work.examples],
        f"<h3>{METRICS_SHOWN[first]}</h3>{_bars(lines, first)}", further=further,
        sections=[report.Section(METRICS_SHOWN[metric], "", _bars(lines, metric)) for metric in others],
        left_out=left_out, rows=lines, whole=places["summary"],
    )  # fmt: skip
    work.run.page(places["summary"].removesuffix(".csv") + ".html", answer, work.loaded)


def winner(rows: Rows, metric: str) -> str:
    """Which method is best by a metric of the row form, and whether the examples tell it from the next best."""
    of_form = [row for row in rows if row["form"] == "row"]
    lines = [line for line in compare(of_form, [metric]) if not math.isnan(line["mean"])]
    how = "highest" if BETTER[metric] is max else "lowest"
    if not lines:
        return f"No example has a {metric} that counts."
    best = BETTER[metric](lines, key=lambda line: line["mean"])
    said = f"{best['method']} has the {how} mean {metric}, {best['mean']:.3f} over {best['examples']} examples"
    rivals = [line for line in lines if line is not best]
    if not rivals:
        return f"{best['method']} has a mean {metric} of {best['mean']:.3f}; no other method was asked for."
    rival = BETTER[metric](rivals, key=lambda line: line["mean"])
    against = next(
        line for line in compare(of_form, [metric], baseline=rival["method"]) if line["method"] == best["method"]
    )
    said += f", before {rival['method']} with {rival['mean']:.3f}"
    if against["pairs"] < FEWEST:
        return f"{said}; so few examples do not tell whether that is chance."
    low, high = against["difference_low"], against["difference_high"]
    apart = "tell them apart" if low > 0 or high < 0 else "do not tell them apart"
    return (
        f"{said}; the {against['pairs']} examples that both have {apart} (difference {against['difference']:+.3f}, "
        f"95 % interval {low:+.3f} to {high:+.3f})."
    )


def _bars(lines: Rows, metric: str) -> str:
    """A metric of the row form, method by method, with intervals where there are examples enough."""
    bars = [
        report.Bar(line["method"], line["mean"], None if math.isnan(line["low"]) else (line["low"], line["high"]))
        for line in lines
        if line["metric"] == metric and line["form"] == "row" and not math.isnan(line["mean"])
    ]
    words = f"{metric}: means over examples with 95 % intervals"
    return report.Bars(bars, xlabel=words).html() if bars else "no example counts"


def _examples(name: str, config: AttributionEvalConfig) -> tuple[list[Example], Rows]:
    """The examples of a data set; lines that cannot be read are dropped and said, and come second."""
    root = config.data_root
    path = Path(name) if name.endswith(".jsonl") else root / f"{name}.jsonl"
    if not path.is_file():
        there = sorted(p.stem for p in root.glob("*.jsonl")) if root.is_dir() else []
        raise ic.LoadError(f"no cache {path}. {ic.errors.nearest(name, there) if there else f'{root} holds none'}")
    dropped: Rows = []

    def bad(line: int, error: ic.InterpError) -> None:
        print(f"  dropped line {line}: {error}", file=sys.stderr)
        dropped.append({"line": line, "dropped": str(error)})

    drop = None if config.strict else bad
    examples = load_examples(path, config.num_examples, sample=config.sample, seed=config.seed, bad=drop)
    if not examples:
        raise ic.LoadError(f"{path} holds no example that can be used")
    return examples, dropped


def _check_template(model: ic.Model, profile: str) -> None:
    """The published code goes through a chat template: without one no example works."""
    if profile == "reference" and not getattr(model.tokenizer, "chat_template", None):
        raise ic.PlanError(
            f"the profile 'reference' goes through a chat template, and the tokenizer of {model.source} has none; set "
            "tokenizer.chat_template, or take the profile 'sound'"
        )


def _check_needles(name: str, examples: Sequence[Example], options: Options) -> None:
    if RECOVERY not in options.modes:
        return
    if Path(name).stem in MATH or not any(example.needles for example in examples):
        raise ic.PlanError(
            f"recovery_ruler is recall of needles, and {name} has none (metadata.needle_spans); leave it out"
        )


def _device(cuda: str | int | None) -> dict[str, Any]:
    """How a model is loaded for the CUDA devices asked for.

    Raises:
        PlanError: devices that this machine does not have.
    """
    if cuda is None:
        return {}
    numbers = [int(word) if word.strip().isdigit() else -1 for word in str(cuda).split(",")]
    count = torch.cuda.device_count()
    if any(not 0 <= number < count for number in numbers):
        there = f"this machine has {count}" if count else "this machine has none; leave --cuda out"
        raise ic.PlanError(f"--cuda takes numbers of CUDA devices, as 0 or 2,3,4, not {cuda!r}: {there}")
    if len(numbers) == 1:
        return {"device": f"cuda:{numbers[0]}"}
    return balanced(numbers)
