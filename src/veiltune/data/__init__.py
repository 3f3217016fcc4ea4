"""The customer's texts and labels: tables from files or the hub, and synthetic tickets to try things on."""
