"""How tests are spread over processes: a file at a time, as its fixtures want it, but families one by one."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "famil" not in item.path.name:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
