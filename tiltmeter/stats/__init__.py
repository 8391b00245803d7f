"""Statistical inference: intervals, null distributions, and whether one vector is unusual among random ones."""
