"""`python -m pmod.demo graph`: message passing on a mesh whose nodes are spread out."""
