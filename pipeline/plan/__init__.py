"""What stages cost before they run: memory, work, rows."""
