"""The arithmetic of the metrics: features in, values with intervals out. All of it in fp64."""
