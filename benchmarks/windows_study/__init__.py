"""A study of drafters behind windows: one trained for all of them beside one trained for each."""
