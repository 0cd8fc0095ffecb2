"""The config, typed to the leaf."""
