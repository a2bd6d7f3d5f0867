"""Networks that turn images into features: the FID variant of Inception-v3 from a local file, and a small one of our own."""
