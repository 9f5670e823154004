"""A program of whole fields, run on one rank's blocks: layouts, and a rule for each
function of torch.
"""
