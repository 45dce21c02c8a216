"""What report.html is made of."""
