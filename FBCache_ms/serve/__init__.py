"""The server: one process holds the web side, without MindSpore; another loads, compiles and draws.

In reading order: settings (what is served), requests (what a client may ask for), errors (what it is told), jobs (the
queue, and what becomes of a request), child and painter (the two ends of the pipe to the process that draws), pictures,
metrics, api (the addresses), program (start and end).
"""
