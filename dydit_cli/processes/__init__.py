"""One run in several processes: who this process is among them (`world`), and how they are started (`launching`).

`join` makes this process one of a `World`, whose ranks agree on sums, flags and objects; `launch` starts as many processes as a
run asks for with torch's own launcher. A run of one process knows nothing of either: its world is `ALONE`. Nothing is imported
here, because the command line asks `environment` before it knows whether torch is needed.
"""
