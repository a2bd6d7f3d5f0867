"""Take a model elsewhere: a folder for diffusers' stock pipeline, the original layout, or the static model again.

Kept free of heavy imports: `import dydit_cli` loads `registration` from here.
"""
