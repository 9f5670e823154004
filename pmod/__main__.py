"""`python -m pmod`: the list of commands."""

COMMANDS = {
    "demo": "train a Fourier neural operator over a mesh; with the words graph and wind other jobs",
    "bench": "measure what pmod costs beside the raw calls of torch.distributed",
    "doctor": "say what is detected here, and whether the ranks reach one another; for bug reports",
}

if __name__ == "__main__":
    for name, what in COMMANDS.items():
        print(f"python -m pmod.{name:<6} {what}")
