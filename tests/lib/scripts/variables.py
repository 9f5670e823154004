"""Writes what this process was told, its variables, as a file of its own into a folder."""

# pyright: standard

import json
import os
import sys
from pathlib import Path

Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(dict(os.environ)))
