"""The parity suite: two folders of files compared stage by stage, and each with itself."""
