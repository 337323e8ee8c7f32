"""Pages and pictures from results: charts that are self-contained HTML and, from the same object, PNG.

    from interp_core import report

    chart = report.Curves([report.Line.of("drop", band)], places=layers, ylabel="nats")
    chart.html()                 # a piece of a page, with tips; a notebook shows it by itself
    chart.png("drop.png")        # through matplotlib (extra `plot`)
    report.page("Title", "what it is", [report.Section("Drop by layer", "", chart.html())])

Pages are one file that needs no network, follow the reader's light or dark setting, and escape every text that they are
given. Intervals and bands come from `interp_core.stats`, or as pairs of numbers.
"""

from .answer import Answer
from .charts import Bars, Chart, Curves, Heatmap, Overlay, TokenStrip, titled
from .figures import Bar, Frame, Line
from .html import Section, cell_texts, copyable, escape, number, page, short, table, visible
from .places import place_name, place_words

__all__ = [
    "Answer",
    "Bar",
    "Bars",
    "Chart",
    "Curves",
    "Frame",
    "Heatmap",
    "Line",
    "Overlay",
    "Section",
    "TokenStrip",
    "cell_texts",
    "copyable",
    "escape",
    "number",
    "page",
    "place_name",
    "place_words",
    "short",
    "table",
    "titled",
    "visible",
]
