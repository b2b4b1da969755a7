"""What all sides with a transformers model share."""
