"""The leakage audit of a language model that an adversary can only ask for next-token vectors."""
