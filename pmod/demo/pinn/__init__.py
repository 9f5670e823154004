"""`python -m pmod.demo pinn`: Burgers' equation by a network that knows the equation,
data- and tensor-parallel.
"""
