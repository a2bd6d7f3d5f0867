"""Recipes: one YAML file with a section a stage, checked completely before anything runs.

`schema` says which keys exist, `document` reads the file and remembers lines, `loading` puts file, overrides and options
together, `builtin` finds the recipes that come with the package. Nothing above the command line needs this room: the
stages are called with plain values.
"""
