"""What learns: backbones, their features, and the head on top of them."""
