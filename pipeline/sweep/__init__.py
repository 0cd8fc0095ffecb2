"""The cells of a sweep: which there are, replayed, timed and predicted."""
