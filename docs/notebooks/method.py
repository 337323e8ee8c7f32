# %% [markdown]
# # A method of one's own
#
# A method is a class: what can be set, what comes back, and how to get from one to the other. This one asks how far
# back each attention head looks:
#
#     distance[head] = mean over queries of Σ over keys of pattern[query, key] · (query − key)        in tokens

# %%
"""How far back attention heads look: the mean distance from query to key. Source: this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

import interp_core as ic
from interp_core import report, testing
from interp_core import sites as S

# %% [markdown]
# (The docstring at the top of a module, here of a cell, says what is computed and where it comes from.) The result
# comes first. `AXES` names every dimension: that is what `save`, `load`, batches and checks go by. `charts` is what
# pages, notebooks and files draw, `finding` the sentence above it.


# %%
@dataclass(frozen=True, eq=False)
class Distances(ic.Result):
    """How far back heads look, in tokens."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"distance": ("batch", "layer", "head")}
    distance: torch.Tensor

    @property
    def finding(self) -> str:
        mean = self.distance.mean(0)
        layer, head = divmod(int(mean.argmax()), mean.shape[1])
        return f"Head {head} of layer {layer} looks back farthest, {mean[layer, head]:.1f} tokens in the mean."

    def charts(self) -> list[report.Chart]:
        _, layers, heads = self.distance.shape
        rows, columns = [f"layer {layer}" for layer in range(layers)], [f"head {head}" for head in range(heads)]
        return [report.Heatmap(one, rows, columns, caption="distance in tokens") for one in self.distance]


# %% [markdown]
# The config says what can be set; a wrong key or value is refused before the model runs. `requires` says what the
# model must have. Positions count real tokens, so padding needs care: the mask says which queries there are.


# %%
class DistanceConfig(ic.Config):
    """Settings.

    Attributes:
        skip: the first tokens, which look back at little but themselves.
    """

    skip: int = 0


class AttentionDistance(ic.Method):
    """How far back each attention head looks."""

    name = "attention_distance"
    requires = frozenset({"pattern"})
    Config = DistanceConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: DistanceConfig) -> Distances:
        place = tokens.mask.cumsum(-1) - 1  # [batch pos], padding left out
        back = (place[:, :, None] - place[:, None, :]).clamp(min=0)  # [batch query key]
        asked = tokens.mask & (place >= config.skip)
        run = model.run(tokens, read=S.pattern, logits=False)
        heads = []
        for layer in model.layers(S.pattern):
            pattern = run[S.pattern[layer]].plain  # [batch head query key]
            each = (pattern * back[:, None]).sum(-1).where(asked[:, None], 0)
            heads.append(each.sum(-1) / asked.sum(-1)[:, None])
        return Distances(torch.stack(heads, 1))


# %% [markdown]
# It runs at once. Title, question, model, settings and versions are noted by the base class, and stand on its page.

# %%
model = ic.load("toy:text")
text = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
distances = AttentionDistance()(model, text, skip=4)
distances

# %% [markdown]
# ## Is it right?
#
# The kit tries what every method must hold: one prompt alone or in a batch, padding on either side, no hook left
# behind, weights untouched, what is saved comes back. Here on a tiny model of another family:

# %%
print(testing.check_method(AttentionDistance, ic.load(testing.tiny("gpt2"))))

# %% [markdown]
# And one number worked out in plain loops:

# %%
run = model.run(text, read=S.pattern[2, 0])
pattern = run[S.pattern[2, 0]].plain[0]
queries = range(4, len(pattern))
by_hand = sum(float(pattern[query, key]) * (query - key) for query in queries for key in range(query)) / len(queries)
print(f"{by_hand:.5f} by hand, {float(distances.distance[0, 2, 0]):.5f} by the method")

# %% [markdown]
# ## By its name
#
# Registered, it is known to `ic.method`; in a package, an entry point does that, and `interp run attention_distance`
# works too: [the tutorial](../tutorial.md) goes there step by step.

# %%
ic.registry("methods").register("attention_distance", AttentionDistance)
ic.method("attention_distance")(model, [text, "Q: big\nA:"]).distance.shape
