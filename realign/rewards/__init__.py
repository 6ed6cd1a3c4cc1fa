"""What a picture is worth: one class for each reward, and weighted sums of them."""
