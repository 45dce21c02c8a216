"""What `report.html` is made of: refits on cached features, pictures, charts and sentences."""
