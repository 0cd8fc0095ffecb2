"""From rows to findings: pooled cells, differences, speed, recommendations."""
