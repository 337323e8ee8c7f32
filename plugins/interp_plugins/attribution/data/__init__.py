"""Examples: cached files, readers of sources, moves between tokenizers, building."""
