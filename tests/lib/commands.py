"""A command line that a program refuses."""

# pyright: standard

from __future__ import annotations

import pytest


def check_refused(parse, arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(arguments.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err
