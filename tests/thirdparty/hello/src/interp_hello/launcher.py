"""A launcher that runs jobs here, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from interp_core.launch import Job, Outcome


class Inline:
    """No processes."""

    name = "inline"

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """In order."""
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Outcome:
        try:
            return Outcome(job.call(*job.args))
        except Exception:
            return Outcome(error=traceback.format_exc())
