"""Preparing data once, before training: pictures to latents, captions to embeddings, in shards that a killed run can continue."""
