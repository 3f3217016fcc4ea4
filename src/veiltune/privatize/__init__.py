"""Mechanisms that run at the customer before anything leaves: pure maths over tensors, every draw from a given generator."""
