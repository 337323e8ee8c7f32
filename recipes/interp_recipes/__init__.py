"""The recipes that ship with interp_core, one file each."""
