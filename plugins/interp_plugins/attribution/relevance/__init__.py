"""Rules of relevance propagation, and passes under them."""
