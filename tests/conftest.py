"""The order of the files, for two workers to end together."""

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: those start processes, and one of them may take a minute."""
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: size[item.path])
