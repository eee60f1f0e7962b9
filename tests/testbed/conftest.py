import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("testbed"):
            item.add_marker(pytest.mark.skip(reason="needs root: makes network namespaces"))
