"""Labels from the target, losses over views, and the training loop."""
