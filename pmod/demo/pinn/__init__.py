"""`python -m pmod.demo pinn`: Burgers' equation by a network that knows the equation.

It is data- and tensor-parallel.
"""
