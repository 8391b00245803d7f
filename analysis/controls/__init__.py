"""Controls that an effect is set against, one file each."""
