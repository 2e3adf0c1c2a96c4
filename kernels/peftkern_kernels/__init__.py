"""Triton kernels of peftkern and their launchers: the ground floor, which knows torch and triton and nothing else.

A file is one operation: a docstring with the formula, the kernel, and a `*_call` builder that turns tensors into a
`launch.Call`. Nothing here chooses a path; `peftkern.ops.plan` does. Importing the package imports no triton.
"""
