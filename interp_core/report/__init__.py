"""Pages and pictures from results: self-contained HTML, and PNG where matplotlib is installed (extra `plot`)."""
