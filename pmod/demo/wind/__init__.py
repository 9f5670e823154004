"""`python -m pmod.demo wind`: vorticity and divergence of winds around the globe.

The globe is cut over ranks in both directions.
"""
