"""A study of a real target, from its config to its page."""
