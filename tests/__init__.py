"""The tests, in the folders of what they test; `lib/` has what several of them use."""

import pytest

pytest.register_assert_rewrite("tests.lib")
