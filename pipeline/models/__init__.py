"""Language models: whether they can be run here; loaded, built from nothing, converted, exported."""
