"""The methods that ship with interp_core, one file each."""
