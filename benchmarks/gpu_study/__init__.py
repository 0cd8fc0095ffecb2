"""The study that travels to a GPU and comes back with its page."""
