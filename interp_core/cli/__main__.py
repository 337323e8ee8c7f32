"""`python -m interp_core.cli` is `interp`."""

from . import main

main()
