"""Judges that can be asked about texts, and what asking takes."""
