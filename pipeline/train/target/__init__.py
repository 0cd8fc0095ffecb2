"""What the target says: its labels and texts, stage teach, and the features that heads read."""
