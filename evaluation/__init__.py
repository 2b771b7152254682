"""What we say about a trained model."""
