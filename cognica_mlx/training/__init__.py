"""Training a specialist's stage over a frozen base, on token ids: stage, data, steps."""
