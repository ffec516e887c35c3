"""Training a specialist's stage over a frozen base, on token ids: the stage, its data, its steps."""
