"""Other forms that models come in: GGUF files, wheels of the package index."""
