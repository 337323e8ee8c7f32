"""Parts of prompts that are taken away: units, conventions, judges, and a sparse fit."""
