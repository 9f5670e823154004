"""`python -m pmod.demo`: train a Fourier neural operator for Darcy flow over a mesh,
and compare with one process.
"""
