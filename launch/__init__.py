"""The launch of a run: configuration checked, folder made, loggers chosen, base found or made, results shown."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says while it is imported which kernels it lacks
