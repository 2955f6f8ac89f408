"""What happened: two real training steps, and all that was seen of them."""
