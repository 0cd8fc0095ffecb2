"""What a run tells while it works: logs, events, progress."""
