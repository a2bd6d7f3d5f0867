"""The command line: parse, call one function of a stage's room, print. One file a command.

The only room that imports typer or rich, and the only one that prints. Nothing here imports a heavy library at import
time, so that `dydit --help` answers at once.
"""
