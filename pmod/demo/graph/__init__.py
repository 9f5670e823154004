"""`python -m pmod.demo graph`: message passing on an unstructured mesh whose nodes are
spread over ranks.
"""
