"""The parts of a local diffusers pipeline folder beside its transformer, loaded one at a time: text encoders, autoencoder, scheduler."""
