"""The check at load: a few short passes that hold the atlas against the model itself, and its vision tower."""
