"""Sequential runs and what they write."""
