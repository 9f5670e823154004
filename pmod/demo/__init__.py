"""`python -m pmod.demo`: train a Fourier neural operator for Darcy flow over a mesh.

The training is compared with the same one in one process.
"""
