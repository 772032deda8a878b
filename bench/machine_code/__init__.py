"""Predict what limits a compiled kernel on a GPU by replaying its machine code; no GPU needed.

``sass`` parses a listing, ``flow`` finds the path of a warp and the tensors behind its accesses,
``replay`` runs the warps of one multiprocessor, ``grids`` knows the shipped grids, and ``predict``
puts them together. Results are predictions, never measurements.
"""
