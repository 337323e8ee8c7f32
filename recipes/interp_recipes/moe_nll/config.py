"""Settings of the recipe `moe_nll`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from interp_plugins.logit_lens.tiles import ROWS

import interp_core as ic

from ..configs import TreeConfig

Kind = Literal["none", "exact", "topk_rest", "topk_renorm"]
Mode = Literal["none", "exact", "topk_rest", "topk_renorm", "topk"]


@dataclass(frozen=True)
class Settings:
    """On what the numbers depend, beside model and pairs.

    Attributes:
        js_mode, js_topk, max_tokens: as of the recipe; js_topk is None where nothing looks at it.
        states: where streams came from: "forward", "store" or "pt".
    """

    js_mode: Kind
    js_topk: int | None
    max_tokens: int | None
    states: str


class MoeNllConfig(TreeConfig):
    """Which targets are scored, and how far the two contexts' distributions are apart.

    Attributes:
        pair_tokens_json: pairs with aligned targets.
        hidden_states_dir: streams that were written before: by --save_hidden_states, or `{sample}.pt` of the published
            pipeline, which are of the padded layout.
        chunk_size: rows of the stream that go through the unembedding together.
        js_mode: how far the two contexts' distributions are apart: exact; topk_rest (a lower bound, with its upper
            one); topk_renorm (as the published code's topk, a bound of nothing; topk is the same); none.
        js_topk: likeliest tokens of either side that the topk modes look at.
        max_tokens: the first so many targets of every sample.
        save_hidden_states: write the streams there, for --hidden_states_dir.
    """

    pair_tokens_json: Path
    hidden_states_dir: Path | None = None
    chunk_size: int = ROWS
    js_mode: Mode = "exact"
    js_topk: int = 512
    max_tokens: int | None = None
    save_hidden_states: Path | None = None

    @property
    def divergence(self) -> Kind:
        """`js_mode`, without the published code's name for one."""
        return "topk_renorm" if self.js_mode == "topk" else self.js_mode

    def states_kind(self) -> Literal["forward", "store", "pt"]:
        """Where streams come from: a forward pass, our files, or the published ones.

        Raises:
            LoadError: no folder, one of neither, or one of both.
        """
        folder = self.hidden_states_dir
        if folder is None:
            return "forward"
        if not folder.is_dir():
            raise ic.LoadError(f"hidden_states_dir: there is no folder {folder}; leave it out to work the states out")
        ours, published = any(folder.glob("*.safetensors")), any(folder.glob("*.pt"))
        if ours == published:
            what = "both .safetensors and .pt files" if ours else "neither .safetensors nor .pt files"
            raise ic.LoadError(
                f"hidden_states_dir: {folder} holds {what}; give a folder with one kind, or leave it out"
            )
        return "store" if ours else "pt"

    def settings(self) -> Settings:
        """Those on which the numbers depend, beside model and pairs.

        Raises:
            PlanError, LoadError: settings that contradict each other or are out of range; streams as `states_kind`.
        """
        if self.hidden_states_dir is not None and self.save_hidden_states is not None:
            raise ic.PlanError("hidden states are read or written: give --hidden_states_dir or --save_hidden_states")
        for name in ("chunk_size", "js_topk", "max_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ic.PlanError(f"{name} is {number}: give at least 1")
        top = self.js_topk if self.divergence.startswith("topk") else None
        return Settings(self.divergence, top, self.max_tokens, self.states_kind())
