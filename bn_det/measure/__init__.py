"""What a trained model does by either kind of statistics."""
