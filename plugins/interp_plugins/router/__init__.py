"""Statistics of mixture-of-experts routers, on tensors; the method `router` reads them from a model.

Source: docs/methods/router.md has formulas, conventions and what each number must equal.
"""
