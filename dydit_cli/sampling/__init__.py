"""Sampling: diffusion and flow-matching samplers, guidance, generation and what is written of it.

The only room that imports diffusers' schedulers.
"""
