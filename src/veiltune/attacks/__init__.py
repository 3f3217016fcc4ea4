"""Attacks: each sees only what its adversary sees and returns guesses; scoring against the truth is apart."""
