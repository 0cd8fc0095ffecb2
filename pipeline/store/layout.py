"""The names of the files and folders in an artifact, by the stage that writes them."""

from __future__ import annotations

# prepare
TOKENIZER, DOCUMENTS, SEQUENCES, PROMPTS, PIECES = "tokenizer", "documents", "sequences", "prompts", ".pieces"

# pretrain and train
METRICS, MEMORY = "metrics.jsonl", "memory.json"

# sweep
SIZES = "models.jsonl"
ROWS, STEPS, STEPS_BESIDE = "rows", "steps", "steps_beside"
PREDICTED, PICKS = "predicted.jsonl", "picks.jsonl"

# report
CELLS, ANALYSIS, FIGURES = "cells.jsonl", "analysis.json", "figures"
RUN_OFF, AGAIN = "run_off.jsonl", "again.jsonl"
SUMMARY, PAGE = "summary.json", "report.html"
