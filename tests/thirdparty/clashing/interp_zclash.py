"""A method under names that are taken. Source: this package."""

import interp_core as ic


class Lens(ic.Method):
    """Does nothing yet."""

    name = "logit_lens"

    def run(self, model: ic.Model, tokens: ic.Tokens, config: ic.Config) -> ic.Result:
        """Nothing."""
        return ic.Result()
