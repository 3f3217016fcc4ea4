"""What protects a finished model from those who query it: logits processors, budgets, and a black-box API."""
