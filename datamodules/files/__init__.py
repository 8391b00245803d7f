"""Files of records, opened, checked and turned into the one form that sources read."""
