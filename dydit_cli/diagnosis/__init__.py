"""Whether this machine and this Python are fit for dydit: what is installed, what is wrong with it, and what mends that."""
