"""Model families, the split, adapters, and where models come from."""
