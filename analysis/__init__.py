"""Asked afterwards: a finished run is opened as plain data, measured, and told in tables, figures and one page."""
