"""What holds of a model on an engine: the check at load, the battery of `interp check`, the one of images."""
