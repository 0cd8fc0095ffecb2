"""Whether one drafter may replace another: evidence, pairs, bounds, verdict."""
