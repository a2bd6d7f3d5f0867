"""Dynamic models as programs: one graph of tensor operations that runs without dydit, and skips what the routers leave out."""
