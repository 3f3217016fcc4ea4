"""The vendor's side: one base model, many jobs, and no way to the customer's code (an import contract keeps it so)."""
