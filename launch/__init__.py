"""The launch of a run: configuration checked, folder made, loggers chosen, base found or made, results shown."""
