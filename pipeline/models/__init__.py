"""Language models: loaded, built from nothing, converted, exported."""
