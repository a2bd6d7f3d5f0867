"""FLUX in ComfyUI: the file that its own loader reads, and the folder ``node`` that goes along as a custom node.

What is in ``node`` is copied into exports as it stands. It imports torch alone, and nothing of this package imports it: exports are
verified with the copy that was written.
"""
