"""Files of published runs: trace folders and compact exports."""
