"""The audit: attacks on what really crossed the wire, what they got, and what was claimed beside it."""
