"""What an effect is set against, one file a control."""
