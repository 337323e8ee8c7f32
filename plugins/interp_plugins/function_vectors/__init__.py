"""Function vectors (Todd et al. 2024): what heads carry of a task shown in context, as one vector."""
