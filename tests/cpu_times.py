"""CPU seconds of each test file, of the processes that it starts too: independent of other load.

PYTHONPATH=tests python -m pytest -n 0 -p cpu_times
"""

import resource
from collections import Counter
from collections.abc import Generator

import pytest

SECONDS: Counter[str] = Counter()


def spent() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = spent()
    try:
        return (yield)
    finally:
        SECONDS[item.path.name] += spent() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, seconds in SECONDS.most_common():
        terminalreporter.write_line(f"{seconds:7.1f} {name}")
    terminalreporter.write_line(f"{spent():7.1f} in all, with imports")
