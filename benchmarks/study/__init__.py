"""The study of a config: its runs, checks and committed page."""
