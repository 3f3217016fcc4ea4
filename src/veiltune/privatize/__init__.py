"""Mechanisms that run at the customer before anything leaves: pure maths, every draw from a given generator."""
