"""`python -m pmod.demo wind`: vorticity and divergence of winds around the globe, cut
over ranks in both directions.
"""
