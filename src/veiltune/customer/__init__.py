"""The customer's side: privatize once, keep what was sent, train the vendor's model through the wire."""
