# %% [markdown]
# # Steering
#
# A direction in the residual stream that stands for a task: the mean over prompts of one task minus that over prompts
# of another. Added at the last token, it makes `toy:text` answer in French what it is asked the opposite of.

# %%
import random

import torch

import interp_core as ic
from interp_core import score
from interp_core import sites as S
from interp_core.toys.text import relations

model = ic.load("toy:text")
opposite, french = relations()["antonym"], relations()["french"]
words = sorted(word for word in opposite if word in french)
random.Random(0).shuffle(words)
train, test = words[:16], words[16:32]

# %% [markdown]
# Both kinds of prompt have the same words; only the answers of the three examples differ. The words that are tested
# later are never among those that the direction is taken from.


# %%
def prompts(answers, asked):
    texts = []
    for word in asked:
        shots = random.Random(word).sample([other for other in train if other != word], 3)
        texts.append("".join(f"Q: {shot}\nA: {answers[shot]}\n\n" for shot in shots) + f"Q: {word}\nA:")
    return texts


print(prompts(french, train)[0])

# %%
last = S.resid_post.at(-1)
means = [model.run(prompts(answers, train), read=last, logits=False)[last].mean(1) for answers in (french, opposite)]
direction = means[0] - means[1]  # [layer d_model]
direction.shape

# %% [markdown]
# ## At which layer, how strongly
#
# A sweep adds the direction of each layer at several strengths, and follows how far the French word is ahead of the
# opposite (logits, mean of 16 held-out prompts).

# %%
questions = prompts(opposite, test)
target, rival = ([f" {answers[word]}" for word in test] for answers in (french, opposite))
strengths = (0.25, 0.5, 1.0, 2.0)
edits = {
    (layer, strength): S.resid_post[layer].at(-1).add(strength * direction[layer])
    for layer in range(model.n_layers)
    for strength in strengths
}
sweep = model.sweep(questions, edits, score.logit_diff(target, rival))
sweep

# %% [markdown]
# ## What it says
#
# The share of the held-out words that are answered in French: without the direction, with it, and with a random
# direction of the same length.


# %%
def answered(edits, answers):
    best = model.run(questions, edits=edits).logits.at(-1).argmax(-1).tolist()
    right = sum(model.word(token).strip() == answers[word] for token, word in zip(best, test, strict=True))
    return right / len(test)


noise = torch.randn(direction[3].shape, generator=torch.Generator().manual_seed(0))
noise = noise / noise.norm() * direction[3].norm()
for name, edit in {
    "nothing added": [],
    "the direction": S.resid_post[3].at(-1).add(direction[3]),
    "a random one": S.resid_post[3].at(-1).add(noise),
}.items():
    print(f"{name:14} French {answered(edit, french):4.0%}   opposite {answered(edit, opposite):4.0%}")

# %% [markdown]
# And as text; the receipt says that the edit acted, where, and how much it changed.

# %%
steered = model.generate(questions[0], edits=S.resid_post[3].at(-1).add(direction[3]), max_new_tokens=1)
steered

# %% [markdown]
# In layers 0 and 1 the direction does nothing: there the last token does not know yet what the examples ask for, and
# the two means are nearly the same.

# %%
[round(float(length), 2) for length in direction.norm(dim=-1)]
