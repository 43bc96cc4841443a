"""Peers: what people run today. Each module measures one, in a process of its own, by the interpreter that has it.

`processes` starts them and is ours; the others import nothing of ours but `bench.figures` and each other.
"""
