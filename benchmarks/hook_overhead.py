"""Hook overhead, side by side in one process: python benchmarks/hook_overhead.py [narrow|gpt2|toy|page] [rounds]

narrow: 12 layers, d_model 96, 12 heads, 8 tokens, where Python costs more than arithmetic.
gpt2:   the sizes of GPT-2 (124M, random weights), 64 tokens.
toy:    the toy model that ships with the package, 32 tokens.
page:   puts tables of the first two into docs/overhead.md, between its marks; rounds are of narrow.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peers import installed

import interp_core as ic
from interp_core.bench import NOISY, OPERATIONS, Row, benchmark, measure
from interp_core.files import write

PAGE = Path(__file__).parents[1] / "docs/overhead.md"
CONFIGS = {
    "narrow": (
        {
            "num_hidden_layers": 12, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12,
            "head_dim": 8, "intermediate_size": 256, "attention_bias": False,
        },
        8, "llama",
    ),
    "gpt2": ({"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}, 64, "gpt2"),
}  # fmt: skip
MEMORY = "MiB that the result holds"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "Python calls added": lambda row: f"{row.calls:+,}",
    "Time, as a multiple of the bare model's": lambda row: f"{row.ratio:.2f}",
    MEMORY: lambda row: f"{row.held / 2**20:.2f}",
}


def main(name: str = "narrow", rounds: str = "40") -> None:
    """Print the table of one configuration, or put both into the page."""
    torch.set_num_threads(1)
    if name == "page":
        text = PAGE.read_text(encoding="utf-8")
        for each, count in (("narrow", int(rounds)), ("gpt2", 8)):
            model, n_tokens = model_of(each)
            rows, _ = measure(model, rounds=count, n_tokens=n_tokens, tools=installed())
            marks = rf"(<!-- {each} -->\n).*?(<!-- /{each} -->)"
            tables = f"{tables_of(rows)}\n\n{noise_of(rows, count)}\n"
            text = re.sub(marks, lambda found, new=tables: found[1] + new + found[2], text, flags=re.S)
        write(PAGE, text)
    else:
        model, n_tokens = model_of(name)
        print(benchmark(model, rounds=int(rounds), n_tokens=n_tokens, tools=installed()))


def model_of(name: str) -> tuple[ic.Model, int]:
    """The model of a configuration, and how many tokens it is given."""
    if name == "toy":
        return ic.load("toy:text"), 32
    tokenizer = ic.load("toy:text").tokenizer
    config, n_tokens, family = CONFIGS[name]
    config = {"vocab_size": len(tokenizer), **config}
    return ic.load(ic.testing.tiny(family, **config), tokenizer=tokenizer), n_tokens


def tables_of(rows: Sequence[Row]) -> str:
    """A table per kind of number: a line per operation, a column per tool; a dash where a tool was not measured. Of
    memory there are the lines in which tools differ."""
    tools = [tool for tool in installed() if tool != "bare"]
    cells = {(row.operation, row.tool): row for row in rows}
    tables = []
    for title, cell in COLUMNS.items():
        lines = [f"| {title} | {' | '.join(tools)} |", "|---" * (1 + len(tools)) + "|"]
        for operation in dict.fromkeys(row.operation for row in rows):
            shown = [cell(cells[operation, tool]) if (operation, tool) in cells else "–" for tool in tools]
            if title != MEMORY or len({*shown} - {"–"}) > 1:
                lines.append(f"| {OPERATIONS[operation]} | {' | '.join(shown)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def noise_of(rows: Sequence[Row], rounds: int) -> str:
    """How long the bare pass took, and how far its times lay apart: smaller differences say nothing."""
    bare = next(row for row in rows if (row.operation, row.tool) == ("plain", "bare"))
    noise = max(row.noise for row in rows if row.tool == "bare")
    busy = "; the machine was busy" if noise > NOISY else ""
    return (
        f"Medians of {rounds} rounds. The bare pass took {bare.seconds * 1e3:.1f} ms of CPU time and varied by "
        f"±{noise:.0%} from round to round, so that smaller differences say nothing{busy}."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
