"""From documents to packed sequences and evaluation prompts."""
