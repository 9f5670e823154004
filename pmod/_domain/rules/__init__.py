"""What each function of torch does to blocks, in a file for each family.

A rule gets the blocks, the function and its arguments, and returns what it makes, its
layout noted; or it raises and says what to do.
"""
