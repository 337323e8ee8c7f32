"""Attribution: how much of a model's answer comes from each token of its prompt."""
