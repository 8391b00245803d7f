"""How a run is put together: configuration checked, folder made, loggers chosen, base found or made, results shown."""
