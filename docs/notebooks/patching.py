# %% [markdown]
# # A patching study
#
# Two prompts, almost the same, and different answers: which part of the model carries the difference? The model is
# `toy:text`, which ships with the package, so that everything here takes seconds.

# %%
import interp_core as ic
from interp_core import score
from interp_core import sites as S

model = ic.load("toy:text")

# %% [markdown]
# The first prompt asks for an opposite, the second for a French word. Only the examples say which.

# %%
clean = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
french = clean.replace("small", "grand").replace("cold", "chaud")
run = model.run([clean, french])
run

# %% [markdown]
# ## Where along the text
#
# Patching takes one value from the run of the first prompt and puts it into the run of the second: here the residual
# stream, at every layer and token. What comes back is the share of the difference between the two answers.

# %%
patching = ic.method("activation_patching")
streams = patching(model, clean, corrupted=french, site="resid_pre", at="each")
streams

# %% [markdown]
# Up to layer 2 the relation lies at the example answers; from layer 3 on it is at the last token. So something in
# layer 2 moves it there. The heads of that token tell what:

# %%
heads = patching(model, clean, corrupted=french)
heads

# %% [markdown]
# ## Is that all of it?
#
# Patching both heads together, and ablating both, says whether they are enough and whether they are needed. `sweep`
# runs such variants side by side, each with a key.

# %%
source = model.run(clean, read=S.z[2])
both = [S.z[2, head].at(-1).set(source[S.z[2, head]].at(-1)) for head in (2, 3)]
variants = {"head 2": both[:1], "head 3": both[1:], "both": both}
judged = score.logit_diff(" dry", " mouillé")
patched = model.sweep(french, variants, judged)
patched

# %%
without = {name: [edit.site.zero() for edit in edits] for name, edits in variants.items()}
ablated = model.sweep(clean, without, judged)
ablated

# %%
share = patched["both"] / (ablated.clean - patched.clean)
print(f"Both heads give back {share.item():.0%} of the difference.")
