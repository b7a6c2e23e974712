"""What training examples did for a prediction: importance of each example times its similarity to the test point."""
